"""Many directions average to the gradient, of every kind and any tree."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

import zofo_jax as zofo
from tests.core.problems import flatten, normal, ravel
from zofo_jax.core import directions, zo
from zofo_jax.core import sampler as sampler_lib

STACKED = r"(^|/)layers/"

RADEMACHER = directions.Rademacher()
KINDS = [
  directions.Gaussian(),
  RADEMACHER,
  directions.LowRank(2),
  directions.PerExample(),
]


def _tree():
  draw = normal(0)
  return {"plain": draw(5, 3), "layers": {"stacked": draw(2, 6)}}


def _smooth(tree):
  hidden = jnp.tanh(tree["plain"] @ jnp.ones((3, 2)))
  return jnp.sum(jnp.sin(tree["layers"]["stacked"])) + jnp.sum(hidden**2)


def _assert_mean_is(gradient, estimate, z, scale=4.5):
  samples = np.array(estimate.coefficients, np.float64)[:, None] * z
  error = np.abs(samples.mean(axis=0) - gradient)
  bound = scale * samples.std(axis=0) / np.sqrt(len(z))
  assert np.all(error <= bound)
  return samples.mean(axis=0)


@pytest.mark.parametrize(
  "direction",
  [*KINDS, directions.Sparse(), directions.Sparse(directions.LowRank(2))],
)
def test_mean_over_directions_is_the_gradient(direction):
  tree, num_directions = _tree(), 4000
  gradient = jax.grad(_smooth)(tree)
  if isinstance(direction, directions.Sparse):  # of what is let move
    gradient["plain"] = direction.mask(gradient["plain"], tree["plain"])
    assert 0 < np.sum(gradient["plain"] == 0) < 15
  # Each direction has a subspace key of its own: low-rank ones of one subspace
  # span V.
  estimate = _estimate_in_frames(_smooth, direction, num_directions, tree)
  z = np.array(estimate.aux, np.float64)
  _assert_mean_is(flatten(gradient), estimate, z)


def _estimate_in_frames(fn, direction, num_directions, tree, eps=1e-2):
  """Q estimates of one direction each; aux becomes their z, [Q, d]."""
  sampler = sampler_lib.Sampler(direction, stacked=STACKED)

  def estimate_along(key):
    estimate = zo.estimate(fn, tree, key, eps, zofo.ZerothOrder(sampler))
    z = ravel(sampler.weighted_sum(tree, estimate.keys, jnp.ones(1)))
    return estimate.coefficients[0], z

  keys = jax.random.split(jax.random.key(2), num_directions)
  coefficients, z = jax.jit(lambda keys: jax.lax.map(estimate_along, keys))(
    keys
  )
  return zo.Estimate((), coefficients, 0, (), z)


@pytest.mark.slow
@hypothesis.settings(max_examples=6, deadline=None, derandomize=True)
@hypothesis.given(
  direction=strategies.sampled_from([*KINDS[1:], directions.Sparse()]),
  shapes=strategies.lists(
    strategies.lists(strategies.integers(1, 6), max_size=2).map(tuple),
    min_size=1,
    max_size=2,
  ),
  stacked=strategies.booleans(),
  dtype=strategies.sampled_from([jnp.float32, jnp.float16, jnp.bfloat16]),
)
def test_mean_over_directions_of_any_tree(direction, shapes, stacked, dtype):
  rng = np.random.default_rng(0)
  shapes = [(2, *shape) if stacked else shape for shape in shapes]
  leaves = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
  tree = {"layers" if stacked else "plain": leaves}
  fn = lambda tree: jnp.sum(jnp.sin(ravel(tree).astype(jnp.float32)))
  # Steps of 1/8 are many spacings of bfloat16; sin(h)/h = 1 - h^2 / 6 ...
  estimate = _estimate_in_frames(fn, direction, 3000, tree, 0.125)
  z = np.array(estimate.aux, np.float64)
  gradient = np.cos(flatten(tree))
  if isinstance(direction, directions.Sparse):
    gradient = np.where(np.any(z != 0, axis=0), gradient, 0)
  # ... and the spacing itself is a share of the step.
  bias = 0.01 if dtype != jnp.bfloat16 else 0.1
  samples = np.array(estimate.coefficients, np.float64)[:, None] * z
  error = np.abs(samples.mean(axis=0) - gradient)
  bound = 4.5 * samples.std(axis=0) / np.sqrt(len(z))
  assert np.all(error <= bound + bias * np.abs(gradient).max())
