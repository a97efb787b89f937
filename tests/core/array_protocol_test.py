"""Models that know nothing of `Perturbed` read perturbed weights lazily."""

import operator

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zofo_jax import adapters
from zofo_jax.core import directions, perturbed, zo
from zofo_jax.core import keys as keys_lib
from zofo_jax.core import sampler as sampler_lib
from zofo_jax.core.zeroth_order import ZerothOrder

DIRECTIONS = {
  "rademacher": directions.Rademacher(),
  "gaussian": directions.Gaussian(),
  "low_rank": directions.LowRank(2),
  "sparse": directions.Sparse(),
}
TOKENS = np.array([[0, 3, 5, 2], [1, 1, 4, 6]])
X = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)


def linen_model():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens):
      x = nn.Embed(7, 8)(tokens)
      return nn.Dense(5)(nn.LayerNorm()(nn.Dense(8)(x)))

  model = Model()
  variables = model.init(jax.random.key(0), TOKENS)
  return variables, lambda variables: model.apply(variables, TOKENS)


def nnx_model():
  class Model(nnx.Module):
    def __init__(self, rngs):
      self.embed = nnx.Embed(7, 8, rngs=rngs)
      self.hidden = nnx.Linear(8, 8, rngs=rngs)
      self.norm = nnx.LayerNorm(8, rngs=rngs)
      self.out = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, tokens):
      return self.out(self.norm(self.hidden(self.embed(tokens))))

  graph, params = nnx.split(Model(nnx.Rngs(0)))
  return params, lambda params: nnx.merge(graph, params)(TOKENS)


def equinox_model():
  mlp = eqx.nn.MLP(8, 5, 16, 2, key=jax.random.key(0))
  params, static = eqx.partition(mlp, eqx.is_array)

  def apply(params):
    model = eqx.combine(params, static, is_leaf=perturbed.is_perturbed)
    return jax.vmap(model)(X)

  return params, apply


def plain_model():
  rng = np.random.default_rng(1)
  params = {
    "w": jnp.asarray(rng.normal(size=(8, 16)), jnp.float32),
    "b": jnp.zeros((1, 16)),
    "out": jnp.asarray(rng.normal(size=(16, 5)), jnp.float32),
  }
  return params, lambda p: jnp.tanh(X @ p["w"] + p["b"]) @ p["out"]


def haiku_like_model():
  """A pure pair (init, apply) over a dict of modules, as Haiku transforms."""

  def init(key):
    keys = jax.random.split(key)
    layer = lambda key, n, m: {
      "w": jax.random.truncated_normal(key, -2, 2, (n, m)) / np.sqrt(n),
      "b": jnp.zeros(m),
    }
    return {
      "mlp/~/linear_0": layer(keys[0], 8, 16),
      "mlp/~/linear_1": layer(keys[1], 16, 5),
    }

  def apply(params, x):
    hidden = jnp.dot(x, params["mlp/~/linear_0"]["w"])
    hidden += jnp.broadcast_to(params["mlp/~/linear_0"]["b"], hidden.shape)
    out = jnp.dot(jax.nn.relu(hidden), params["mlp/~/linear_1"]["w"])
    return out + jnp.broadcast_to(params["mlp/~/linear_1"]["b"], out.shape)

  return init(jax.random.key(0)), lambda params: apply(params, X)


MODELS = {
  "linen": linen_model,
  "nnx": nnx_model,
  "equinox": equinox_model,
  "plain": plain_model,
  "haiku": haiku_like_model,
}


def estimate(fn, params, eps=1e-2, **options):
  how = ZerothOrder(sampler_lib.Sampler(**options), num_directions=2)
  return jax.jit(
    lambda params: zo.estimate(fn, params, jax.random.key(1), eps, zo=how)
  )(params)


# Every model, and every kind where there is a matrix product to be had.
@pytest.mark.parametrize(
  "model, direction",
  [
    *(("linen", "low_rank"), ("nnx", "gaussian")),
    *(("equinox", "sparse"), ("haiku", "rademacher")),
    pytest.param("linen", "rademacher", marks=pytest.mark.slow),
    pytest.param("nnx", "low_rank", marks=pytest.mark.slow),
    *(("plain", direction) for direction in DIRECTIONS),
  ],
)
def test_any_model_reads_perturbed_weights(model, direction):
  params, apply = MODELS[model]()
  loss = lambda params: jnp.mean(jnp.square(apply(params)))
  kind = DIRECTIONS[direction]
  lazy = estimate(loss, params, direction=kind, lazy=True)
  whole = estimate(loss, params, direction=kind, lazy=False)
  assert np.all(np.abs(whole.coefficients) > 1e-4)
  np.testing.assert_allclose(lazy.values, whole.values, rtol=1e-5)
  # A difference of two losses that agree to rounding.
  tolerance = 1e-6 * np.max(np.abs(whole.values)) / 1e-2
  np.testing.assert_allclose(
    lazy.coefficients, whole.coefficients, atol=tolerance, rtol=1e-4
  )


def test_lora_is_merged_lazily():
  params, apply = linen_model()
  params = params["params"]
  adapter = adapters.init_lora(
    jax.random.key(2), params, rank=2, alpha=4, targets="Dense"
  )
  adapter = jax.tree.map(lambda leaf: leaf + 0.1, adapter)
  loss = lambda base: jnp.mean(
    jnp.square(apply({"params": adapters.merge_lora(base, adapter)}))
  )
  lazy = estimate(loss, params, lazy=True)
  whole = estimate(loss, params, lazy=False)
  np.testing.assert_allclose(lazy.values, whole.values, rtol=1e-5)


def stack_of_dense(depth=16, width=512):
  class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      return jnp.tanh(nn.Dense(width, use_bias=False)(x)), None

  scanned = nn.scan(
    Block, {"params": 0}, split_rngs={"params": True}, length=depth
  )
  model, x = scanned(), jnp.ones((4, width))
  shapes = jax.eval_shape(model.init, jax.random.key(0), x, None)
  return shapes, lambda base: jnp.mean(model.apply(base, x, None)[0] ** 2)


def plain_scan(depth=16, width=512):
  shapes = {"w": jax.ShapeDtypeStruct((depth, width, width), jnp.float32)}

  def loss(base):
    layer = lambda x, w: (jnp.tanh(x @ w), None)
    return jnp.mean(jax.lax.scan(layer, jnp.ones((4, width)), base["w"])[0])

  return shapes, loss


@pytest.mark.parametrize("make", [stack_of_dense, plain_scan])
def test_one_layer_of_perturbed_weights_exists_at_a_time(make):
  shapes, loss = make()

  def temporaries(**options):
    sampler = sampler_lib.Sampler(
      directions.Rademacher(), stacked="", **options
    )
    how = ZerothOrder(sampler)
    run = lambda base, key: zo.estimate(loss, base, key, 1e-3, zo=how)
    compiled = jax.jit(run).lower(shapes, jax.random.key(0)).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  whole, lazy = temporaries(lazy=False), temporaries()
  # Both signs of 16 layers, against both signs of one and its z.
  assert whole > 2 * 16 * 512 * 512 * 4
  assert lazy < 0.15 * whole
  assert temporaries(lazy=True) == lazy


@pytest.mark.parametrize("stacked", [None, "embedding"])
@pytest.mark.parametrize("make", [stack_of_dense, plain_scan])
def test_a_stack_that_is_not_named_is_explained(make, stacked):
  shapes, loss = make(depth=3, width=4)
  params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes)
  message = rf"lazy=True, stacked={stacked!r}.*IndexError.*pass `stacked`"
  with pytest.raises(ValueError, match=message):
    estimate(loss, params, lazy=True, stacked=stacked)
  assert np.all(estimate(loss, params, lazy=True, stacked="").values < np.inf)


def test_an_error_of_the_loss_itself_is_not_explained():
  def loss(params):
    raise IndexError("of the loss")

  with pytest.raises(IndexError, match="of the loss"):
    estimate(loss, {"w": jnp.ones(3)}, lazy=True)


def norm(params):
  return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def norm_of_matrices(params):
  leaves = jax.tree.leaves(params)
  return sum(
    jnp.sum(leaf**2)
    for leaf in leaves
    if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim > 1
  )


def cast(params):
  return jnp.sum(
    jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)["a"] ** 2
  )


def scan_and_norm(params):
  step = lambda x, w: (jnp.tanh(x @ w), None)
  out, _ = jax.lax.scan(step, jnp.ones((2, 4)), params["a"])
  return jnp.sum(out) + norm_of_matrices(params)


@pytest.mark.parametrize("fn", [norm, norm_of_matrices, cast, scan_and_norm])
def test_a_loss_that_maps_over_leaves_gets_arrays(fn):
  params = {"a": jnp.ones((3, 4, 4)), "b": jnp.ones((3, 4))}
  options = {"stacked": "", "direction": directions.Rademacher()}
  default = estimate(fn, params, eps=0.5, **options)
  whole = estimate(fn, params, eps=0.5, lazy=False, **options)
  np.testing.assert_array_equal(default.coefficients, whole.coefficients)
  assert np.any(default.coefficients)


def test_only_a_loss_that_reads_arrays_is_handed_nodes():
  params = {"w": jnp.ones((2, 4, 4))}
  kinds = []

  def loss(params):
    kinds.append(type(params["w"]))
    return jnp.sum(params["w"])

  for options in ({"stacked": "w"}, {}, {"stacked": "w", "lazy": False}):
    estimate(loss, params, **options)
    lazy = options == {"stacked": "w"}
    assert issubclass(kinds[-1], perturbed.Perturbed) == lazy


def node(shape=(3, 4), stacked=None):
  value = jax.random.normal(jax.random.key(0), shape)
  key = keys_lib.DirectionKey(jax.random.key(1), jax.random.key(2))
  sampler = sampler_lib.Sampler(lazy=True, stacked=stacked)
  return sampler.perturb({"w": value}, key, 0.1)["w"]


@pytest.mark.parametrize("name", "add sub mul truediv mod pow lt ge eq".split())
def test_operators_are_those_of_the_array(name):
  w, op = node(), getattr(operator, name)
  array, other = perturbed.read(w), jnp.full((3, 4), 1.5)
  for pair in ((w, other), (other, w), (w, 2.0), (2.0, w), (w, w)):
    as_arrays = [array if x is w else x for x in pair]
    np.testing.assert_array_equal(op(*pair), op(*as_arrays))
  np.testing.assert_array_equal(op(np.array(other), w), op(other, array))


def test_it_is_an_array_in_every_other_way():
  w = node()
  array = perturbed.read(w)
  assert (w.shape, w.ndim, w.size, len(w)) == ((3, 4), 2, 12, 3)
  assert w.dtype == jnp.float32
  same = np.testing.assert_array_equal
  same(jnp.asarray(w), array)
  same(w.T, array.T)
  same(w.astype(jnp.bfloat16), array.astype(jnp.bfloat16))
  same(w.reshape(-1), array.reshape(-1))
  same(w.sum(axis=0), array.sum(axis=0))
  same(w[1:, ::2], array[1:, ::2])
  same(w.at[0].set(0.0), array.at[0].set(0.0))
  same(-w, -array)
  same(abs(w), abs(array))
  for actual, row in zip(w, array, strict=True):
    same(actual, row)
  same(jnp.einsum("io,i->o", w, jnp.ones(3)), jnp.einsum("io->o", array))
  with pytest.raises(AttributeError, match="no attribute 'kernel'"):
    _ = w.kernel
  with pytest.raises(TypeError, match="without axes"):
    len(node(()))


def test_a_layer_of_a_stack_is_indexed_before_it_is_read():
  stack = node((5, 3, 4), stacked="w")
  whole = perturbed.read(stack)
  for index in (0, -1, np.int32(2)):
    assert perturbed.is_perturbed(stack[index])
    np.testing.assert_array_equal(jnp.asarray(stack[index]), whole[index])
  np.testing.assert_array_equal(stack[1, 2], whole[1, 2])


@pytest.mark.parametrize("kind", DIRECTIONS.values())
def test_products_are_those_of_the_array(kind):
  value = jax.random.normal(jax.random.key(0), (48, 64))
  key = keys_lib.DirectionKey(jax.random.key(1), jax.random.key(2))
  w = sampler_lib.Sampler(kind, lazy=True).perturb({"w": value}, key, 0.1)["w"]
  array = perturbed.read(w)
  close = lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4)
  x = np.random.default_rng(2).normal(size=(2, 48)).astype(np.float32)
  close(jnp.asarray(x) @ w, x @ array)
  close(x @ w, x @ array)
  vector = jnp.arange(64, dtype=jnp.bfloat16) / 64
  assert (w @ vector).dtype == (array @ vector).dtype
  close(w @ vector, array @ vector)
  close(w @ array.T, array @ array.T)


def test_chosen_layers_need_a_stack():
  with pytest.raises(ValueError, match="stacked"):
    sampler_lib.Sampler(layers=(0, 1))
