"""Changes of coefficients against formulae and against optax."""

import numpy as np
import optax
import pytest

from tests.core.problems import (
  flatten,
  make_base,
  make_estimate,
  make_updater,
  mean_direction,
)
from zofo_jax.core import outer

SCALINGS = {
  "clip": outer.clip(0.5),
  "sign": outer.sign(),
  "std": outer.scale_by_std(),
  "rms": outer.scale_by_running_rms(0.9),
}


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
  base = make_base()
  state, update = tx.init(base), make_updater(tx)
  for step in range(4):
    estimate = make_estimate(step, 3, broken)
    before = flatten(base)
    base, state = update(base, state, estimate)
    finite = np.setdiff1d(np.arange(3), broken)
    values = np.array(estimate.values, np.float64)
    scaled = np.zeros(3)
    scaled[finite] = by_hand(
      np.array(estimate.coefficients, np.float64)[finite],
      values[np.isfinite(values)],
    )
    _close(flatten(base), before - 0.3 * mean_direction(estimate, scaled, base))


@pytest.mark.parametrize(
  "name, num_directions",
  [*((name, 1) for name in SCALINGS), ("std", 3), ("rms", 3)],
)
def test_in_place_equals_optax_on_an_explicit_gradient(name, num_directions):
  fused = outer.sgd(0.3, SCALINGS[name])
  explicit = outer.from_optax(optax.sgd(0.3), SCALINGS[name])
  start = make_base()
  runs = [
    (make_updater(fused), fused.init(start)),
    (make_updater(explicit), explicit.init(start)),
  ]
  results = []
  for update, state in runs:
    base = start
    for number in range(3):
      base, state = update(base, state, make_estimate(number, num_directions))
    results.append(flatten(base))
  _close(results[0], results[1])


def test_scalings_follow_one_another():
  tx = outer.sgd(0.3, outer.clip(0.5), outer.sign(), outer.clip(0.25))
  base, estimate = make_base(), make_estimate(0, 3)
  moved, _ = make_updater(tx)(base, tx.init(base), estimate)
  scaled = 0.25 * np.sign(estimate.coefficients)
  _close(
    flatten(moved), flatten(base) - 0.3 * mean_direction(estimate, scaled, base)
  )
