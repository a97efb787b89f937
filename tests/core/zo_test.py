"""Estimates on functions whose directional derivatives are known exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zofo_jax as zofo
from tests.core.problems import flatten, normal, ravel
from zofo_jax.core import directions, zo
from zofo_jax.core import keys as keys_lib
from zofo_jax.core import sampler as sampler_lib

RADEMACHER = directions.Rademacher()
KINDS = [
  directions.Gaussian(),
  RADEMACHER,
  directions.LowRank(2),
  directions.PerExample(),
]
ESTIMATORS = [zo.central, zo.forward, zo.exact]
estimators = pytest.mark.parametrize(
  "estimator", ESTIMATORS, ids=["central", "forward", "exact"]
)


def _tree():
  draw = normal(0)
  return {"plain": draw(5, 3), "layers": {"stacked": draw(2, 6)}}


@functools.partial(jax.jit, static_argnames="direction")
def _rows(keys, tree, direction):
  """Writes the z of every key out as a row, [Q, d]."""
  write = sampler_lib.Sampler(direction).weighted_sum

  def row(direction_key):
    keys_of_one = keys_lib.DirectionKey(direction_key[None], keys.subspace)
    return ravel(write(tree, keys_of_one, jnp.ones(1)))

  return jax.lax.map(row, keys.direction)


def _directions(estimate, tree, direction):
  return np.array(_rows(estimate.keys, tree, direction), np.float64)


def _hessian(size):
  matrix = np.random.default_rng(1).normal(size=(size, size)) / np.sqrt(size)
  return np.asarray(matrix + matrix.T, np.float32)


@functools.cache
def _estimator(fn, direction, estimator, num_directions, **options):
  """Jits an estimate; cached, so that tests share compilations."""
  return jax.jit(
    functools.partial(
      zo.estimate,
      fn,
      zo=zofo.ZerothOrder(direction, estimator, num_directions),
      **options,
    )
  )


def _linear(tree):
  weights = ravel(_tree())
  return jnp.dot(weights, ravel(tree)) + 1.0


def _quadratic(tree):
  x = ravel(tree)
  return 0.5 * x @ jnp.asarray(_hessian(x.size)) @ x + x.sum()


@pytest.mark.parametrize(
  "direction, estimator",
  [
    (KINDS[0], zo.central),
    *((KINDS[1], estimator) for estimator in ESTIMATORS),
  ],
)
def test_linear_function_is_exact_for_every_eps(direction, estimator):
  tree = jax.tree.map(lambda leaf: leaf / 3, _tree())
  fn = _estimator(_linear, direction, estimator, 3)
  for eps in (1e-3, 1e-1, 1.0, 100.0):
    estimate = fn(tree, jax.random.key(0), eps)
    slope = _directions(estimate, tree, direction) @ flatten(_tree())
    # Sums of 27 float32 products of this size, their rounding over eps.
    size = np.abs(flatten(_tree())) @ np.abs(flatten(tree)) + 1.0
    tolerance = 2.0**-21 * (size / eps + np.abs(flatten(_tree())).sum())
    np.testing.assert_allclose(estimate.coefficients, slope, atol=tolerance)
    assert int(estimate.num_nonfinite) == 0
  # A traced eps: four values, one program.
  assert fn._cache_size() == 1


def test_quadratic_function():
  tree = _tree()
  x = flatten(tree)
  hessian = _hessian(x.size).astype(np.float64)
  eps = 0.25
  got, z = {}, None
  for estimator in ESTIMATORS:
    fn = _estimator(_quadratic, directions.LowRank(2), estimator, 3)
    estimate = fn(tree, jax.random.key(1), eps)
    got[estimator] = np.array(estimate.coefficients)
    z = _directions(estimate, tree, directions.LowRank(2))
  slope = z @ (hessian @ x + 1.0)
  curvature = np.einsum("qi,ij,qj->q", z, hessian, z)
  assert np.all(np.abs(eps / 2 * curvature) > 1e-3)  # the bias is visible
  close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=5e-4)
  close(got[zo.exact], slope)
  close(got[zo.central], slope)
  close(got[zo.forward], slope + eps / 2 * curvature)


@pytest.mark.slow
def test_written_gradient_is_the_mean():
  tree = _tree()
  for direction in (RADEMACHER, directions.PerExample()):
    fn = _estimator(_quadratic, direction, zo.central, 5)
    estimate = fn(tree, jax.random.key(2), 1e-2)
    z = _directions(estimate, tree, direction)
    written = jax.jit(zo.gradient, static_argnums=2)(
      tree, estimate, sampler_lib.Sampler(direction)
    )
    mean = np.mean(np.array(estimate.coefficients)[:, None] * z, axis=0)
    np.testing.assert_allclose(flatten(written), mean, rtol=1e-5, atol=1e-5)


def test_directions_differ_and_follow_the_keys():
  tree = _tree()
  direction = directions.LowRank(2)
  fn = _estimator(_linear, direction, zo.central, 3)
  framed = lambda key, frame: fn(
    tree, jax.random.key(key), 0.1, subspace_key=jax.random.key(frame)
  )
  first, repeated = (framed(3, 0) for _ in range(2))
  np.testing.assert_array_equal(first.coefficients, repeated.coefficients)
  seen = [first, framed(4, 0), framed(3, 1), fn(tree, jax.random.key(3), 0.1)]
  seen = np.concatenate([estimate.coefficients for estimate in seen])
  assert len(np.unique(seen)) == 12
  # Directions of one subspace key, and of one key without any, share V.
  for subspace_key in (jax.random.key(0), None):
    estimate = fn(tree, jax.random.key(3), 0.1, subspace_key=subspace_key)
    z = _directions(estimate, tree, direction)[:, -15:].astype(np.float32)
    assert np.linalg.matrix_rank(z.reshape(-1, 3)) == 2


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
  z = _directions(estimate, tree, direction)
  reach = np.abs(z[:, 0]) if estimator is zo.central else z[:, 0]
  broken = reach > 0.7
  assert 0 < broken.sum() < 20
  assert int(estimate.num_nonfinite) == broken.sum()
  np.testing.assert_array_equal(estimate.coefficients == 0, broken)
  right = np.where(broken, 0, z.sum(axis=1))
  np.testing.assert_allclose(estimate.coefficients, right, rtol=1e-5, atol=1e-6)
  weights = right / (20 - broken.sum())
  np.testing.assert_allclose(
    estimate.mean_coefficients(), weights, rtol=1e-5, atol=1e-6
  )


@estimators
def test_values_and_aux_are_those_of_the_points(estimator):
  def fn(tree):
    x = ravel(tree)
    return jnp.sum(x**2), {"x": x}

  tree = _tree()
  estimate = _estimator(fn, RADEMACHER, estimator, 3, has_aux=True)(
    tree, jax.random.key(6), 0.5
  )
  z = _directions(estimate, tree, RADEMACHER)
  shift = {
    zo.central: 0.5 * np.stack([z, -z], axis=1),
    zo.forward: 0.5 * z[:, None],
    zo.exact: 0 * z[:, None],
  }[estimator]
  points = flatten(tree) + shift
  np.testing.assert_allclose(estimate.aux["x"], points, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(
    estimate.values, (points**2).sum(axis=-1), rtol=1e-5
  )


@pytest.mark.parametrize("estimator", [zo.central, zo.forward])
def test_a_score_without_a_gradient(estimator):
  # The share of right answers: flat almost everywhere, and yet it is climbed.
  rng = np.random.default_rng(4)
  x = rng.normal(size=(200, 5)).astype(np.float32)
  y = np.argmax(x @ rng.normal(size=(5, 3)), axis=1)

  def accuracy(tree):
    return jnp.mean(jnp.argmax(x @ tree["plain"], axis=1) == y)

  tree = {"plain": jnp.zeros((5, 3)) + 0.1 * _tree()["plain"]}
  assert not np.any(jax.grad(accuracy)(tree)["plain"])
  fn = _estimator(accuracy, RADEMACHER, estimator, 8)
  estimate = fn(tree, jax.random.key(8), 0.5)
  z = _directions(estimate, tree, RADEMACHER).reshape(-1, 5, 3)
  at = lambda t: np.mean(
    np.argmax(x @ (np.array(tree["plain"]) + t * z), axis=2) == y, axis=1
  )
  right = (
    (at(0.5) - at(-0.5)) / 1.0
    if estimator is zo.central
    else (at(0.5) - at(0.0)) / 0.5
  )
  np.testing.assert_allclose(estimate.coefficients, right, atol=2 * 0.005)
  sampler = sampler_lib.Sampler(RADEMACHER)

  @jax.jit
  def climb(i, tree):
    estimate = fn(tree, jax.random.key(i), 0.3)
    return sampler.apply_directions(
      tree, estimate.keys, 0.3 * estimate.mean_coefficients()
    )

  climbed = jax.jit(lambda tree: jax.lax.fori_loop(0, 200, climb, tree))(tree)
  assert accuracy(climbed) > accuracy(tree) + 0.2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_thousand_probes_leave_the_weights_as_they_are(dtype):
  sampler = sampler_lib.Sampler(RADEMACHER)
  tree = jax.tree.map(lambda leaf: leaf.astype(dtype), _tree())

  def probe(index, carry):
    tree, total = carry
    key = jax.random.fold_in(jax.random.key(7), index)
    fn = lambda tree: _linear(jax.tree.map(jnp.float32, tree))
    estimate = zo.estimate(fn, tree, key, 1e-3, zofo.ZerothOrder(sampler))
    # lr 0: the probes and the write, but no step.
    tree = sampler.apply_directions(
      tree, estimate.keys, 0.0 * estimate.coefficients, rounding_key=key
    )
    return tree, total + jnp.abs(estimate.coefficients[0])

  after, total = jax.jit(
    lambda tree: jax.lax.fori_loop(0, 1000, probe, (tree, 0.0))
  )(tree)
  assert float(total) > 100.0
  bits = lambda leaf: np.array(leaf).view(np.uint8)
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), after, tree
  )
