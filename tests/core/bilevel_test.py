"""The bilevel step against a float64 transcription of Algorithm 2."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zofo_jax as zofo
from tests.core.bilevel_problem import (
  ROWS,
  T,
  assert_close,
  make_algorithm,
  make_batch,
  remember_keys,
  start,
)
from tests.core.problems import STACKED, normal, unit_direction
from zofo_jax.core import directions, outer, sampler, zo


def _numpy_loss(base, adapter, batch):
  """Returns the loss and its gradient by the adapter, derived by hand."""
  x, y, weight = batch
  w, c = base["layers"]["w"], base["c"]
  residual = x @ (w[0] + w[1] * adapter["a"]) + c * adapter["b"] - y
  weight = weight / weight.sum()
  slope = 2 * weight * residual
  gradient = {"a": w[1] * (x.T @ slope), "b": c * slope.sum()}
  return np.sum(weight * residual**2), gradient


# --- Algorithm 2, slowly -----------------------------------------------------


def _float64(tree):
  return jax.tree.map(lambda leaf: np.array(leaf, np.float64), tree)


def _slow_adam(rate):
  def init(x):
    zeros = jax.tree.map(np.zeros_like, x)
    return 0, zeros, zeros

  def update(x, g, state):
    t, m, v = state
    t = t + 1
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
    v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, g)
    x = jax.tree.map(
      lambda x, m, v: (
        x - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
      ),
      x,
      m,
      v,
    )
    return x, (t, m, v)

  return init, update


def _slow_sgd(rate):
  update = lambda x, g, state: (
    jax.tree.map(lambda x, g: x - rate * g, x, g),
    state,
  )
  return lambda x: None, update


@pytest.mark.parametrize(
  "estimator, num_directions, theta, direction, per_example",
  [
    (zo.central, 1, "sgd", directions.Rademacher(), False),
    (zo.central, 3, "adam", directions.LowRank(2), False),
    (zo.forward, 1, "adam", directions.Rademacher(), False),
    pytest.param(
      *(zo.forward, 3, "sgd", directions.Rademacher(), False),
      marks=pytest.mark.slow,
    ),
    (zo.central, ROWS, "sgd", directions.PerExample(), True),
  ],
)
def test_iteration_equals_the_transcription(
  estimator, num_directions, theta, direction, per_example
):
  eps, penalty = 0.05, 3.0
  # Two layers of vectors, or a matrix for directions that need one.
  low_rank = isinstance(direction, directions.LowRank)
  probed = sampler.Sampler(direction, stacked=None if low_rank else STACKED)
  fast, slow = {
    "sgd": (outer.sgd(1e-2), _slow_sgd(1e-2)),
    "adam": (optax.adam(1e-2), _slow_adam(1e-2)),
  }[theta]
  algorithm = make_algorithm(
    base_tx=remember_keys(fast, num_directions),
    zo=zofo.ZerothOrder(
      probed,
      estimator,
      num_directions=1 if per_example else num_directions,
      per_example=per_example,
    ),
    upper_tx=optax.sgd(2e-2),
  )
  state = algorithm.init(*start())
  step = jax.jit(algorithm.step)

  base, p, s = _float64(start()[1:])
  s_init, s_update = _slow_adam(3e-2)
  p_init, p_update = _slow_sgd(2e-2)
  base_init, base_update = slow
  s_state, p_state, base_state = s_init(s), p_init(p), base_init(base)

  for iteration in range(3):
    batch = make_batch(iteration)
    state, info = step(state, batch, zofo.BilevelHParams(eps, penalty))
    rows = _float64(batch)

    # 1. T first-order steps on s.
    lower_losses = []
    for t in range(T):
      value, gradient = _numpy_loss(base, s, [leaf[t] for leaf in rows.lower])
      lower_losses.append(value)
      s, s_state = s_update(s, gradient, s_state)
    # 2a. The gradient of p at the same theta.
    upper_loss, g_f = _numpy_loss(base, p, rows.upper)
    penalty_loss, g_p = _numpy_loss(base, p, rows.penalty)
    gradient = jax.tree.map(lambda f, g: f + penalty * g, g_f, g_p)

    # 2b. theta, from the old p and the new s.
    def objective(base, q, p=p, s=s, rows=rows):
      # A direction sees all rows, or the row of its own example.
      seen = slice(q, q + 1) if per_example else slice(None)
      upper, shared = ([x[seen] for x in b] for b in (rows.upper, rows.penalty))
      return _numpy_loss(base, p, upper)[0] + penalty * (
        _numpy_loss(base, p, shared)[0] - _numpy_loss(base, s, shared)[0]
      )

    keys = state.base_opt[1]
    coefficients, values = [], []
    estimate = jax.tree.map(np.zeros_like, base)
    for q in range(num_directions):
      z = _float64(
        unit_direction(keys.direction[q], keys.subspace, start()[1], probed)
      )
      at = lambda t, z=z, base=base, q=q: objective(
        jax.tree.map(lambda x, z: x + t * z, base, z), q
      )
      if estimator is zo.central:
        c = (at(eps) - at(-eps)) / (2 * eps)
        values += [at(eps), at(-eps)]
      else:
        c = (at(eps) - at(0.0)) / eps
        values += [at(eps)]
      coefficients.append(c)
      estimate = jax.tree.map(
        lambda g, z, c=c: g + c * z / num_directions, estimate, z
      )
    # 2c. p and theta move together.
    base, base_state = base_update(base, estimate, base_state)
    p, p_state = p_update(p, gradient, p_state)

    # Rounding of G, in float32, over eps.
    scale = upper_loss + penalty * (penalty_loss + lower_losses[-1])
    scale = scale * (10 if per_example else 1)  # of one row
    atol = 8 * 2.0**-23 * scale / eps
    np.testing.assert_allclose(
      info.coefficients, coefficients, rtol=1e-4, atol=5 * atol
    )
    np.testing.assert_allclose(info.lower_loss, lower_losses, rtol=1e-4)
    np.testing.assert_allclose(info.upper_loss, upper_loss, rtol=1e-4)
    np.testing.assert_allclose(info.penalty_loss, penalty_loss, rtol=1e-4)
    np.testing.assert_allclose(
      info.objective, np.mean(values), rtol=1e-4, atol=1e-5 * scale
    )
    norm = np.sqrt(np.sum(gradient["a"] ** 2) + gradient["b"] ** 2)
    np.testing.assert_allclose(info.upper_grad_norm, norm, rtol=1e-4)
    for got, expected in ((state.upper, p), (state.lower, s)):
      assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert_close(state.base, base, rtol=1e-4, atol=1e-4)
  assert int(state.step) == 3


def test_directions_share_their_frame_for_some_steps():
  def loss(base, adapter, batch, key):
    return jnp.sum((base["w"] * adapter - batch) ** 2)

  algorithm = make_algorithm(
    loss,
    base_tx=remember_keys(outer.sgd(1e-3), 1),
    zo=zofo.ZerothOrder(directions.LowRank(2), subspace_steps=3),
  )
  base = {"w": normal(0)(6, 7)}
  scale = jnp.float32(1.0)
  state = algorithm.init(jax.random.key(0), base, scale, scale)
  batch = zofo.BilevelBatch(jnp.ones(1), jnp.float32(1.0), jnp.float32(2.0))
  step = jax.jit(algorithm.step)
  zs = []
  for _ in range(6):
    state, _ = step(state, batch)
    direction_key, subspace_key = state.base_opt[1]
    z = unit_direction(
      direction_key[0],
      subspace_key,
      base,
      sampler.Sampler(directions.LowRank(2), stacked=STACKED),
    )
    zs.append(np.array(z["w"]))
  rank = lambda steps: np.linalg.matrix_rank(np.vstack([zs[i] for i in steps]))
  assert rank((0, 1, 2)) == rank((3, 4, 5)) == 2  # one V
  assert rank((2, 3)) == 4  # and another
  assert np.linalg.matrix_rank(np.hstack(zs[:3])) == 6  # U is always new
