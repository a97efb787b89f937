"""Perturbed weights: read as their values, by every reading function."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from zofo_jax.core import directions, perturbed, sampler
from zofo_jax.core import keys as keys_lib

STACKED = r"(^|/)layers/"

RADEMACHER = directions.Rademacher()
LOW_RANK = directions.LowRank(2)
PER_EXAMPLE = directions.PerExample()
SPARSE = directions.Sparse()
KINDS = [RADEMACHER, LOW_RANK, PER_EXAMPLE, SPARSE]
name_of = lambda kind: type(kind).__name__
kinds = pytest.mark.parametrize("kind", KINDS, ids=name_of)
all_kinds = pytest.mark.parametrize(
  "kind", [directions.Gaussian(), *KINDS], ids=name_of
)
LAYERS = 3


def _key(seed=0):
  return keys_lib.DirectionKey(*jax.random.split(jax.random.key(seed)))


def _tree(dtype=jnp.float32):
  """A small model with plain and stacked leaves, and some that stay put."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  return {
    "embed": draw(70, 8),
    "layers": {
      "mlp": {"kernel": draw(LAYERS, 8, 8), "bias": draw(LAYERS, 8)},
      "gain": draw(LAYERS),
    },
    "head": draw(20, 8),
    "temperature": jnp.asarray(1.5, dtype),
    "offset": jnp.arange(8, dtype=jnp.int32),
  }


def _nodes(kind, tree, key, scale):
  return sampler.Sampler(kind, lazy=True, stacked=STACKED).perturb(
    tree, key, scale
  )


@functools.partial(jax.jit, static_argnums=0)
def _perturb(sampler, *arguments):
  return sampler.perturb(*arguments)


@functools.partial(jax.jit, static_argnums=0)
def _z(kind, tree, key):
  """Writes z of one key out, without nodes; int leaves give zeros."""
  keys = keys_lib.DirectionKey(key.direction[None], key.subspace)
  return sampler.Sampler(kind, stacked=STACKED).weighted_sum(
    tree, keys, jnp.ones(1)
  )


@functools.partial(jax.jit, static_argnums=0)
def _draw(kind, key, shape_of):
  return kind.sample(key, shape_of.shape)


def _node(kind, weight, scale, seed=0):
  """A node of one matrix, and its value by hand."""
  key = keys_lib.leaf_keys(_key(seed), {"w": weight}, stacked=STACKED)["w"]
  scale = jnp.float32(scale)
  z = kind.mask(_draw(kind, key, weight), weight)
  whole = (weight.astype(jnp.float32) + scale * z).astype(weight.dtype)
  return perturbed.Perturbed(weight, key, scale, kind), whole


def _same(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  jax.tree.map(np.testing.assert_array_equal, left, right)


def _close(left, right, tolerance=1e-5):
  np.testing.assert_allclose(left, right, rtol=tolerance, atol=tolerance)


# --- Keys --------------------------------------------------------------------


def test_a_key_for_every_leaf_and_layer():
  tree, key = _tree(), _key()
  keys = keys_lib.leaf_keys(key, tree, stacked=STACKED)
  assert keys["head"].direction.shape == keys["head"].subspace.shape == (2,)
  for part in keys["layers"]["mlp"]["kernel"]:
    assert part.shape == (LAYERS, 2)
  # Without the pattern the same leaf is one array with one key.
  flat = keys_lib.leaf_keys(key, tree)
  assert flat["layers"]["mlp"]["kernel"].direction.shape == (2,)
  # All differ, those of one key used for both parts too.
  keys = keys_lib.leaf_keys(
    keys_lib.DirectionKey(key.direction, key.direction), tree, stacked=STACKED
  )
  words = np.concatenate([k.reshape(-1, 2) for k in jax.tree.leaves(keys)])
  assert len(np.unique(words, axis=0)) == len(words) == 2 * (3 * LAYERS + 4)


def test_keys_depend_on_the_path_alone():
  tree, key = _tree(), _key()
  alone = {"layers": {"mlp": {"kernel": tree["layers"]["mlp"]["kernel"]}}}
  _same(
    keys_lib.leaf_keys(key, alone, stacked=STACKED)["layers"]["mlp"]["kernel"],
    keys_lib.leaf_keys(key, tree, stacked=STACKED)["layers"]["mlp"]["kernel"],
  )


def test_own_and_frame_reach_their_parts():
  tree, key = _tree(), _key(1)
  other = _key(2)
  both = keys_lib.leaf_keys(key, tree, stacked=STACKED)
  mixed = keys_lib.leaf_keys(
    key._replace(direction=other.direction), tree, stacked=STACKED
  )
  for old, new in zip(
    jax.tree.leaves(both, is_leaf=lambda x: isinstance(x, keys_lib.LeafKey)),
    jax.tree.leaves(mixed, is_leaf=lambda x: isinstance(x, keys_lib.LeafKey)),
  ):
    np.testing.assert_array_equal(old.subspace, new.subspace)
    assert np.all(np.any(old.direction != new.direction, axis=-1))


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_other_generators_are_refused(impl):
  good, bad = jax.random.key(0), jax.random.key(0, impl=impl)
  for key in (
    keys_lib.DirectionKey(bad, good),
    keys_lib.DirectionKey(good, bad),
  ):
    with pytest.raises(ValueError, match="threefry"):
      keys_lib.leaf_keys(key, _tree(), stacked=STACKED)


# --- Reading -----------------------------------------------------------------


@all_kinds
def test_nodes_hold_the_z_of_the_update(kind):
  # Of zero weights and steps of +-1 a node reads as +-z, to the last bit.
  tree = jax.tree.map(jnp.zeros_like, _tree())
  tree = {"embed": tree["embed"], "layers": {"mlp": tree["layers"]["mlp"]}}
  key = _key(2)
  expected = _z(kind, tree, key)

  def read(scale):
    nodes = _nodes(kind, tree, key, scale)
    _, layers = jax.lax.scan(
      lambda carry, layer: (carry, perturbed.materialize(layer)),
      0,
      nodes["layers"],
    )
    whole = perturbed.materialize(nodes)  # stacked leaves in one go
    rows = jnp.concatenate(
      [perturbed.read_rows(nodes["embed"], 0, 13), whole["embed"][13:]]
    )
    taken = perturbed.take(nodes["embed"], jnp.arange(70))
    return [whole | {"embed": embed} for embed in (rows, taken)], layers

  both, layers = jax.jit(jax.vmap(read))(jnp.array([1.0, -1.0]))
  for read in both:
    _same(jax.tree.map(lambda leaf: leaf[0], read), expected)
    _same(jax.tree.map(lambda leaf: -leaf[1], read), expected)
  first = jax.tree.map(lambda leaf: leaf[0], layers)
  _same(first, expected["layers"])


@kinds
def test_every_reading_function_reads_the_value(kind):
  rng = np.random.default_rng(1)
  weight = jnp.asarray(rng.normal(size=(150, 8)), jnp.float32)
  ids = jnp.array([[3, 3, 149], [0, 70, 64]])
  narrow, wide = (
    jnp.asarray(rng.normal(size=(2, 5, n)), jnp.float32) for n in (8, 150)
  )

  def read(weight):
    return (
      perturbed.read(weight),
      perturbed.take(weight, ids),
      perturbed.read_rows(weight, 64, 86),
      perturbed.dot(wide, weight),
      perturbed.dot_transposed(narrow, weight),
      perturbed.log_normalizer(narrow, weight),
    )

  node, whole = _node(kind, weight, 0.3)
  assert np.abs(whole - weight).max() > 0.2
  logits = np.einsum("bpd,vd->bpv", narrow, whole)
  expected = (whole, whole[ids], whole[64:], wide @ whole, logits)
  expected += (np.log(np.exp(logits.astype(np.float64)).sum(axis=-1)),)
  for got, right in zip(jax.jit(read)(node), expected, strict=True):
    assert got.dtype == jnp.float32
    _close(got, right, 3e-5)
  # An array is read like a node that does not move it.
  still = dataclasses.replace(node, scale=jnp.float32(0.0))
  for got, right in zip(jax.jit(read)(weight), jax.jit(read)(still)):
    _close(got, right)


@pytest.mark.parametrize(
  "kind, size",
  [
    *((kind, 150) for kind in KINDS),
    *((RADEMACHER, size) for size in (40, 64, 128)),
  ],
)
def test_the_head_in_blocks(monkeypatch, kind, size):
  monkeypatch.setattr(perturbed, "ROWS_PER_BLOCK", 64)
  rng = np.random.default_rng(2)
  weight = jnp.asarray(rng.normal(size=(size, 4)), jnp.float32)
  x = jnp.asarray(rng.normal(size=(2, 3, 4)) * 20, jnp.float32)
  node, whole = _node(kind, weight, 0.3)
  right = jax.nn.logsumexp(np.array(x, np.float64) @ whole.T, axis=-1)
  read = jax.jit(jax.vmap(lambda x: perturbed.log_normalizer(x, node)))
  _close(read(x), right)
  assert read(x).dtype == jnp.float32


@jax.jit
def _model(tree, ids):
  """Reads weights as the models do: look-up, scanned layers, head."""
  hidden = perturbed.take(tree["embed"], ids)

  def layer(hidden, weights):
    mlp = weights["mlp"]
    hidden = perturbed.dot(hidden, mlp["kernel"])
    bias = perturbed.read(mlp["bias"])
    hidden = jnp.tanh(hidden + jnp.broadcast_to(bias, hidden.shape))
    return hidden * perturbed.read(weights["gain"]), None

  hidden, _ = jax.lax.scan(layer, hidden, tree["layers"])
  logits = perturbed.dot_transposed(hidden, tree["head"])
  return logits * perturbed.read(tree["temperature"])


@kinds
def test_lazy_model_equals_materialised(kind):
  tree, key = _tree(), _key(3)
  ids = jnp.array([[3, 3, 15], [0, 7, 1]])
  scales = [0.1, -0.1]
  both = jax.jit(
    jax.vmap(lambda scale: _model(_nodes(kind, tree, key, scale), ids))
  )(jnp.array(scales))
  z = _z(kind, tree, key)
  for got, scale in zip(both, scales):
    # The materialised tree, by the library and by hand.
    arrays = _perturb(sampler.Sampler(kind, stacked=STACKED), tree, key, scale)
    by_hand = jax.tree.map(
      lambda leaf, z, scale=scale: leaf + np.float32(scale) * z, tree, z
    )
    jax.tree.map(functools.partial(_close, tolerance=1e-6), arrays, by_hand)
    _close(got, _model(by_hand, ids))


@kinds
def test_a_tangent_is_z(kind):
  # jvp by the scale: what the exact estimator takes.
  tree, key = _tree(), _key(4)
  ids = jnp.array([[3, 3, 15], [0, 7, 1]])
  run = lambda scale: _model(_nodes(kind, tree, key, scale), ids)
  _, got = jax.jit(lambda: jax.jvp(run, (0.0,), (1.0,)))()
  z = _z(kind, tree, key)
  z["offset"] = np.zeros(8, jax.dtypes.float0)
  _, right = jax.jit(
    lambda tree, z: jax.jvp(lambda tree: _model(tree, ids), (tree,), (z,)),
  )(
    {n: v for n, v in tree.items() if n != "offset"},
    {n: v for n, v in z.items() if n != "offset"},
  )
  _close(got, right, 1e-4)


@kinds
def test_half_precision(kind):
  rng = np.random.default_rng(5)

  @jax.jit
  def read(node, x):
    return (
      perturbed.read(node),
      perturbed.take(node, jnp.arange(3)),
      perturbed.dot(x, node),
      perturbed.dot_transposed(x[:, :8], node),
    )

  for dtype in (jnp.bfloat16, jnp.float16):
    weight = jnp.asarray(rng.normal(size=(20, 8)), dtype)
    x = jnp.asarray(rng.normal(size=(3, 20)), dtype)
    node, whole = _node(kind, weight, 0.25)
    # z is drawn in float32, and the sum is rounded once.
    value, rows, product, scores = read(node, x)
    np.testing.assert_array_equal(value, whole)
    assert rows.dtype == product.dtype == dtype
    exact = np.array(x, np.float64) @ np.array(whole, np.float64)
    _close(product, exact, 8 * float(jnp.finfo(dtype).eps))
    assert scores.dtype == jnp.float32


@pytest.mark.many_devices
@kinds
def test_same_bits_on_a_mesh(kind):
  mesh = jax.make_mesh(
    (2, 2, 2), ("data", "fsdp", "model"), axis_types=(AxisType.Auto,) * 3
  )
  tree = {
    "embed": jnp.zeros((16, 136)),
    "layers": {"kernel": jnp.zeros((2, 16, 128))},
  }
  place = lambda *axes: NamedSharding(mesh, P(*axes))
  shardings = {
    "embed": place(("data", "model"), "fsdp"),
    "layers": {"kernel": place(None, "model", "fsdp")},
  }
  key = _key(6)
  expected = _z(kind, tree, key)

  def read(tree, key):
    nodes = _nodes(kind, tree, key, 1.0)
    _, layers = jax.lax.scan(
      lambda carry, layer: (carry, perturbed.materialize(layer)),
      0,
      nodes["layers"],
    )
    embed = perturbed.take(nodes["embed"], jnp.arange(16))
    return {"embed": embed, "layers": layers}

  got = jax.jit(read, out_shardings=shardings)(
    jax.device_put(tree, shardings), key
  )
  _same(got, expected)
