"""The public API: what it accepts, and the sentence for what it does not."""

import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import zofo_jax as zofo
from zofo_jax.core import checks

STACKED = r"(^|/)layers/"
KEY = jax.random.key(0)


def loss(base, adapter, batch, key):
  del key
  return jnp.mean((batch @ base["w"] + adapter[None] - 1.0) ** 2)


BASE = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
ADAPTER = jnp.zeros(2)
BATCH = zofo.BilevelBatch(
  lower=jnp.ones((2, 4, 3)), penalty=jnp.ones((4, 3)), upper=jnp.ones((4, 3))
)


def make(lower=loss, upper=None, **options):
  defaults = {
    "lower_tx": optax.sgd(0.1),
    "upper_tx": optax.sgd(0.1),
    "base_tx": zofo.outer.sgd(0.1),
  }
  return zofo.make_bilevel_step(lower, upper, **(defaults | options))


def trace(algorithm, batch=BATCH, base=BASE):
  """Traces a step: nothing is computed."""
  state = algorithm.init(KEY, base, ADAPTER)
  return jax.eval_shape(algorithm.step, state, batch)[1]


@contextlib.contextmanager
def fails(sentence):
  """Expects a ValueError of one sentence, word for word."""
  assert "\n" not in sentence
  with pytest.raises(ValueError) as caught:
    yield
  assert str(caught.value) == sentence


# --- The names ---------------------------------------------------------------


def test_names():
  assert dir(zofo) == sorted([*zofo.__all__, "__doc__", "__version__"])
  for name in zofo.__all__:
    assert getattr(zofo, name) is not None
  assert issubclass(zofo.errors.UserError, ValueError)


# --- ZerothOrder -------------------------------------------------------------


def test_zeroth_order_is_a_value():
  first = zofo.ZerothOrder(zofo.directions.LowRank(4), num_directions=2)
  second = zofo.ZerothOrder(
    zofo.Sampler(zofo.directions.LowRank(4)), zofo.zo.central, 2
  )
  assert first == second and hash(first) == hash(second)
  assert first.sampler == zofo.Sampler(zofo.directions.LowRank(4))


@pytest.mark.parametrize(
  "options, sentence",
  [
    (
      {"num_directions": 0},
      "ZerothOrder.num_directions: found 0; expected at least 1.",
    ),
    (
      {"subspace_steps": 0},
      "ZerothOrder.subspace_steps: found 0; expected at least 1.",
    ),
    (
      {"estimator": "central"},
      "ZerothOrder.estimator: found 'central'; expected zo.central, zo.forward "
      "or zo.exact.",
    ),
    (
      {"sampler": "gaussian"},
      "ZerothOrder.sampler: found 'gaussian'; expected a Sampler or a "
      "Direction, such as directions.LowRank(4).",
    ),
    (
      {
        "sampler": zofo.directions.PerExample(),
        "per_example": True,
        "num_directions": 4,
      },
      "ZerothOrder: per_example takes one direction for each example; expected "
      "num_directions=1, found 4.",
    ),
    (
      {"per_example": True},
      "ZerothOrder: per_example needs directions whose examples share their "
      "products, directions.PerExample; found Gaussian().",
    ),
    (
      {
        "sampler": zofo.directions.PerExample(),
        "per_example": True,
        "map_fn": jax.vmap,
      },
      "ZerothOrder: per_example evaluates all examples at once; expected no "
      "map_fn.",
    ),
  ],
)
def test_options_that_exclude_each_other(options, sentence):
  with fails(sentence):
    zofo.ZerothOrder(**options)


def test_a_masked_kind_may_be_per_example():
  masked = zofo.directions.Sparse(zofo.directions.PerExample())
  assert zofo.ZerothOrder(masked, per_example=True).per_example


# --- init --------------------------------------------------------------------


def test_s_is_a_copy_of_p():
  algorithm = make()
  step = jax.jit(algorithm.step, donate_argnums=0)
  for adapters in ((jnp.ones(2),), (jnp.ones(2),) * 2):
    base = jax.tree.map(jnp.copy, BASE)
    state = algorithm.init(jax.random.key(1), base, *adapters)
    np.testing.assert_array_equal(state.lower, adapters[0])
    state, info = step(state, BATCH)  # donated: no buffer is there twice
    assert np.isfinite(info.objective)
  # NumPy's stacks of many tasks as well, and under jit.
  state = algorithm.init(KEY, BASE, np.ones(2))
  assert state.lower is not state.upper
  state = jax.jit(algorithm.init)(
    KEY, jax.tree.map(jnp.copy, BASE), jnp.ones(2)
  )
  step(state, BATCH)


def test_two_adapters():
  state = make().init(KEY, BASE, jnp.zeros(2), jnp.ones(2))
  np.testing.assert_array_equal(state.lower, jnp.ones(2))


class WithFunction(nnx.Module):
  def __init__(self, rngs):
    self.linear = nnx.Linear(3, 2, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)


@pytest.mark.parametrize(
  "base, sentence",
  [
    (
      {"w": BASE["w"], "activation": jnp.tanh},
      "base: the leaf 'activation' is a function; expected arrays, such as the "
      "first part of eqx.partition(model, eqx.is_array).",
    ),
    (
      {"w": BASE["w"], "scale": 2.0},
      "base: the leaf 'scale' is of type float; expected arrays.",
    ),
    (
      {"w": BASE["w"], "key": KEY},
      "base: the leaf 'key' is a PRNG key; expected weights alone, such as the "
      "state params of graphdef, params, rest = nnx.split(model, nnx.Param, "
      "...).",
    ),
    ({"n": jnp.arange(3)}, "base has no floating-point leaf to perturb."),
  ],
)
def test_parameters_that_are_none(base, sentence):
  with fails(sentence):
    make().init(KEY, base, ADAPTER)


def test_random_state_of_nnx():
  _, state = nnx.split(WithFunction(nnx.Rngs(0)))
  with pytest.raises(ValueError, match=r"is a PRNG key; .*nnx\.split"):
    make().init(KEY, state, ADAPTER)
  _, params, _ = nnx.split(WithFunction(nnx.Rngs(0)), nnx.Param, ...)
  make().init(KEY, params, ADAPTER)


LISTED = {"layers": {"0": jnp.ones((8, 4)), "1": jnp.ones((2, 8))}}
STACK = {"blocks": {"w": jnp.ones((2, 3, 4))}}


@pytest.mark.parametrize(
  "sampler, base, sentence",
  [
    (
      zofo.Sampler(select=lambda path: "mlp" in path),
      BASE,
      "Sampler.select matches no floating-point leaf of base; the leaves are "
      "'b' [2], 'w' [3, 2].",
    ),
    (
      zofo.Sampler(stacked=STACKED),
      LISTED,
      f"Sampler.stacked={STACKED!r} matches leaves of unequal first axes, "
      "'layers/0' [8, 4] and 'layers/1' [2, 8]; expected stacks of layers, or "
      "stacked=None if the layers are separate leaves.",
    ),
    (
      zofo.Sampler(stacked="b$"),
      {"b": jnp.ones(())},
      "Sampler.stacked='b$' matches 'b', a scalar; expected leaves whose first "
      "axis counts layers.",
    ),
    (
      zofo.Sampler(layers=(0, 2), stacked="blocks"),
      STACK,
      "Sampler.layers=(0, 2); expected different numbers from 0 to 1.",
    ),
    (
      zofo.Sampler(layers=(0,), stacked="layers"),
      STACK,
      "Sampler.layers=(0,), but no selected leaf is stacked; match the paths "
      "of leaves whose first axis counts layers by Sampler.stacked.",
    ),
    (
      zofo.Sampler(zofo.directions.LowRank(2)),
      STACK,
      "LowRank(rank=2): no selected leaf of base is a matrix; found "
      "'blocks/w' [2, 3, 4]: if their first axis counts layers, match their "
      "paths by Sampler.stacked.",
    ),
  ],
)
def test_samplers_that_do_not_fit(sampler, base, sentence):
  with fails(sentence):
    make(zo=zofo.ZerothOrder(sampler)).init(KEY, base, ADAPTER)
  with fails(sentence.replace("of base", "of params")):
    zofo.make_mezo_step(
      lambda params, batch: 0.0, zofo.outer.sgd(0.1), zofo.ZerothOrder(sampler)
    ).init(KEY, base)


def test_samplers_that_fit():
  for sampler, base in (
    (zofo.Sampler(zofo.directions.LowRank(2), stacked="blocks"), STACK),
    (zofo.Sampler(zofo.directions.LowRank(2)), BASE),
    (
      zofo.Sampler(stacked=STACKED),
      {"encoder": {"layers": {"w": jnp.ones((6, 2))}}}
      | {"decoder": {"layers": {"w": jnp.ones((4, 2))}}},
    ),
  ):
    checks.check_sampler(sampler, base, "base")


# --- Losses ------------------------------------------------------------------


def test_losses_without_their_arguments():
  with fails(
    "lower_loss_fn takes (params, batch); expected (base, adapter, batch, key)."
  ):
    make(lambda params, batch: 0.0)
  with fails("upper_loss_fn is 3; expected a function."):
    make(loss, 3)
  with fails("loss_fn takes (params); expected (params, batch)."):
    zofo.make_mezo_step(lambda params: 0.0, zofo.outer.sgd(0.1))
  make(functools.partial(loss), lambda *arguments: loss(*arguments))


@pytest.mark.parametrize(
  "value, sentence",
  [
    (
      lambda value: jnp.ones(4) * value,
      "lower_loss_fn returned float32[4]; expected a floating-point scalar.",
    ),
    (
      lambda value: (value, {}),
      "lower_loss_fn returned a tuple of 2; expected a floating-point scalar, "
      "or a pair of it and aux with has_aux=True.",
    ),
    (
      lambda value: (value > 0).astype(int),
      "lower_loss_fn returned int32[]; expected a floating-point scalar.",
    ),
    (
      lambda value: {"loss": value},
      "lower_loss_fn returned a value of type dict; expected a floating-point "
      "scalar.",
    ),
  ],
)
def test_losses_that_are_no_scalar(value, sentence):
  with fails(sentence):
    trace(make(lambda *arguments: value(loss(*arguments))))


def test_errors_of_a_loss_are_its_own():
  def broken(base, adapter, batch, key):
    raise LookupError("mine")

  with pytest.raises(LookupError, match="mine"):
    trace(make(broken))


def test_has_aux():
  def with_aux(base, adapter, batch, key):
    value = loss(base, adapter, batch, key)
    return value, {"double": 2 * value, "rows": batch.shape[0]}

  with fails(
    "lower_loss_fn returned float32[]; expected a pair, a floating-point "
    "scalar and aux, as has_aux is True."
  ):
    trace(make(has_aux=True))
  info = []
  for upper in (None, lambda *arguments: with_aux(*arguments)):
    algorithm = make(with_aux, upper, has_aux=True)
    state = algorithm.init(KEY, BASE, ADAPTER)
    new, step_info = jax.jit(algorithm.step)(state, BATCH)
    np.testing.assert_allclose(
      step_info.aux["double"], 2 * step_info.upper_loss, 1e-6
    )
    assert int(step_info.aux["rows"]) == 4
    info.append(step_info)
  plain = make()
  same, step_info = jax.jit(plain.step)(plain.init(KEY, BASE, ADAPTER), BATCH)
  assert step_info.aux is None
  assert step_info.coefficients == info[0].coefficients
  jax.tree.map(np.testing.assert_array_equal, same.upper, new.upper)


def test_has_aux_over_tasks():
  def with_aux(base, adapter, batch, key):
    value = loss(base, adapter, batch, key)
    return value, 3 * value

  lift = lambda tree: jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), tree)
  algorithm = make(with_aux, has_aux=True, over_tasks=True)
  state = algorithm.init(KEY, BASE, lift(ADAPTER))
  info = jax.jit(algorithm.step)(state, lift(BATCH))[1]
  assert info.aux.shape == (2,)
  np.testing.assert_allclose(info.aux, 3 * info.upper_loss, 1e-6)


# --- Batches -----------------------------------------------------------------


@pytest.mark.parametrize(
  "lower, sentence",
  [
    (
      jnp.ones((4, 3)),
      "batch.lower has shape [4, 3], and batch.penalty [4, 3]; expected one "
      "axis more, which counts the inner steps.",
    ),
    (
      jnp.ones((2, 2, 4, 3)),
      "batch.lower has shape [2, 2, 4, 3], and batch.penalty [4, 3]; expected "
      "one axis more, which counts the inner steps.",
    ),
  ],
)
def test_batches_without_the_axis_of_inner_steps(lower, sentence):
  with fails(sentence):
    trace(make(), BATCH._replace(lower=lower))


def test_leaves_of_unequal_inner_steps():
  batch = zofo.BilevelBatch(
    {"x": jnp.ones((2, 4)), "y": jnp.ones((3, 4))},
    *[{"x": jnp.ones(4), "y": jnp.ones(4)}] * 2,
  )
  with fails(
    "batch.lower: expected one number of inner steps on all leaves; found "
    "'x' 2, 'y' 3."
  ):
    checks.check_lower_batch(batch)


def test_examples_of_unequal_batches():
  zo = zofo.ZerothOrder(zofo.directions.PerExample(), per_example=True)
  trace(make(zo=zo))
  with fails(
    "ZerothOrder.per_example: expected batches of one size; found '0' [8, 3], "
    "'1' [4, 3]."
  ):
    trace(make(zo=zo), BATCH._replace(upper=jnp.ones((8, 3))))


# --- value_and_grad ----------------------------------------------------------


def _quadratic(tree, shift=0.0):
  w, b = tree["w"], tree["b"]
  return 0.5 * jnp.sum((w - shift) ** 2) + jnp.sum(jnp.sin(b)) + w[0, 1] * b[0]


def test_value_and_grad_is_the_gradient_on_average():
  value_and_grad = zofo.zo.value_and_grad(
    _quadratic, zofo.ZerothOrder(zofo.directions.Rademacher()), eps=1e-2
  )
  tree = {"w": jnp.arange(6.0).reshape(3, 2) / 6, "b": jnp.array([0.3, -0.7])}
  keys = jax.random.split(jax.random.key(1), 4000)
  values, grads = jax.jit(
    lambda keys: jax.lax.map(lambda key: value_and_grad(tree, key, 0.5), keys)
  )(keys)
  value, exact = jax.value_and_grad(_quadratic)(tree, 0.5)
  # The mean of f at the two points is f + O(eps^2).
  np.testing.assert_allclose(values, value, atol=2e-3)
  for sample, right in zip(*map(jax.tree.leaves, (grads, exact))):
    error = np.abs(np.mean(sample, axis=0) - right)
    assert np.all(error < 4.5 * np.std(sample, axis=0) / np.sqrt(len(keys)))


@pytest.mark.parametrize("estimator", ["central", "forward", "exact"])
def test_value_and_grad_of_a_linear_function_is_exact(estimator):
  slope = jnp.array([1.0, -2.0, 3.0])
  zo = zofo.ZerothOrder(
    zofo.directions.Rademacher(), getattr(zofo.zo, estimator), 3
  )
  value_and_grad = zofo.zo.value_and_grad(lambda x: x @ slope, zo, eps=0.5)
  _, grads = jax.jit(value_and_grad)(jnp.zeros(3), KEY)
  # (1/Q) sum_q <slope, z_q> z_q.
  keys = zofo.keys.direction_keys(KEY, None, 3)
  expected = np.zeros(3)
  for q in range(3):
    one = keys._replace(direction=keys.direction[q : q + 1])
    z = np.array(zo.sampler.weighted_sum(jnp.zeros(3), one, jnp.ones(1)))
    expected += z * (z @ np.array(slope)) / 3
  np.testing.assert_allclose(grads, expected, rtol=1e-5, atol=1e-5)


def test_value_and_grad_has_aux_and_examples():
  zo = zofo.ZerothOrder(zofo.directions.PerExample(), per_example=True)
  fn = lambda w, x: (jnp.mean(x @ w), x.shape)
  (value, aux), grads = zofo.zo.value_and_grad(fn, zo, has_aux=True)(
    jnp.ones((3, 1)), KEY, jnp.ones((4, 3))
  )
  assert value.shape == () and grads.shape == (3, 1)
  assert jax.tree.leaves(aux)[0].shape == (4, 2)  # examples, points
  with fails(
    "zo.value_and_grad: expected subspace_steps=1, as it does not know the "
    "number of the step; found 5."
  ):
    zofo.zo.value_and_grad(fn, zofo.ZerothOrder(subspace_steps=5))
  with fails(
    "zo.estimate: per_example needs the examples; expected "
    "zo.estimate_on_batch or zo.estimate_per_example."
  ):
    zofo.zo.estimate(lambda w: jnp.sum(w), jnp.ones(3), KEY, 1e-3, zo)
  with fails("fn returned float32[3]; expected a scalar."):
    zofo.zo.estimate(lambda w: 2.0 * w, jnp.ones(3), KEY, 1e-3)


# --- MeZO --------------------------------------------------------------------


def test_mezo_is_the_baseline_s_step():
  tx = zofo.outer.sgd(0.1, weight_decay=0.1)
  zo = zofo.ZerothOrder(zofo.directions.Gaussian(), num_directions=2)
  alone = zofo.make_mezo_step(lambda w, x: jnp.mean((x @ w["w"]) ** 2), tx, zo)
  baseline = zofo.baselines.make_zeroth_order_step(
    lambda base, adapter, x, key: jnp.mean((x @ base["w"]) ** 2), tx, zo
  )
  x = BATCH.upper
  state, info = jax.jit(alone.step)(alone.init(KEY, BASE), x)
  other, other_info = jax.jit(baseline.step)(
    baseline.init(KEY, BASE, {}),
    zofo.BilevelBatch((), (), x),
    zofo.BilevelHParams(),
  )
  jax.tree.map(np.testing.assert_array_equal, state.params, other.base)
  np.testing.assert_array_equal(info.coefficients, other_info.coefficients)
  np.testing.assert_allclose(
    info.loss, jnp.mean(other_info.upper_loss), rtol=1e-6
  )
  assert int(state.step) == 1 and info.values.shape == (2, 2)


def test_mezo_per_example_and_aux():
  zo = zofo.ZerothOrder(zofo.directions.PerExample(), per_example=True)
  algorithm = zofo.make_mezo_step(
    lambda w, x: (jnp.mean((x @ w["w"]) ** 2), jnp.float32(7.0)),
    optax.adam(0.1),
    zo,
    has_aux=True,
  )
  step = jax.jit(algorithm.step, donate_argnums=0)
  state = algorithm.init(jax.random.key(1), jax.tree.map(jnp.copy, BASE))
  first = None
  for _ in range(30):
    state, info = step(state, BATCH.upper)
    first = info.loss if first is None else first
  assert info.coefficients.shape == (4,)
  assert info.aux.shape == (4, 2) and float(info.aux[0, 0]) == 7.0
  assert info.loss < first


# --- Other people's models ---------------------------------------------------


def test_a_list_called_layers_is_no_stack():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(8, name="layers")(x)

  params = Model().init(KEY, jnp.ones((1, 32)))["params"]
  keys = zofo.keys.direction_keys(KEY, None, 1)
  sampler = zofo.Sampler(zofo.directions.LowRank(2))
  z = sampler.weighted_sum(params, keys, jnp.ones(1))["layers"]["kernel"]
  assert np.linalg.matrix_rank(np.array(z)) == 2
  halved = zofo.Sampler().apply_directions(
    params, keys, jnp.zeros(1), decay=0.5
  )
  np.testing.assert_allclose(
    halved["layers"]["kernel"], params["layers"]["kernel"] / 2, rtol=1e-6
  )


def test_a_loss_of_low_precision_is_warned_of():
  def loss(base, adapter, batch, key):
    return jnp.mean((base + adapter - batch) ** 2).astype(jnp.bfloat16)

  checked = checks.checked_loss(loss, "upper_loss_fn")
  with pytest.warns(
    UserWarning, match=r"upper_loss_fn .*bfloat16\[\]; expected"
  ):
    checked(jnp.zeros(2), jnp.zeros(2), jnp.ones(2), None)
