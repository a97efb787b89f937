"""The bilevel step as a program: shapes, keys, scans, meshes, donation."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import zofo_jax as zofo
from tests.core import bilevel_problem as problem
from tests.core.problems import SAMPLER, STACKED
from zofo_jax.core import directions, outer, perturbed, sampler, zo


@functools.cache
def _plain():
  """The algorithm most tests share, with one jitted step."""
  algorithm = problem.make_algorithm()
  return algorithm, jax.jit(algorithm.step)


def test_theta_is_never_differentiated():
  # The loss raises if it is; `exact` proves that it would.
  algorithm, _ = _plain()
  state = algorithm.init(*problem.start())
  jax.eval_shape(
    algorithm.step, state, problem.make_batch(), zofo.BilevelHParams()
  )
  exact = problem.make_algorithm(zo=zofo.ZerothOrder(SAMPLER, zo.exact))
  with pytest.raises(AssertionError, match="theta"):
    jax.eval_shape(
      exact.step, state, problem.make_batch(), zofo.BilevelHParams()
    )


def test_shapes_and_dtypes_are_stable():
  algorithm, _ = _plain()
  state = algorithm.init(*problem.start())
  after, info = jax.eval_shape(
    algorithm.step, state, problem.make_batch(), zofo.BilevelHParams()
  )
  assert jax.tree.structure(after) == jax.tree.structure(state)
  jax.tree.map(
    lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(),
    after,
    state,
  )
  assert info.lower_loss.shape == (problem.T,)
  assert info.coefficients.shape == (1,)
  for leaf in jax.tree.leaves(info):
    assert leaf.dtype in (jnp.float32, jnp.int32)


def test_nothing_is_compiled_twice_and_the_state_is_donated():
  hyper = optax.inject_hyperparams(optax.adam)
  algorithm = problem.make_algorithm(
    lower_tx=hyper(learning_rate=3e-2), upper_tx=hyper(learning_rate=1e-2)
  )
  step = jax.jit(algorithm.step, donate_argnums=0)
  first = algorithm.init(*problem.start())
  state, _ = step(first, problem.make_batch(), zofo.BilevelHParams(1e-2, 1.0))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
  state, _ = step(state, problem.make_batch(1), zofo.BilevelHParams(1e-3, 1e4))

  def with_rate(opt_state, rate):
    rate = {"learning_rate": jnp.float32(rate)}
    return opt_state._replace(hyperparams=opt_state.hyperparams | rate)

  before = jax.tree.map(np.array, (state.base, state.upper, state.lower))
  state = state._replace(
    lower_opt=with_rate(state.lower_opt, 0.0),
    upper_opt=with_rate(state.upper_opt, 0.0),
    base_opt=state.base_opt._replace(learning_rate=jnp.float32(0.0)),
  )
  state, _ = step(state, problem.make_batch(2), zofo.BilevelHParams(1e-1, 2.0))
  assert step._cache_size() == 1
  # The rates of zero were obeyed.
  jax.tree.map(
    np.testing.assert_array_equal,
    before,
    (state.base, state.upper, state.lower),
  )


def test_scan_equals_calls():
  algorithm, step = _plain()
  batches = [problem.make_batch(seed) for seed in range(4)]
  hparams = zofo.BilevelHParams(0.05, 2.0)
  state = algorithm.init(*problem.start())
  infos = []
  for batch in batches:
    state, info = step(state, batch, hparams)
    infos.append(info)
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
  scanned, scanned_infos = jax.jit(
    lambda state, batches: jax.lax.scan(
      lambda s, b: algorithm.step(s, b, hparams), state, batches
    )
  )(algorithm.init(*problem.start()), stacked)
  problem.assert_close(scanned, state, rtol=1e-4, atol=1e-4)
  infos = jax.tree.map(lambda *leaves: jnp.stack(leaves), *infos)
  problem.assert_close(scanned_infos, infos, rtol=1e-3, atol=1e-3)


def test_vmap_over_penalties():
  algorithm, step = _plain()
  state = algorithm.init(*problem.start())
  penalties = [0.0, 1.0, 10.0]
  states, _ = jax.jit(
    jax.vmap(algorithm.step, in_axes=(None, None, zofo.BilevelHParams(None, 0)))
  )(
    state, problem.make_batch(), zofo.BilevelHParams(0.05, jnp.array(penalties))
  )
  for i, penalty in enumerate(penalties):
    alone, _ = step(
      state, problem.make_batch(), zofo.BilevelHParams(0.05, penalty)
    )
    got = jax.tree.map(lambda leaf, i=i: leaf[i], states)
    problem.assert_close(got, alone, rtol=1e-4, atol=1e-4)


def test_batches_of_unequal_shape():
  # The upper batch of 5 rows, and the same padded to 8 by rows of weight 0.
  algorithm, step = _plain()
  short = problem.make_batch(rows=5)
  pad = lambda leaf: jnp.concatenate(
    [leaf, jnp.zeros((problem.ROWS - 5, *leaf.shape[1:]))]
  )
  padded = short._replace(upper=jax.tree.map(pad, short.upper))
  hparams = zofo.BilevelHParams(0.05, 2.0)
  expected = step(algorithm.init(*problem.start()), short, hparams)
  other = step(algorithm.init(*problem.start()), padded, hparams)
  problem.assert_close(expected, other, rtol=1e-4, atol=1e-4)


def test_two_functions_of_one_loss():
  # A second function of the same values: separate calls, the same step.
  algorithm, step = _plain()
  twin = problem.make_algorithm(
    problem.loss, lambda *arguments: problem.loss(*arguments)
  )
  hparams = zofo.BilevelHParams(0.05, 2.0)
  expected = step(
    algorithm.init(*problem.start()), problem.make_batch(), hparams
  )
  other = jax.jit(twin.step)(
    twin.init(*problem.start()), problem.make_batch(), hparams
  )
  problem.assert_close(expected, other, rtol=1e-4, atol=1e-4)


def test_keys_reach_first_order_losses_only():
  seen = []

  def loss(base, adapter, batch, key):
    seen.append(key is None)
    return problem.loss(base, adapter, batch, key)

  algorithm = problem.make_algorithm(loss)
  state = algorithm.init(*problem.start())
  jax.eval_shape(
    algorithm.step, state, problem.make_batch(), zofo.BilevelHParams()
  )
  # Traced in order: with keys for s and p, then without for theta.
  assert True in seen and False in seen
  assert seen == sorted(seen)


def test_a_broken_objective_moves_no_weight():
  algorithm, step = _plain()
  state = algorithm.init(*problem.start())
  x, y, weight = problem.make_batch().upper
  batch = problem.make_batch()._replace(upper=(x, y.at[0].set(jnp.nan), weight))
  after, info = step(state, batch, zofo.BilevelHParams())
  assert int(info.num_nonfinite) == 1
  problem.assert_close(after.base, state.base, rtol=0, atol=0)


def test_a_broken_gradient_of_p_moves_no_weight():
  def loss(base, adapter, batch, key):
    # At p alone: sqrt has no slope at zero, and p starts there.
    return problem.loss(base, adapter, batch, key) + jnp.sqrt(
      adapter["b"] * 0.0
    )

  algorithm = problem.make_algorithm(problem.loss, loss)
  state = algorithm.init(*problem.start())
  after, info = algorithm.step(
    state, problem.make_batch(), zofo.BilevelHParams()
  )
  assert np.isfinite(info.objective) and not np.isfinite(info.upper_grad_norm)
  assert int(info.num_nonfinite) == 1
  problem.assert_close(after.base, state.base, rtol=0, atol=0)


def test_no_stacked_weight_is_copied():
  key, base, upper, lower = problem.start()
  # Deep enough that a copy of all layers stands out.
  base["layers"]["w"] = jnp.ones((300, problem.D))

  def loss(base, adapter, batch, key):
    del key
    x, y, weight = batch
    scale = lambda x, w: (x * perturbed.read(w)[None], None)
    x, _ = jax.lax.scan(scale, x * adapter["a"][None], base["layers"]["w"])
    residual = jnp.sum(x, axis=-1) + adapter["b"] - y
    return jnp.sum(weight * residual**2) / jnp.sum(weight)

  lazy = sampler.Sampler(directions.Rademacher(), lazy=True, stacked=STACKED)
  algorithm = problem.make_algorithm(loss, zo=zofo.ZerothOrder(lazy))
  state = algorithm.init(key, base, upper, lower)
  step = jax.jit(algorithm.step, donate_argnums=0)
  lowered = step.lower(state, problem.make_batch(), zofo.BilevelHParams())
  text, shape = lowered.compile().as_text(), f"f32[300,{problem.D}]"
  assert shape in text
  assert not re.findall(rf"= {re.escape(shape)}\S* copy\(", text)


@pytest.mark.many_devices
@pytest.mark.slow
def test_mesh_equals_one_device():
  mesh = jax.make_mesh(
    (4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2
  )
  place = lambda tree, *axes: jax.device_put(
    tree, NamedSharding(mesh, P(*axes))
  )
  eps, penalty = 0.05, 2.0
  tx = problem.remember_keys(outer.sgd(1e-2), 2)
  algorithm = problem.make_algorithm(
    base_tx=tx, zo=zofo.ZerothOrder(SAMPLER, num_directions=2)
  )
  step = jax.jit(algorithm.step)
  hparams = zofo.BilevelHParams(eps, penalty)
  expected, expected_info = step(
    algorithm.init(*problem.start()), problem.make_batch(), hparams
  )

  key, base, upper, lower = problem.start()
  base = {
    "layers": {"w": place(base["layers"]["w"], None, "model")},
    "c": place(base["c"]),
  }
  state = algorithm.init(place(key), base, place(upper), place(lower))
  batch = problem.make_batch()
  batch = zofo.BilevelBatch(
    lower=place(batch.lower, None, "data"),
    penalty=place(batch.penalty, "data"),
    upper=place(batch.upper, "data"),
  )
  many, many_info = step(state, batch, hparams)
  for part in (0, 1):
    np.testing.assert_array_equal(
      *(jax.random.key_data(s.base_opt[1][part]) for s in (expected, many))
    )
  # Sums in another order: a few ulps of each loss, then over eps.
  scale = float(
    expected_info.upper_loss + 2 * penalty * expected_info.penalty_loss
  )
  atol = 8 * 2.0**-23 * scale / eps
  problem.assert_close(
    many_info.coefficients, expected_info.coefficients, rtol=0, atol=atol
  )
  problem.assert_close(many.base, expected.base, rtol=1e-6, atol=1e-2 * atol)
  problem.assert_close(
    (many.upper, many.lower), (expected.upper, expected.lower)
  )
