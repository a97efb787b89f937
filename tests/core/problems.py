"""A small backbone, made-up estimates, and what tests of steps measure by."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from zofo_jax.core import directions, zo
from zofo_jax.core import keys as keys_lib
from zofo_jax.core import sampler as sampler_lib

STACKED = r"(^|/)layers/"
SAMPLER = sampler_lib.Sampler(directions.Rademacher(), stacked=STACKED)
KEY = jax.random.key(99)


def make_base(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  return {
    "plain": draw(4, 3),
    "layers": {"bias": draw(2, 5), "kernel": draw(2, 5, 3)},
  }


def make_estimate(step, num_directions, broken=()):
  """Makes up an estimate: random keys, coefficients and values."""
  rng = np.random.default_rng(step)
  direction_key, subspace_key = jax.random.split(jax.random.key(step))
  finite = np.ones(num_directions, bool)
  finite[list(broken)] = False
  coefficients = np.where(finite, rng.normal(size=num_directions), 0)
  values = rng.normal(size=(num_directions, 2))
  values[~finite, 0] = np.nan
  return zo.Estimate(
    keys=keys_lib.DirectionKey(
      jax.random.split(direction_key, num_directions), subspace_key
    ),
    coefficients=jnp.asarray(coefficients, jnp.float32),
    num_nonfinite=jnp.int32(len(broken)),
    values=jnp.asarray(values, jnp.float32),
    aux=(),
  )


@functools.partial(jax.jit, static_argnames="sampler")
def unit_direction(direction_key, subspace_key, tree, sampler=SAMPLER):
  """Writes the z of one direction key out, as a tree."""
  return sampler.weighted_sum(
    tree, keys_lib.DirectionKey(direction_key[None], subspace_key), jnp.ones(1)
  )


@jax.custom_jvp
def not_differentiated(x):
  return x


@not_differentiated.defjvp
def _fail(primals, tangents):
  raise AssertionError("theta was differentiated")


def normal(seed):
  """Returns a function of a shape that draws from the normal distribution."""
  rng = np.random.default_rng(seed)
  return lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)


def ravel(tree):
  leaves = [leaf.reshape(-1) for leaf in jax.tree.leaves(tree)]
  # The barrier keeps XLA from writing z out again wherever x is used, which
  # makes these programs slow to compile.
  return jax.lax.optimization_barrier(jnp.concatenate(leaves))


def flatten(tree):
  """Writes a tree as one float64 vector."""
  leaves = [np.array(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
  return np.concatenate([leaf.reshape(-1) for leaf in leaves])


def mean_direction(estimate, coefficients, base):
  """Sums c_q z_q over finite q and divides by their number, in float64."""
  direction_key, subspace_key = estimate.keys
  total = sum(
    float(c) * flatten(unit_direction(k, subspace_key, base))
    for k, c in zip(direction_key, coefficients)
  )
  return total / (len(direction_key) - int(estimate.num_nonfinite))


def make_updater(tx, **options):
  fixed = dict(sampler=SAMPLER, objective=None, key=KEY)
  return jax.jit(functools.partial(tx.update, **fixed), **options)
