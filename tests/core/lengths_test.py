"""Rules that choose lengths: on quadratics whose best lengths are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zofo_jax as zofo
from zofo_jax.core import lengths as lengths_lib


def quadratic(best):
  """Returns an objective of the lengths whose least value is at `best`."""

  def objective(lengths, index):
    del index
    leaves = zip(jax.tree.leaves(lengths), jax.tree.leaves(best), strict=True)
    return 1e3 + sum(jnp.sum((x - b) ** 2) for x, b in leaves)

  return objective


@pytest.mark.parametrize("best, taken", [(0.3, 0.3), (1.7, 1.0), (-1.0, 0.0)])
def test_a_parabola_finds_the_best_length(best, taken):
  chosen = lengths_lib.parabola().choose(
    quadratic(jnp.float32(best)), jnp.ones([]), jax.random.key(0)
  )
  assert float(chosen.lengths) == pytest.approx(taken, abs=2e-3)
  assert chosen.values.shape == (3,)


def test_a_parabola_that_opens_downwards_or_is_not_finite():
  rule = lengths_lib.parabola((0.0, 0.5, 1.0))
  choose = lambda fn: rule.choose(
    lambda x, _: fn(x), jnp.ones([]), jax.random.key(0)
  )
  assert float(choose(lambda x: -((x - 0.4) ** 2)).lengths) == 1.0
  chosen = choose(lambda x: jnp.where(x > 0.7, jnp.nan, -x))
  assert float(chosen.lengths) == 0.0 and int(chosen.num_nonfinite) == 1


def test_descent_finds_the_best_lengths():
  best = {"a": jnp.array([0.2, 1.6]), "b": jnp.float32(0.9)}
  best |= {"earlier": jnp.array([0.7, -1.2])}
  rule = lengths_lib.descend(
    zofo.ZerothOrder(zofo.directions.Rademacher(), num_directions=8),
    num_updates=40,
    learning_rate=0.1,
  )
  units = jax.tree.map(jnp.ones_like, best) | {"earlier": jnp.zeros(2)}
  chosen = jax.jit(lambda key: rule.choose(quadratic(best), units, key))(
    jax.random.key(0)
  )
  for name, value in best.items():
    # Of one that theta has taken, no more than all is taken back.
    value = jnp.maximum(value, -1.0)
    np.testing.assert_allclose(chosen.lengths[name], value, atol=0.15)
  assert chosen.values.size == rule.evaluations == 40 * 16


def test_descent_without_a_finite_value_takes_nothing():
  estimator = zofo.ZerothOrder(zofo.directions.Rademacher(), num_directions=2)
  rule = lengths_lib.descend(estimator, num_updates=2)

  def choose(first):
    """Some values are finite only in the first update, or none are."""
    objective = lambda x, index: jnp.where(first & (index == 0), x, jnp.nan)
    return rule.choose(objective, jnp.ones([]), jax.random.key(0))

  nothing = choose(False)
  assert float(nothing.lengths) == 0.0 and int(nothing.num_nonfinite) > 0
  assert float(choose(True).lengths) == pytest.approx(0.7)  # 1 - 0.3
