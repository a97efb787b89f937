"""Directions: one z, whoever draws it and wherever it is drawn."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from zofo_jax import directions

KINDS = [directions.Gaussian(), directions.Rademacher()]
LAYERS = 4


def _tree(dtype=jnp.float32):
  """A small model with plain and stacked leaves, and some that stay put."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  return {
    "embed": draw(16, 8),
    "layers": {
      "mlp": {"kernel": draw(LAYERS, 8, 8)},
      "gain": draw(LAYERS),
    },
    "head": {"kernel": draw(8, 16)},
    "temperature": jnp.asarray(1.5, dtype),
    "offset": jnp.arange(8, dtype=jnp.int32),
  }


def _zeros(tree, dtype=jnp.float32):
  return jax.tree.map(
    lambda leaf: jnp.zeros_like(
      leaf, None if leaf.dtype == jnp.int32 else dtype
    ),
    tree,
  )


def _draw(direction, key, tree, **options):
  """Writes z of one key out, without the lazy nodes."""
  sampler = directions.Sampler(direction, **options)
  return sampler.add(_zeros(tree), key[None], jnp.ones(1))


@functools.partial(jax.jit, static_argnums=0, static_argnames="select")
def _z(direction, key, tree, select=directions.select_all):
  """The same, compiled once for all tests."""
  return _draw(direction, key, tree, select=select)


def _kernels(name):
  return name.endswith("kernel")


def _assert_same(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  jax.tree.map(np.testing.assert_array_equal, left, right)


def _model(tree, ids):
  """Reads weights as the models do: look-up, scanned layers, head."""
  hidden = directions.take(tree["embed"], ids)

  def layer(hidden, weights):
    hidden = jnp.tanh(directions.dot(hidden, weights["mlp"]["kernel"]))
    return hidden * directions.value(weights["gain"]), None

  hidden, _ = jax.lax.scan(layer, hidden, tree["layers"])
  logits = directions.dot(hidden, tree["head"]["kernel"])
  return logits * directions.value(tree["temperature"])


@pytest.mark.parametrize("direction", KINDS)
def test_same_bits_in_every_transformation(direction):
  tree = {
    "plain": jnp.zeros((3, 70)),
    "layers": {"stacked": jnp.zeros((2, 3, 5))},
  }
  keys = jax.random.split(jax.random.key(1), 2)
  eager = _draw(direction, keys[1], tree)
  draw = lambda key: _draw(direction, key, tree)

  @jax.jit
  def compiled(keys):
    _, scanned = jax.lax.scan(lambda carry, k: (carry, draw(k)), 0, keys)
    return jax.vmap(draw)(keys), scanned

  for both in compiled(keys):
    _assert_same(jax.tree.map(lambda leaf: leaf[1], both), eager)
  _assert_same(_z(direction, keys[1], tree), eager)


@pytest.mark.parametrize("direction", KINDS)
def test_lazy_nodes_hold_the_z_of_the_update(direction):
  # Of zero weights and steps of +-1 a node reads as +-z, to the last bit.
  tree = _zeros(_tree())
  key = jax.random.key(2)
  expected = _z(direction, key, tree)

  def read(scale):
    nodes = directions.perturb(tree, key, scale, direction)
    _, layers = jax.lax.scan(
      lambda carry, layer: (carry, directions.materialize(layer)),
      0,
      nodes["layers"],
    )
    ids = jnp.arange(16)
    embed = directions.take(nodes["embed"], ids)
    rest = directions.materialize(nodes)
    return rest | {"layers": layers, "embed": embed}

  both = jax.jit(jax.vmap(read))(jnp.array([1.0, -1.0]))
  offset = expected.pop("offset")
  for row in both.pop("offset"):
    np.testing.assert_array_equal(row, offset)
  _assert_same(jax.tree.map(lambda leaf: leaf[0], both), expected)
  _assert_same(jax.tree.map(lambda leaf: -leaf[1], both), expected)


@pytest.mark.parametrize("direction", KINDS[1:])
def test_lazy_model_equals_materialised(direction):
  tree = _tree()
  ids = jnp.array([[3, 3, 15], [0, 7, 1]])
  key = jax.random.key(3)
  lazy = directions.Sampler(direction, lazy=True)
  materialised = jax.jit(directions.Sampler(direction).perturb)
  scales = jnp.array([0.1, -0.1])

  both = jax.jit(
    jax.vmap(lambda scale: _model(lazy.perturb(tree, key, scale), ids))
  )(scales)
  z = _z(direction, key, tree)
  for got, scale in zip(both, [0.1, -0.1]):
    # The materialised tree, by the library and by hand.
    arrays = materialised(tree, key, scale)
    by_hand = jax.tree.map(
      lambda leaf, z, scale=scale: leaf + np.float32(scale) * z, tree, z
    )
    by_hand["offset"] = tree["offset"]
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
      arrays,
      by_hand,
    )
    np.testing.assert_allclose(got, _model(by_hand, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  "direction, num_directions", [(KINDS[0], 3), (KINDS[1], 1), (KINDS[1], 3)]
)
def test_add_equals_a_slow_loop(direction, num_directions):
  tree = _tree()
  keys = jax.random.split(jax.random.key(4), num_directions)
  weights = np.array([0.5, -2.0, 1e-3], np.float32)[:num_directions]
  expected = jax.tree.map(lambda leaf: np.array(leaf, np.float64), tree)
  for key, weight in zip(keys, weights):
    z = _z(direction, key, tree)
    expected = jax.tree.map(
      lambda total, z, weight=weight: total + float(weight) * np.array(z),
      expected,
      z,
    )
  expected["offset"] = tree["offset"]
  got = jax.jit(directions.Sampler(direction).add)(tree, keys, weights)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    got,
    expected,
  )


@pytest.mark.parametrize("direction", KINDS)
def test_stacked_leaf_is_drawn_layer_by_layer(direction):
  tree = _tree()
  key = jax.random.key(5)
  keys = directions.leaf_keys(key, tree)
  z = _z(direction, key, tree)
  assert keys["layers"]["mlp"]["kernel"].shape == (LAYERS, 2)
  assert keys["head"]["kernel"].shape == (2,)
  draw = jax.jit(lambda key: direction.draw(key, (8, 8)))
  for layer in range(LAYERS):
    own = keys["layers"]["mlp"]["kernel"][layer]
    np.testing.assert_array_equal(
      draw(own), z["layers"]["mlp"]["kernel"][layer]
    )
  # Without the pattern the same leaf is one array with one key.
  flat = directions.leaf_keys(key, tree, stacked="^$")
  assert flat["layers"]["mlp"]["kernel"].shape == (2,)


@pytest.mark.parametrize("direction", KINDS)
def test_select(direction):
  tree = _tree()
  key = jax.random.key(6)
  z = _z(direction, key, tree, select=_kernels)
  everything = _z(direction, key, tree)
  nodes = directions.perturb(tree, key, 0.1, direction, select=_kernels)
  moved = jax.jit(directions.Sampler(direction, select=_kernels).add)(
    tree, key[None], jnp.ones(1)
  )
  for name in ("embed", "temperature", "offset"):
    assert nodes[name] is tree[name]
    np.testing.assert_array_equal(moved[name], tree[name])
    assert not np.any(z[name])
  assert nodes["layers"]["gain"] is tree["layers"]["gain"]
  np.testing.assert_array_equal(moved["layers"]["gain"], tree["layers"]["gain"])
  assert not np.any(z["layers"]["gain"])
  # What is left out changes nothing for the rest.
  np.testing.assert_array_equal(
    z["layers"]["mlp"]["kernel"], everything["layers"]["mlp"]["kernel"]
  )
  np.testing.assert_array_equal(
    z["head"]["kernel"], everything["head"]["kernel"]
  )


@pytest.mark.parametrize("direction", KINDS)
def test_z_depends_on_the_path_alone(direction):
  tree = _tree()
  key = jax.random.key(7)
  alone = {"layers": {"mlp": {"kernel": tree["layers"]["mlp"]["kernel"]}}}
  np.testing.assert_array_equal(
    _z(direction, key, alone)["layers"]["mlp"]["kernel"],
    _z(direction, key, tree)["layers"]["mlp"]["kernel"],
  )


@pytest.mark.parametrize("direction", KINDS)
def test_layers_leaves_and_keys_are_independent(direction):
  tree = {
    "a": jnp.zeros((20, 50)),
    "b": jnp.zeros((20, 50)),
    "layers": {"c": jnp.zeros((3, 20, 50)), "d": jnp.zeros((3, 20, 50))},
  }  # eight blocks of 1000 elements
  rows = []
  for key in jax.random.split(jax.random.key(8), 4):
    for leaf in jax.tree.leaves(_z(direction, key, tree)):
      rows.extend(np.array(leaf).reshape(-1, 1000))
  assert len(rows) == 4 * 8
  correlation = np.corrcoef(rows)[~np.eye(len(rows), dtype=bool)]
  assert np.abs(correlation).max() < 5 / math.sqrt(1000)


@pytest.mark.parametrize("direction", KINDS)
def test_half_precision(direction):
  rng = np.random.default_rng(1)
  tree = {
    "layers": {"a": jnp.asarray(rng.normal(size=(2, 9, 8)), jnp.bfloat16)},
    "b": jnp.asarray(rng.normal(size=(9, 8)), jnp.float16),
  }
  key = jax.random.key(9)
  # z is drawn in float32 and only then cast.
  unit = _z(direction, key, tree)
  sampler = directions.Sampler(direction)
  read = jax.jit(sampler.perturb)(jax.tree.map(jnp.zeros_like, tree), key, 1.0)
  jax.tree.map(
    lambda got, z: np.testing.assert_array_equal(got, z.astype(got.dtype)),
    read,
    unit,
  )
  # The update is rounded once, to one of the two neighbours.
  moved = jax.jit(sampler.add)(
    tree, jnp.stack([key, key]), jnp.array([0.25, 0.5])
  )
  float64 = lambda leaf: np.array(leaf, np.float64)
  for got, leaf, z in zip(*map(jax.tree.leaves, (moved, tree, unit))):
    assert got.dtype == leaf.dtype
    exact = float64(leaf) + 0.75 * float64(z)
    ulp = float(jnp.finfo(leaf.dtype).eps) * np.abs(exact)
    assert np.all(np.abs(float64(got) - exact) <= ulp + 1e-6)


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_other_generators_are_refused(impl):
  with pytest.raises(ValueError, match="threefry"):
    directions.leaf_keys(jax.random.key(0, impl=impl), _tree())


@pytest.mark.parametrize("direction", KINDS)
@pytest.mark.parametrize(
  "shape, kernel, embed",
  [
    ((8,), P(None, "data"), P("data")),
    ((2, 2, 2), P(None, "model", "fsdp"), P(("data", "model"), "fsdp")),
  ],
)
def test_same_bits_on_every_mesh(direction, shape, kernel, embed):
  names = ("data", "fsdp", "model")[: len(shape)]
  mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))
  tree = {
    "embed": jnp.zeros((16, 136)),  # 136: signs share words across devices
    "layers": {"kernel": jnp.zeros((2, 16, 128))},
  }
  shardings = {
    "embed": NamedSharding(mesh, embed),
    "layers": {"kernel": NamedSharding(mesh, kernel)},
  }
  key = jax.random.key(10)
  expected = _z(direction, key, tree)

  def add_and_read(tree, key):
    nodes = directions.perturb(tree, key, 1.0, direction)
    _, layers = jax.lax.scan(
      lambda carry, layer: (carry, directions.materialize(layer)),
      0,
      nodes["layers"],
    )
    embed = directions.take(nodes["embed"], jnp.arange(16))
    added = directions.Sampler(direction).add(tree, key[None], jnp.ones(1))
    return added, {"embed": embed, "layers": layers}

  run = jax.jit(add_and_read, out_shardings=(shardings, shardings))
  for got in run(jax.device_put(tree, shardings), key):
    assert got["embed"].sharding.spec == embed
    _assert_same(got, expected)


@pytest.mark.parametrize("direction", KINDS)
def test_sharded_rows_exchange_nothing(direction):
  # Each device draws its own rows of z and moves its own weights.
  mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
  sharding = NamedSharding(mesh, P(None, "fsdp"))
  tree = {
    "layers": jax.device_put({"kernel": jnp.zeros((2, 16, 136))}, sharding)
  }
  add = jax.jit(directions.Sampler(direction).add, donate_argnums=0)
  arguments = (tree, jax.random.key(0)[None], jnp.ones(1))
  text = add.lower(*arguments).compile().as_text()
  for collective in ("all-gather", "all-reduce", "all-to-all", "permute("):
    assert collective not in text
