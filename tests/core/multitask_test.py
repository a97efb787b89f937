"""Many tasks in one step: against single tasks, and a known optimum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core

import zofo_jax as zofo
from tests.core.problems import normal
from zofo_jax.core import baselines, directions, multitask, outer, zo

D, ROWS, T, M = 6, 4, 3, 3
LAM = 2.0
HPARAMS = zofo.BilevelHParams(0.05, LAM)


def _loss(base, adapter, batch, key):
  """Squares of x (w + a) v - y; the key, if there is one, drops inputs."""
  x, y = batch
  if key is not None:
    x = x * jax.random.bernoulli(key, 0.7, x.shape)
  return jnp.mean(((x @ (base["w"] + adapter["a"])) @ base["v"] - y) ** 2)


def _base():
  draw = normal(0)
  return {"w": draw(D, 5), "v": draw(5)}


def _adapters(seed, *lead):
  return {"a": normal(seed)(*lead, D, 5)}


def _batch(*lead, seed=0, weights=None):
  draw = normal(100 + seed)
  make = lambda *axes: (draw(*lead, *axes, D), draw(*lead, *axes))
  return zofo.BilevelBatch(make(T, ROWS), make(ROWS), make(ROWS), weights)


def _algorithm(loss=_loss, over_tasks=True, **options):
  defaults = {
    "lower_tx": optax.chain(optax.clip_by_global_norm(0.5), optax.adam(3e-2)),
    "upper_tx": optax.adam(1e-2),
    "base_tx": outer.sgd(1e-3),
    "zo": zofo.ZerothOrder(directions.Rademacher()),
  }
  return zofo.make_bilevel_step(
    loss, over_tasks=over_tasks, **(defaults | options)
  )


def _no_key(base, adapter, batch, key):
  del key
  return _loss(base, adapter, batch, None)


_PER_EXAMPLE = {
  "zo": zofo.ZerothOrder(directions.PerExample(), per_example=True)
}


@pytest.mark.parametrize(
  "weights, options", [(None, {}), ((3.0, 1.0, 0.5), _PER_EXAMPLE)]
)
def test_tasks_together_are_tasks_alone(weights, options):
  # The tasks' keys differ from a lone one's, so here nothing reads them.
  over_tasks, alone = (
    _algorithm(_no_key, over_tasks=over, **options) for over in (True, False)
  )
  uppers, lowers = _adapters(1, M), _adapters(2, M)
  weights = weights and jnp.array(weights)
  batch = _batch(M, weights=weights)
  key = jax.random.key(3)
  state, info = jax.jit(over_tasks.step)(
    over_tasks.init(key, _base(), uppers, lowers), batch, HPARAMS
  )
  one_step = jax.jit(alone.step)
  coefficients = []
  for i in range(M):
    pick = lambda tree, i=i: jax.tree.map(lambda leaf: leaf[i], tree)
    expected, expected_info = one_step(
      alone.init(key, _base(), pick(uppers), pick(lowers)),
      pick(batch._replace(weights=None)),
      HPARAMS,
    )
    # Adam's first moments are the (clipped) gradients.
    for name in ("upper", "lower", "upper_opt", "lower_opt"):
      jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        pick(getattr(state, name)),
        getattr(expected, name),
      )
    for name in ("lower_loss", "upper_loss", "penalty_loss", "upper_grad_norm"):
      np.testing.assert_allclose(
        getattr(info, name)[i], getattr(expected_info, name), rtol=1e-5
      )
    coefficients.append(expected_info.coefficients)
  mean = np.average(coefficients, axis=0, weights=weights)
  assert np.ptp(coefficients, axis=0).min() > 0.5
  np.testing.assert_allclose(info.coefficients, mean, rtol=1e-3, atol=1e-3)


def test_one_task_is_the_single_task_step_bit_for_bit():
  with_axis, without = _algorithm(), _algorithm(over_tasks=False)
  key, upper, lower = jax.random.key(3), _adapters(1), _adapters(2)
  lift = functools.partial(jax.tree.map, lambda leaf: leaf[None])
  state = without.init(key, _base(), upper, lower)
  many = with_axis.init(key, _base(), lift(upper), lift(lower))
  alone, over_tasks = jax.jit(without.step), jax.jit(with_axis.step)
  for seed in range(2):
    batch = _batch(seed=seed)
    state, info = alone(state, batch, HPARAMS)
    many, many_info = over_tasks(many, lift(batch), HPARAMS)
  expected = state._replace(
    **{
      name: lift(getattr(state, name))
      for name in ("upper", "lower", "upper_opt", "lower_opt")
    }
  )
  data = lambda s: jax.tree.leaves(s._replace(key=jax.random.key_data(s.key)))
  for got, want in zip(data(many), data(expected), strict=True):
    np.testing.assert_array_equal(got, want)
  np.testing.assert_array_equal(many_info.coefficients, info.coefficients)
  np.testing.assert_array_equal(many_info.lower_loss[0], info.lower_loss)


def _shapes(jaxpr):
  """Yields the shapes of all floats of a program, inner ones included."""
  for equation in jaxpr.eqns:
    for variable in equation.outvars:
      if jnp.issubdtype(variable.aval.dtype, jnp.floating):
        yield variable.aval.shape
    for value in jax.tree.leaves(
      equation.params, is_leaf=lambda x: isinstance(x, core.ClosedJaxpr)
    ):
      if isinstance(value, core.ClosedJaxpr):
        yield from _shapes(value.jaxpr)
      elif isinstance(value, core.Jaxpr):
        yield from _shapes(value)


def test_a_perturbed_weight_is_formed_once_for_all_tasks():
  count = 7
  args = (jax.random.key(0), _base(), _adapters(1, count), _adapters(2, count))

  def tasks_of_weights(step, state):
    # The adapters, which do have the axis, are kept out by another shape.
    shapes = _shapes(jax.make_jaxpr(step)(state, _batch(count), HPARAMS).jaxpr)
    return {shape for shape in shapes if shape[-2:] == (D, 5)} & {
      (count, 2, D, 5),
      (2, count, D, 5),
      (count, D, 5),
    }

  def loss(base, adapter, batch, key):
    x, y = batch
    base_part = x @ base["w"] @ base["v"]
    return jnp.mean((base_part + x @ adapter["a"] - y) ** 2)

  args = (args[0], args[1], *({"a": normal(i)(count, D)} for i in (1, 2)))
  over_tasks = _algorithm(loss)
  state = over_tasks.init(*args)
  assert not tasks_of_weights(over_tasks.step, state)
  # What it looks like when it is not so.
  alone = _algorithm(loss, over_tasks=False)
  axes = zofo.BilevelState(None, None, 0, 0, None, 0, 0, None)
  separately = jax.vmap(alone.step, (axes, 0, None))
  assert tasks_of_weights(separately, state)


# Tasks of the family: |s - A theta|^2 / 2 below, |p - b|^2 / 2 +
# rho |theta - d|^2 / 2 above. The penalised objective at its optimal p and s
# has the gradient c mean A^T (A theta - b) + rho (theta - d), c = lam/(1+lam).
RHO, FAMILY = 0.5, 5


def _family():
  draw = normal(9)
  return draw(FAMILY, 4, 3) / 2, draw(FAMILY, 4), draw(3)


def _family_lower(theta, adapter, batch, key):
  return 0.5 * jnp.sum((adapter - batch[0] @ theta) ** 2)


def _family_upper(theta, adapter, batch, key):
  anchor = _family()[2]
  return 0.5 * jnp.sum((adapter - batch[1]) ** 2) + 0.5 * RHO * jnp.sum(
    (theta - anchor) ** 2
  )


def _optimum(weights=None):
  a, b, anchor = (np.asarray(x, np.float64) for x in _family())
  c = LAM / (1 + LAM)
  mean = lambda x: np.average(x, axis=0, weights=weights)
  matrix = c * mean(np.einsum("mij,mik->mjk", a, a)) + RHO * np.eye(3)
  return np.linalg.solve(
    matrix, c * mean(np.einsum("mij,mi->mj", a, b)) + RHO * anchor
  )


def _descend(step, state, batch, steps):
  def body(state, _):
    return step(state, batch, HPARAMS)[0], None

  return jax.jit(lambda s: jax.lax.scan(body, s, None, steps)[0])(state)


def test_a_family_of_quadratic_tasks_is_solved():
  a, b, _ = _family()
  weights = jnp.arange(1.0, FAMILY + 1)
  rows = (a, b)
  batch = zofo.BilevelBatch(
    jax.tree.map(lambda leaf: leaf[:, None], rows), rows, rows, weights
  )
  algorithm = zofo.make_bilevel_step(
    _family_lower,
    _family_upper,
    lower_tx=optax.sgd(1.0),  # one step to s = A theta
    upper_tx=optax.sgd(1 / (1 + LAM)),  # and to the best p
    base_tx=outer.sgd(0.1),
    zo=zofo.ZerothOrder(directions.Rademacher(), num_directions=2),
    over_tasks=True,
  )
  zeros = jnp.zeros((FAMILY, 4))
  start = algorithm.init(jax.random.key(0), jnp.zeros(3), zeros, zeros)
  state = _descend(algorithm.step, start, batch, 600)
  optimum = _optimum(weights)
  assert np.abs(optimum - _optimum()).max() > 0.02
  np.testing.assert_allclose(state.base, optimum, atol=1e-3)

  # First order: the same penalised mean, its gradient by backpropagation.
  def mean(theta):
    def of_task(a, b):
      s, rows = a @ theta, (a, b)
      s = jax.lax.stop_gradient(s)
      p = jax.lax.stop_gradient((b + LAM * s) / (1 + LAM))
      lower = functools.partial(_family_lower, theta, batch=rows, key=None)
      gap = lower(adapter=p) - lower(adapter=s)
      return _family_upper(theta, p, rows, None) + LAM * gap

    return jnp.average(jax.vmap(of_task)(a, b), weights=weights)

  theta = jax.lax.fori_loop(
    0, 600, lambda _, x: x - 0.1 * jax.grad(mean)(x), jnp.zeros(3)
  )
  np.testing.assert_allclose(theta, state.base, atol=1e-3)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_tasks_are_drawn_as_often_as_they_should(power):
  sizes, count, draws = (10, 20, 40, 80, 400), 3, 3000
  seen = np.zeros(len(sizes))
  for step in range(draws):
    tasks = multitask.sample_tasks(1, step, sizes, count, power=power)
    assert len(set(tasks.tolist())) == count
    assert tasks.tolist() == sorted(tasks.tolist())
    seen[tasks] += 1
  chances = multitask.inclusion_probabilities(sizes, count, power)
  assert chances.sum() == pytest.approx(count)
  error = np.sqrt(chances * (1 - chances) / draws)
  assert (np.abs(seen / draws - chances) <= 4 * error + 1e-9).all()
  if power == 0.0:
    np.testing.assert_allclose(chances, count / len(sizes))
  if power == 1.0:  # two take part always, and one of the three others
    np.testing.assert_allclose(chances, [1 / 7, 2 / 7, 4 / 7, 1.0, 1.0])


def test_tasks_are_a_function_of_seed_and_step():
  draw = lambda seed: [
    multitask.sample_tasks(seed, step, [1] * 50, 4).tolist()
    for step in range(8)
  ]
  assert draw(0) == draw(0)
  assert draw(0) != draw(1)
  assert len({tuple(tasks) for tasks in draw(0)}) > 4
  with pytest.raises(ValueError, match="expected 1 to 3"):
    multitask.sample_tasks(0, 0, [1, 1, 1], 4)


@pytest.mark.parametrize("memory", ["host", "device"])
def test_only_sampled_tasks_move(memory):
  count, tasks = 5, np.array([1, 4])
  algorithm = _algorithm()
  state = algorithm.init(
    jax.random.key(0), _base(), _adapters(1, count), _adapters(2, count)
  )
  names = ("upper", "lower", "upper_opt", "lower_opt")
  before = {n: jax.tree.map(np.array, getattr(state, n)) for n in names}
  if memory == "host":
    state = state._replace(
      **{n: jax.tree.map(np.array, getattr(state, n)) for n in names}
    )
  moved, _ = jax.jit(algorithm.step)(
    multitask.gather_tasks(state, tasks), _batch(2), HPARAMS
  )
  after = multitask.scatter_tasks(state, tasks, moved)
  assert int(after.step) == 1
  others = np.array([0, 2, 3])
  for name in names:
    for new, old, updated in zip(
      *map(jax.tree.leaves, (getattr(after, name), before[name])),
      jax.tree.leaves(getattr(moved, name)),
      strict=True,
    ):
      assert isinstance(new, np.ndarray) == (memory == "host")
      np.testing.assert_array_equal(new[others], old[others])
      np.testing.assert_array_equal(new[tasks], updated)
      assert (np.asarray(new[tasks]) != old[tasks]).any()


@pytest.mark.parametrize("whole", [False, True])
def test_first_order_baselines_take_the_mean_gradient(whole):
  batch = _batch(M, weights=jnp.array([1.0, 1.0, 2.0]))

  def loss(base, adapter, batch, key):
    del key
    return _loss(base, adapter or {"a": jnp.zeros((D, 5))}, batch, None)

  algorithm = baselines.make_first_order_step(
    loss, optax.sgd(0.1), train_base=whole, over_tasks=True
  )
  base, adapter = _base(), {} if whole else _adapters(1)
  state, info = jax.jit(algorithm.step)(
    algorithm.init(jax.random.key(0), base, adapter), batch, HPARAMS
  )
  for t in range(T):

    def mean(base, adapter, t=t):
      rows = [
        jax.tree.map(lambda leaf, i=i: leaf[i, t], batch.lower)
        for i in range(M)
      ]
      losses = [loss(base, adapter, row, None) for row in rows]
      return (losses[0] + losses[1] + 2 * losses[2]) / 4

    mean_loss, grads = jax.value_and_grad(mean, (0, 1))(base, adapter)
    np.testing.assert_allclose(info.upper_loss[t], mean_loss, rtol=1e-5)
    down = lambda leaf, grad: leaf - 0.1 * grad
    if whole:
      base = jax.tree.map(down, base, grads[0])
    else:
      adapter = jax.tree.map(down, adapter, grads[1])
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
    (state.base, state.upper),
    (base, adapter),
  )


def test_mezo_moves_theta_along_the_mean_loss():
  def loss(base, adapter, batch, key):
    assert adapter == {} and key is None
    return _loss(base, {"a": jnp.zeros(())[None, None]}, batch, None)

  algorithm = baselines.make_zeroth_order_step(
    loss,
    outer.sgd(1.0),
    zofo.ZerothOrder(directions.Rademacher(), zo.exact),
    over_tasks=True,
  )
  batch = _batch(M)
  start = algorithm.init(jax.random.key(0), _base(), {})
  state, info = algorithm.step(start, batch, HPARAMS)
  # One step is -c z; c is the mean loss's slope along z.
  c = info.coefficients[0]
  z = jax.tree.map(lambda new, old: (old - new) / c, state.base, start.base)
  for leaf in jax.tree.leaves(z):
    np.testing.assert_allclose(np.abs(leaf), 1.0, rtol=1e-4)

  def mean(base):
    rows = [jax.tree.map(lambda x, i=i: x[i], batch.upper) for i in range(M)]
    return sum(loss(base, {}, row, None) for row in rows) / M

  slope = jax.jvp(mean, (start.base,), (z,))[1]
  np.testing.assert_allclose(c, slope, rtol=1e-3)
