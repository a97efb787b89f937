"""The bilevel step on a quadratic whose solution is known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import zofo_jax as zofo
from tests.core.bilevel_problem import make_algorithm, remember_keys
from tests.core.problems import unit_direction
from zofo_jax.core import directions, outer, sampler

SAMPLER = sampler.Sampler(directions.Rademacher())


# Lower: min_s |s - A theta|^2 / 2.
# Upper: |p - b|^2 / 2 + rho |theta - d|^2 / 2.
# The hyper-gradient is A^T (A theta - b) + rho (theta - d); that of the
# penalised objective at its optimal p and s has lam / (1 + lam) in front of
# the first term.

_RNG = np.random.default_rng(5)
A = _RNG.normal(size=(4, 3)).astype(np.float32) / 2
TARGET = _RNG.normal(size=4).astype(np.float32)
ANCHOR = _RNG.normal(size=3).astype(np.float32)
RHO = 0.5


def _quadratic_lower(theta, adapter, batch, key):
  return 0.5 * jnp.sum((adapter - A @ theta) ** 2)


def _quadratic_upper(theta, adapter, batch, key):
  return 0.5 * jnp.sum((adapter - TARGET) ** 2) + 0.5 * RHO * jnp.sum(
    (theta - ANCHOR) ** 2
  )


_NO_ROWS = zofo.BilevelBatch(
  lower=jnp.zeros((1, 1)), penalty=jnp.zeros(1), upper=jnp.zeros(1)
)


def test_hyper_gradient_at_rate_one_over_penalty():
  num_directions = 6
  algorithm = make_algorithm(
    _quadratic_lower,
    _quadratic_upper,
    lower_tx=optax.sgd(1.0),  # one step to s = A theta
    base_tx=remember_keys(outer.sgd(0.0), num_directions),
    zo=zofo.ZerothOrder(directions.Gaussian(), num_directions=num_directions),
  )
  step = jax.jit(algorithm.step)
  theta = jnp.array([0.7, -0.4, 1.1])
  slope = A.T @ (A @ theta - TARGET)
  hyper_gradient = slope + RHO * (theta - ANCHOR)
  errors = []
  for penalty in (1.0, 10.0, 100.0):
    upper = (TARGET + penalty * A @ theta) / (1 + penalty)
    state = algorithm.init(jax.random.key(0), theta, upper, jnp.zeros(4))
    state, info = step(state, _NO_ROWS, zofo.BilevelHParams(0.1, penalty))
    # <g, z_q> along more directions than dimensions determines g.
    direction_key, subspace_key = state.base_opt[1]
    z = [
      unit_direction(
        key, subspace_key, theta, sampler.Sampler(directions.Gaussian())
      )
      for key in direction_key
    ]
    gradient, *_ = np.linalg.lstsq(np.array(z), np.array(info.coefficients))
    errors.append((1 + penalty) * np.linalg.norm(gradient - hyper_gradient))
  np.testing.assert_allclose(errors, np.linalg.norm(slope), rtol=0.02)


def test_converges_to_the_bilevel_solution():
  def run(penalty):
    algorithm = make_algorithm(
      _quadratic_lower,
      _quadratic_upper,
      lower_tx=optax.sgd(1.0),
      upper_tx=optax.sgd(1 / (1 + penalty)),  # one step to p's optimum
      base_tx=outer.sgd(0.02),
      zo=zofo.ZerothOrder(SAMPLER, num_directions=4),
    )
    state = algorithm.init(
      jax.random.key(0), jnp.zeros(3), jnp.zeros(4), jnp.zeros(4)
    )
    body = lambda state, _: (
      algorithm.step(
        state, _NO_ROWS, zofo.BilevelHParams(0.05, jnp.float32(penalty))
      )[0],
      None,
    )
    return jax.jit(lambda s: jax.lax.scan(body, s, length=2500)[0])(state)

  def solution(weight):
    matrix = weight * A.T @ A + RHO * np.eye(3)
    return np.linalg.solve(matrix, weight * A.T @ TARGET + RHO * ANCHOR)

  gaps = []
  for penalty in (2.0, 20.0):
    state = run(penalty)
    penalised = solution(penalty / (1 + penalty))
    np.testing.assert_allclose(state.base, penalised, atol=2e-3)
    np.testing.assert_allclose(state.lower, A @ state.base, atol=2e-3)
    gaps.append((1 + penalty) * np.linalg.norm(state.base - solution(1.0)))
  # theta approaches the bilevel solution as 1 / lam.
  assert 0.5 < gaps[1] / gaps[0] < 2.0
