"""Changes of coefficients against formulae and against optax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zofo_jax.core import directions, outer, zo
from zofo_jax.core import keys as keys_lib
from zofo_jax.core import sampler as sampler_lib

STACKED = r"(^|/)layers/"

SAMPLER = sampler_lib.Sampler(directions.Rademacher(), stacked=STACKED)
KEY = jax.random.key(99)
SCALINGS = {
  "clip": outer.clip(0.5),
  "sign": outer.sign(),
  "std": outer.scale_by_std(),
  "rms": outer.scale_by_running_rms(0.9),
}


def _base(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  return {
    "plain": draw(4, 3),
    "layers": {"bias": draw(2, 5), "kernel": draw(2, 5, 3)},
  }


def _estimate(step, num_directions, broken=()):
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


@jax.jit
def _unit(direction_key, subspace_key, tree):
  return SAMPLER.weighted_sum(
    tree, keys_lib.DirectionKey(direction_key[None], subspace_key), jnp.ones(1)
  )


def _flat(tree):
  leaves = [np.array(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
  return np.concatenate([leaf.reshape(-1) for leaf in leaves])


def _sum(estimate, coefficients, base):
  """Sums c_q z_q over finite q and divides by their number, in float64."""
  direction_key, subspace_key = estimate.keys
  total = sum(
    float(c) * _flat(_unit(k, subspace_key, base))
    for k, c in zip(direction_key, coefficients)
  )
  return total / (len(direction_key) - int(estimate.num_nonfinite))


def _updater(tx, **options):
  fixed = dict(sampler=SAMPLER, objective=None, key=KEY)
  return jax.jit(functools.partial(tx.update, **fixed), **options)


def _close(left, right):
  np.testing.assert_allclose(left, right, rtol=1e-5, atol=2e-6)


def _by_hand(name):
  """A scaling in NumPy: (coefficients and values of finite q) -> new ones."""
  mean_square, count = 0.0, 0

  def running_rms(c, values):
    nonlocal mean_square, count
    count += 1
    mean_square = 0.9 * mean_square + 0.1 * np.mean(c**2)
    return c / (np.sqrt(mean_square / (1 - 0.9**count)) + 1e-8)

  return {
    "clip": lambda c, values: np.clip(c, -0.5, 0.5),
    "sign": lambda c, values: np.sign(c),
    "std": lambda c, values: c / (np.std(values) + 1e-8),
    "rms": running_rms,
  }[name]


@pytest.mark.parametrize("broken", [(), (1,)])
@pytest.mark.parametrize("name", SCALINGS)
def test_scalings_are_their_formulae(name, broken):
  tx, by_hand = outer.sgd(0.3, SCALINGS[name]), _by_hand(name)
  base = _base()
  state, update = tx.init(base), _updater(tx)
  for step in range(4):
    estimate = _estimate(step, 3, broken)
    before = _flat(base)
    base, state = update(base, state, estimate)
    finite = np.setdiff1d(np.arange(3), broken)
    values = np.array(estimate.values, np.float64)
    scaled = np.zeros(3)
    scaled[finite] = by_hand(
      np.array(estimate.coefficients, np.float64)[finite],
      values[np.isfinite(values)],
    )
    _close(_flat(base), before - 0.3 * _sum(estimate, scaled, base))


@pytest.mark.parametrize(
  "name, num_directions",
  [*((name, 1) for name in SCALINGS), ("std", 3), ("rms", 3)],
)
def test_in_place_equals_optax_on_an_explicit_gradient(name, num_directions):
  fused = outer.sgd(0.3, SCALINGS[name])
  explicit = outer.from_optax(optax.sgd(0.3), SCALINGS[name])
  start = _base()
  runs = [
    (_updater(fused), fused.init(start)),
    (_updater(explicit), explicit.init(start)),
  ]
  results = []
  for update, state in runs:
    base = start
    for number in range(3):
      base, state = update(base, state, _estimate(number, num_directions))
    results.append(_flat(base))
  _close(results[0], results[1])


def test_scalings_follow_one_another():
  tx = outer.sgd(0.3, outer.clip(0.5), outer.sign(), outer.clip(0.25))
  base, estimate = _base(), _estimate(0, 3)
  moved, _ = _updater(tx)(base, tx.init(base), estimate)
  scaled = 0.25 * np.sign(estimate.coefficients)
  _close(_flat(moved), _flat(base) - 0.3 * _sum(estimate, scaled, base))
