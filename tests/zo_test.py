"""Estimates on functions whose directional derivatives are known exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zofo_jax import directions, zo

KINDS = [directions.Gaussian(), directions.Rademacher()]
ESTIMATORS = [zo.central, zo.forward, zo.exact]


def _tree():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return {"plain": draw(5, 3), "layers": {"stacked": draw(2, 6)}}


def _flat(tree):
  """Writes a tree as one float64 vector."""
  leaves = [np.array(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
  return np.concatenate([leaf.reshape(-1) for leaf in leaves])


def _ravel(tree):
  leaves = [leaf.reshape(-1) for leaf in jax.tree.leaves(tree)]
  # The barrier keeps XLA from writing z out again wherever x is used, which
  # makes these programs slow to compile.
  return jax.lax.optimization_barrier(jnp.concatenate(leaves))


@functools.partial(jax.jit, static_argnames="direction")
def _directions(keys, tree, direction):
  """Writes the z of every key out as a row, [Q, d]."""
  zeros = jax.tree.map(jnp.zeros_like, tree)
  add = directions.Sampler(direction).add
  row = lambda key: _ravel(add(zeros, key[None], jnp.ones(1)))
  return jax.lax.map(row, keys)


def _hessian(size):
  matrix = np.random.default_rng(1).normal(size=(size, size)) / np.sqrt(size)
  return np.asarray(matrix + matrix.T, np.float32)


@functools.cache
def _estimator(fn, direction, estimator, num_directions, has_aux=False):
  """Jits an estimate; cached, so that tests share compilations."""
  return jax.jit(
    functools.partial(
      zo.estimate,
      fn,
      sampler=directions.Sampler(direction),
      estimator=estimator,
      num_directions=num_directions,
      has_aux=has_aux,
    )
  )


def _linear(tree):
  weights = _ravel(_tree())
  return jnp.dot(weights, _ravel(tree)) + 1.0


def _quadratic(tree):
  x = _ravel(tree)
  return 0.5 * x @ jnp.asarray(_hessian(x.size)) @ x + x.sum()


@pytest.mark.parametrize(
  "direction, estimator",
  [(KINDS[0], zo.central), *((KINDS[1], each) for each in ESTIMATORS)],
)
def test_linear_function_is_exact_for_every_eps(direction, estimator):
  tree = jax.tree.map(lambda leaf: leaf / 3, _tree())
  fn = _estimator(_linear, direction, estimator, 3)
  for eps in (1e-3, 1e-1, 1.0, 100.0):
    estimate = fn(tree, jax.random.key(0), eps)
    z = np.array(_directions(estimate.keys, tree, direction), np.float64)
    slope = z @ _flat(_tree())
    # Sums of 27 float32 products of this size, their rounding over eps.
    size = np.abs(_flat(_tree())) @ np.abs(_flat(tree)) + 1.0
    tolerance = 2.0**-21 * (size / eps + np.abs(_flat(_tree())).sum())
    np.testing.assert_allclose(estimate.coefficients, slope, atol=tolerance)
    assert int(estimate.num_nonfinite) == 0
  # A traced eps: four values, one program.
  assert fn._cache_size() == 1


def test_quadratic_function():
  direction = directions.Gaussian()
  tree = _tree()
  x = _flat(tree)
  hessian = _hessian(x.size).astype(np.float64)
  eps = 0.25
  got, z = {}, None
  for estimator in ESTIMATORS:
    fn = _estimator(_quadratic, direction, estimator, 3)
    estimate = fn(tree, jax.random.key(1), eps)
    got[estimator] = np.array(estimate.coefficients)
    z = np.array(_directions(estimate.keys, tree, direction), np.float64)
  slope = z @ (hessian @ x + 1.0)
  curvature = np.einsum("qi,ij,qj->q", z, hessian, z)
  assert np.all(np.abs(eps / 2 * curvature) > 1e-3)  # the bias is visible
  close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-4)
  close(got[zo.exact], slope)
  close(got[zo.central], slope)
  close(got[zo.forward], slope + eps / 2 * curvature)


@pytest.mark.parametrize("direction", KINDS)
def test_mean_over_directions_is_the_gradient(direction):
  def fn(tree):
    hidden = jnp.tanh(tree["plain"] @ jnp.ones((3, 2)))
    return jnp.sum(jnp.sin(tree["layers"]["stacked"])) + jnp.sum(hidden**2)

  tree = _tree()
  num_directions = 4000
  estimate = _estimator(fn, direction, zo.central, num_directions)(
    tree, jax.random.key(2), 1e-2
  )
  z = np.array(_directions(estimate.keys, tree, direction), np.float64)
  samples = np.array(estimate.coefficients, np.float64)[:, None] * z
  error = samples.mean(axis=0) - _flat(jax.grad(fn)(tree))
  standard_error = samples.std(axis=0) / np.sqrt(num_directions)
  assert np.all(np.abs(error) < 4.5 * standard_error)
  # The written-out gradient is that same mean.
  sampler = directions.Sampler(direction)
  written = jax.jit(zo.gradient, static_argnums=2)(tree, estimate, sampler)
  np.testing.assert_allclose(
    _flat(written), samples.mean(axis=0), rtol=1e-3, atol=1e-4
  )


def test_directions_differ_and_follow_the_key():
  tree = _tree()
  fn = _estimator(_linear, KINDS[1], zo.central, 3)
  first, again = (fn(tree, jax.random.key(3), 0.1) for _ in range(2))
  other = fn(tree, jax.random.key(4), 0.1)
  np.testing.assert_array_equal(first.coefficients, again.coefficients)
  both = np.concatenate([first.coefficients, other.coefficients])
  assert len(np.unique(both)) == 6


@pytest.mark.parametrize(
  "estimator, bad", [(zo.central, np.inf), (zo.forward, np.nan)]
)
def test_non_finite_evaluations_are_dropped_and_counted(estimator, bad):
  def fn(tree):
    return jnp.where(tree["x"][0] > 0.7, bad, tree["x"].sum())

  direction = directions.Gaussian()
  tree = {"x": jnp.zeros(4)}  # |z_0| decides which evaluations break
  estimate = _estimator(fn, direction, estimator, 20)(
    tree, jax.random.key(5), 1.0
  )
  z = np.array(_directions(estimate.keys, tree, direction))
  reach = np.abs(z[:, 0]) if estimator is zo.central else z[:, 0]
  broken = reach > 0.7
  assert 0 < broken.sum() < 20
  assert int(estimate.num_nonfinite) == broken.sum()
  np.testing.assert_array_equal(estimate.coefficients == 0, broken)
  np.testing.assert_allclose(
    estimate.coefficients[~broken], z.sum(axis=1)[~broken], rtol=1e-5
  )


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_value_and_aux_are_means_over_the_points(estimator):
  def fn(tree):
    x = _ravel(tree)
    return jnp.sum(x**2), {"x": x}

  tree = _tree()
  direction = directions.Rademacher()
  estimate = _estimator(fn, direction, estimator, 3, True)(
    tree, jax.random.key(6), 0.5
  )
  z = np.array(_directions(estimate.keys, tree, direction), np.float64)
  shift = {
    zo.central: 0.5 * np.concatenate([z, -z]),
    zo.forward: 0.5 * z,
    zo.exact: 0 * z,
  }[estimator]
  points = _flat(tree) + shift
  np.testing.assert_allclose(
    estimate.aux["x"], points.mean(axis=0), rtol=1e-5, atol=1e-6
  )
  np.testing.assert_allclose(
    estimate.value, (points**2).sum(axis=1).mean(), rtol=1e-5
  )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_thousand_probes_leave_the_weights_as_they_are(dtype):
  sampler = directions.Sampler(directions.Rademacher())
  tree = jax.tree.map(lambda leaf: leaf.astype(dtype), _tree())

  def probe(index, carry):
    tree, total = carry
    key = jax.random.fold_in(jax.random.key(7), index)
    estimate = zo.estimate(
      lambda tree: _linear(jax.tree.map(jnp.float32, tree)),
      tree,
      key,
      1e-3,
      sampler=sampler,
    )
    # lr 0: the probes and the write, but no step.
    tree = sampler.add(tree, estimate.keys, 0.0 * estimate.coefficients)
    return tree, total + jnp.abs(estimate.coefficients[0])

  after, total = jax.jit(
    lambda tree: jax.lax.fori_loop(0, 1000, probe, (tree, 0.0))
  )(tree)
  assert float(total) > 100.0
  jax.tree.map(np.testing.assert_array_equal, after, tree)
