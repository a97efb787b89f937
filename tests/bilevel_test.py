"""The bilevel step against a float64 transcription and closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import zofo_jax as zofo
from zofo_jax import directions, outer, zo

D, ROWS, T = 8, 8, 3
SAMPLER = directions.Sampler(directions.Rademacher())


@jax.custom_jvp
def _guard(x):
  return x


@_guard.defjvp
def _guard_jvp(primals, tangents):
  raise AssertionError("theta was differentiated")


def _loss(base, adapter, batch, key):
  """Weighted squares of x (w_0 + w_1 a) + c b - y, coupling both levels."""
  del key
  x, y, weight = batch
  w, c = _guard(base["layers"]["w"]), _guard(base["c"])
  residual = x @ (w[0] + w[1] * adapter["a"]) + c * adapter["b"] - y
  return jnp.sum(weight * residual**2) / jnp.sum(weight)


def _numpy_loss(base, adapter, batch):
  """Returns the loss and its gradient by the adapter, derived by hand."""
  x, y, weight = batch
  w, c = base["layers"]["w"], base["c"]
  residual = x @ (w[0] + w[1] * adapter["a"]) + c * adapter["b"] - y
  weight = weight / weight.sum()
  slope = 2 * weight * residual
  gradient = {"a": w[1] * (x.T @ slope), "b": c * slope.sum()}
  return np.sum(weight * residual**2), gradient


def _draw(seed):
  rng = np.random.default_rng(seed)
  return lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)


def _start():
  draw = _draw(0)
  base = {"layers": {"w": draw(2, D)}, "c": draw()}
  upper, lower = ({"a": draw(D), "b": draw()} for _ in range(2))
  return jax.random.key(11), base, upper, lower


def _batch(seed=0, rows=ROWS):
  draw = _draw(100 + seed)
  make = lambda *lead: (draw(*lead, D), draw(*lead), jnp.ones(lead))
  return zofo.BilevelBatch(
    lower=make(T, ROWS), penalty=make(ROWS), upper=make(rows)
  )


def _remember_keys(tx, num_directions):
  """Keeps the keys of the last estimate in the state, for the slow path."""
  tx = outer.as_outer(tx)
  blank = jax.random.split(jax.random.key(0), num_directions)

  def update(base, state, estimate, sampler):
    base, state = tx.update(base, state[0], estimate, sampler)
    return base, (state, estimate.keys)

  return outer.OuterTransform(lambda base: (tx.init(base), blank), update)


def _algorithm(loss=_loss, upper_loss=None, **options):
  defaults = {
    "lower_tx": optax.adam(3e-2),
    "upper_tx": optax.adam(1e-2),
    "base_tx": outer.sgd(1e-2),
    "sampler": SAMPLER,
  }
  return zofo.make_bilevel_step(loss, upper_loss, **(defaults | options))


@functools.cache
def _plain():
  """The algorithm most tests share, with one jitted step."""
  algorithm = _algorithm()
  return algorithm, jax.jit(algorithm.step)


def _close(left, right, rtol=1e-5, atol=1e-5):
  assert jax.tree.structure(left) == jax.tree.structure(right)

  def check(a, b):
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)

  jax.tree.map(check, left, right)


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


@functools.partial(jax.jit, static_argnums=2)
def _unit(key, tree, sampler):
  zeros = jax.tree.map(jnp.zeros_like, tree)
  return sampler.add(zeros, key[None], jnp.ones(1))


@pytest.mark.parametrize(
  "estimator, num_directions, theta, direction",
  [
    (zo.central, 1, "sgd", directions.Rademacher()),
    (zo.central, 3, "adam", directions.Gaussian()),
    (zo.forward, 1, "adam", directions.Rademacher()),
    (zo.forward, 3, "sgd", directions.Rademacher()),
  ],
)
def test_iteration_equals_the_transcription(
  estimator, num_directions, theta, direction
):
  eps, penalty = 0.05, 3.0
  sampler = directions.Sampler(direction)
  fast, slow = {
    "sgd": (outer.sgd(1e-2), _slow_sgd(1e-2)),
    "adam": (optax.adam(1e-2), _slow_adam(1e-2)),
  }[theta]
  algorithm = _algorithm(
    base_tx=_remember_keys(fast, num_directions),
    estimator=estimator,
    num_directions=num_directions,
    sampler=sampler,
    upper_tx=optax.sgd(2e-2),
  )
  state = algorithm.init(*_start())
  step = jax.jit(algorithm.step)

  base, p, s = _float64(_start()[1:])
  s_init, s_update = _slow_adam(3e-2)
  p_init, p_update = _slow_sgd(2e-2)
  base_init, base_update = slow
  s_state, p_state, base_state = s_init(s), p_init(p), base_init(base)

  for iteration in range(3):
    batch = _batch(iteration)
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
    def objective(base, p=p, s=s, rows=rows):
      return _numpy_loss(base, p, rows.upper)[0] + penalty * (
        _numpy_loss(base, p, rows.penalty)[0]
        - _numpy_loss(base, s, rows.penalty)[0]
      )

    keys = state.base_opt[1]
    coefficients, values = [], []
    estimate = jax.tree.map(np.zeros_like, base)
    for q in range(num_directions):
      z = _float64(_unit(keys[q], _start()[1], sampler))
      at = lambda t, z=z, base=base: objective(
        jax.tree.map(lambda x, z: x + t * z, base, z)
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
      _close(got, expected, rtol=1e-4, atol=1e-4)
    _close(state.base, base, rtol=1e-4, atol=1e-4)
  assert int(state.step) == 3


# --- A bilevel quadratic -----------------------------------------------------
#
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
  algorithm = _algorithm(
    _quadratic_lower,
    _quadratic_upper,
    lower_tx=optax.sgd(1.0),  # one step to s = A theta
    base_tx=_remember_keys(outer.sgd(0.0), num_directions),
    num_directions=num_directions,
    sampler=directions.Sampler(directions.Gaussian()),
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
    z = [
      _unit(key, theta, directions.Sampler(directions.Gaussian()))
      for key in state.base_opt[1]
    ]
    gradient, *_ = np.linalg.lstsq(np.array(z), np.array(info.coefficients))
    errors.append((1 + penalty) * np.linalg.norm(gradient - hyper_gradient))
  np.testing.assert_allclose(errors, np.linalg.norm(slope), rtol=0.02)


def test_converges_to_the_bilevel_solution():
  def run(penalty):
    algorithm = _algorithm(
      _quadratic_lower,
      _quadratic_upper,
      lower_tx=optax.sgd(1.0),
      upper_tx=optax.sgd(1 / (1 + penalty)),  # one step to p's optimum
      base_tx=outer.sgd(0.02),
      num_directions=4,
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


# --- Contracts of the program ------------------------------------------------


def test_theta_is_never_differentiated():
  # The guard in _loss raises if it is; `exact` proves that it would.
  algorithm, _ = _plain()
  state = algorithm.init(*_start())
  jax.eval_shape(algorithm.step, state, _batch(), zofo.BilevelHParams())
  exact = _algorithm(estimator=zo.exact)
  with pytest.raises(AssertionError, match="theta"):
    jax.eval_shape(exact.step, state, _batch(), zofo.BilevelHParams())


def test_shapes_and_dtypes_are_stable():
  algorithm, _ = _plain()
  state = algorithm.init(*_start())
  after, info = jax.eval_shape(
    algorithm.step, state, _batch(), zofo.BilevelHParams()
  )
  assert jax.tree.structure(after) == jax.tree.structure(state)
  jax.tree.map(
    lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(),
    after,
    state,
  )
  assert info.lower_loss.shape == (T,)
  assert info.coefficients.shape == (1,)
  for leaf in jax.tree.leaves(info):
    assert leaf.dtype in (jnp.float32, jnp.int32)


def test_nothing_is_compiled_twice_and_the_state_is_donated():
  hyper = optax.inject_hyperparams(optax.adam)
  algorithm = _algorithm(
    lower_tx=hyper(learning_rate=3e-2), upper_tx=hyper(learning_rate=1e-2)
  )
  step = jax.jit(algorithm.step, donate_argnums=0)
  first = algorithm.init(*_start())
  state, _ = step(first, _batch(), zofo.BilevelHParams(1e-2, 1.0))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
  state, _ = step(state, _batch(1), zofo.BilevelHParams(1e-3, 1e4))

  def with_rate(opt_state, rate):
    rate = {"learning_rate": jnp.float32(rate)}
    return opt_state._replace(hyperparams=opt_state.hyperparams | rate)

  before = jax.tree.map(np.array, (state.base, state.upper, state.lower))
  state = state._replace(
    lower_opt=with_rate(state.lower_opt, 0.0),
    upper_opt=with_rate(state.upper_opt, 0.0),
    base_opt=state.base_opt._replace(learning_rate=jnp.float32(0.0)),
  )
  state, _ = step(state, _batch(2), zofo.BilevelHParams(1e-1, 2.0))
  assert step._cache_size() == 1
  # The rates of zero were obeyed.
  jax.tree.map(
    np.testing.assert_array_equal,
    before,
    (state.base, state.upper, state.lower),
  )


def test_scan_equals_calls():
  algorithm, step = _plain()
  batches = [_batch(seed) for seed in range(4)]
  hparams = zofo.BilevelHParams(0.05, 2.0)
  state = algorithm.init(*_start())
  infos = []
  for batch in batches:
    state, info = step(state, batch, hparams)
    infos.append(info)
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
  scanned, scanned_infos = jax.jit(
    lambda state, batches: jax.lax.scan(
      lambda s, b: algorithm.step(s, b, hparams), state, batches
    )
  )(algorithm.init(*_start()), stacked)
  _close(scanned, state, rtol=1e-4, atol=1e-4)
  infos = jax.tree.map(lambda *leaves: jnp.stack(leaves), *infos)
  _close(scanned_infos, infos, rtol=1e-3, atol=1e-3)


def test_vmap_over_penalties():
  algorithm, step = _plain()
  state = algorithm.init(*_start())
  penalties = [0.0, 1.0, 10.0]
  states, _ = jax.jit(
    jax.vmap(algorithm.step, in_axes=(None, None, zofo.BilevelHParams(None, 0)))
  )(state, _batch(), zofo.BilevelHParams(0.05, jnp.array(penalties)))
  for i, penalty in enumerate(penalties):
    alone, _ = step(state, _batch(), zofo.BilevelHParams(0.05, penalty))
    got = jax.tree.map(lambda leaf, i=i: leaf[i], states)
    _close(got, alone, rtol=1e-4, atol=1e-4)


def test_batches_of_unequal_shape():
  # The upper batch of 5 rows, and the same padded to 8 by rows of weight 0.
  algorithm, step = _plain()
  short = _batch(rows=5)
  pad = lambda leaf: jnp.concatenate(
    [leaf, jnp.zeros((ROWS - 5, *leaf.shape[1:]))]
  )
  padded = short._replace(upper=jax.tree.map(pad, short.upper))
  hparams = zofo.BilevelHParams(0.05, 2.0)
  one = step(algorithm.init(*_start()), short, hparams)
  other = step(algorithm.init(*_start()), padded, hparams)
  _close(one, other, rtol=1e-4, atol=1e-4)


def test_two_functions_of_one_loss():
  # A second function of the same values: separate calls, the same step.
  algorithm, step = _plain()
  twin = _algorithm(_loss, lambda *arguments: _loss(*arguments))
  hparams = zofo.BilevelHParams(0.05, 2.0)
  one = step(algorithm.init(*_start()), _batch(), hparams)
  other = jax.jit(twin.step)(twin.init(*_start()), _batch(), hparams)
  _close(one, other, rtol=1e-4, atol=1e-4)


def test_keys_reach_first_order_losses_only():
  seen = []

  def loss(base, adapter, batch, key):
    seen.append(key is None)
    return _loss(base, adapter, batch, key)

  algorithm = _algorithm(loss)
  state = algorithm.init(*_start())
  jax.eval_shape(algorithm.step, state, _batch(), zofo.BilevelHParams())
  # Traced in order: with keys for s and p, then without for theta.
  assert True in seen and False in seen
  assert seen == sorted(seen)


def test_a_broken_objective_moves_no_weight():
  algorithm, step = _plain()
  state = algorithm.init(*_start())
  x, y, weight = _batch().upper
  batch = _batch()._replace(upper=(x, y.at[0].set(jnp.nan), weight))
  after, info = step(state, batch, zofo.BilevelHParams())
  assert int(info.num_nonfinite) == 1
  _close(after.base, state.base, rtol=0, atol=0)


def test_mesh_equals_one_device():
  mesh = jax.make_mesh(
    (4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2
  )
  place = lambda tree, *axes: jax.device_put(
    tree, NamedSharding(mesh, P(*axes))
  )
  eps, penalty = 0.05, 2.0
  tx = _remember_keys(outer.sgd(1e-2), 2)
  algorithm = _algorithm(base_tx=tx, num_directions=2)
  step = jax.jit(algorithm.step)
  hparams = zofo.BilevelHParams(eps, penalty)
  one, one_info = step(algorithm.init(*_start()), _batch(), hparams)

  key, base, upper, lower = _start()
  base = {
    "layers": {"w": place(base["layers"]["w"], None, "model")},
    "c": place(base["c"]),
  }
  state = algorithm.init(place(key), base, place(upper), place(lower))
  batch = _batch()
  batch = zofo.BilevelBatch(
    lower=place(batch.lower, None, "data"),
    penalty=place(batch.penalty, "data"),
    upper=place(batch.upper, "data"),
  )
  many, many_info = step(state, batch, hparams)
  np.testing.assert_array_equal(
    *(jax.random.key_data(state.base_opt[1]) for state in (one, many))
  )
  # Sums in another order: a few ulps of each loss, then over eps.
  scale = float(one_info.upper_loss + 2 * penalty * one_info.penalty_loss)
  atol = 8 * 2.0**-23 * scale / eps
  _close(many_info.coefficients, one_info.coefficients, rtol=0, atol=atol)
  _close(many.base, one.base, rtol=1e-6, atol=1e-2 * atol)
  _close((many.upper, many.lower), (one.upper, one.lower))
