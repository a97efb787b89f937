"""Writes along directions: sums, subsets, rounding, meshes."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from zofo_jax.core import directions, perturbed
from zofo_jax.core import keys as keys_lib
from zofo_jax.core import sampler as sampler_lib
from zofo_jax.core import tree as tree_lib

STACKED = r"(^|/)layers/"

RADEMACHER = directions.Rademacher()
KINDS = [
  RADEMACHER,
  directions.LowRank(2),
  directions.PerExample(),
  directions.Sparse(),
]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda k: type(k).__name__)
HALF = [jnp.bfloat16, jnp.float16]
LAYERS = 4


def _keys(count, seed=0):
  direction_key, subspace_key = jax.random.split(jax.random.key(seed))
  return keys_lib.DirectionKey(
    jax.random.split(direction_key, count), subspace_key
  )


def _tree(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  return {
    "embed": draw(16, 8),
    "layers": {"kernel": draw(LAYERS, 8, 6), "bias": draw(LAYERS, 6)},
    "norm": draw(8),
    "temperature": jnp.asarray(1.5, dtype),
    "offset": jnp.arange(8, dtype=jnp.int32),
  }


def _small_tree(dtype=jnp.float32):
  """A part of it, where every leaf costs several programs."""
  tree = _tree(dtype)
  return {name: tree[name] for name in ("layers", "norm")}


@functools.partial(jax.jit, static_argnums=0)
def _add(sampler, *arguments, **options):
  return sampler.apply_directions(*arguments, **options)


@functools.partial(jax.jit, static_argnums=0)
def _perturb(sampler, *arguments):
  return sampler.perturb(*arguments)


@functools.partial(jax.jit, static_argnums=0)
def _write(sampler, *arguments):
  return sampler.weighted_sum(*arguments)


@functools.partial(jax.jit, static_argnums=0)
def _z(kind, tree, key):
  """Draws one z leaf by leaf."""
  leaf_keys = keys_lib.leaf_keys(key, tree, stacked=STACKED)
  draw = lambda key, leaf: kind.mask(kind.sample(key, leaf.shape), leaf)

  def leaf_z(path, leaf, key):
    if leaf.dtype == jnp.int32:
      return jnp.zeros(leaf.shape)
    stacked = "layers" in tree_lib.path_name(path)
    return jax.vmap(draw)(key, leaf) if stacked else draw(key, leaf)

  return jax.tree.map_with_path(leaf_z, tree, leaf_keys)


def _same(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  jax.tree.map(np.testing.assert_array_equal, left, right)


def _close(left, right, **tolerances):
  tolerances = dict(rtol=1e-5, atol=1e-5) | tolerances
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **tolerances), left, right
  )


# Of one direction, the kinds differ in whether layers are written at once.
@pytest.mark.parametrize(
  "kind, count",
  [(RADEMACHER, 1), (directions.Sparse(), 1), *((kind, 3) for kind in KINDS)],
  ids=str,
)
def test_add_and_write_equal_a_slow_loop(kind, count):
  tree, keys = _tree(), _keys(count)
  weights = np.array([0.5, -2.0, 1e-3], np.float32)[:count]
  total = jax.tree.map(lambda leaf: np.zeros(leaf.shape), tree)
  for q, weight in enumerate(weights):
    total = jax.tree.map(
      lambda t, z, weight=weight: t + float(weight) * np.array(z, np.float64),
      total,
      _z(kind, tree, keys._replace(direction=keys.direction[q])),
    )
  sampler = sampler_lib.Sampler(kind, stacked=STACKED)
  written = _write(sampler, tree, keys, weights)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(written))
  _close(written, total)
  moved = _add(sampler, tree, keys, weights)
  _close(moved, jax.tree.map(lambda leaf, t: leaf + t, tree, total))
  assert moved["offset"].dtype == jnp.int32


@kinds
def test_write_is_add_on_zeros(kind):
  zeros = jax.tree.map(jnp.zeros_like, _tree())
  arguments = (zeros, _keys(3), jnp.array([0.5, -2.0, 0.25]))
  sampler = sampler_lib.Sampler(kind, stacked=STACKED)
  _same(_write(sampler, *arguments), _add(sampler, *arguments))


def _kernels(name):
  return name.endswith("kernel")


def test_select_leaves_the_rest_untouched():
  tree, keys = _tree(), _keys(1)
  sampler = sampler_lib.Sampler(
    RADEMACHER, select=_kernels, lazy=True, stacked=STACKED
  )
  nodes = sampler.perturb(
    tree, keys_lib.DirectionKey(keys.direction[0], keys.subspace), 0.1
  )
  moved = _add(sampler, tree, keys, jnp.ones(1), decay=0.5)
  z = _write(sampler, tree, keys, jnp.ones(1))
  everything = _write(
    sampler_lib.Sampler(RADEMACHER, stacked=STACKED), tree, keys, jnp.ones(1)
  )
  kernel = lambda tree: tree["layers"].pop("kernel")
  # What is left out changes nothing for the rest.
  np.testing.assert_array_equal(kernel(z), kernel(everything))
  assert perturbed.is_perturbed(kernel(nodes))
  before = kernel(tree)
  assert np.all(np.abs(kernel(moved) - before) > 0)
  assert all(a is b for a, b in zip(*map(jax.tree.leaves, (nodes, tree))))
  _same(moved, tree)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(z))


@pytest.mark.parametrize(
  "kind, layers",
  [
    (RADEMACHER, (2,)),
    *(pytest.param(kind, (0, 3), marks=pytest.mark.slow) for kind in KINDS[1:]),
  ],
  ids=str,
)
def test_layers_leave_the_others_untouched(kind, layers):
  tree, keys = _small_tree(jnp.bfloat16), _keys(2)
  sampler = sampler_lib.Sampler(kind, layers=layers, stacked=STACKED)
  everything = sampler_lib.Sampler(kind, stacked=STACKED)
  weights = jnp.array([1.0, 0.25])
  key = keys_lib.DirectionKey(keys.direction[0], keys.subspace)
  others = [layer for layer in range(LAYERS) if layer not in layers]
  for run in (
    lambda s: _add(s, tree, keys, weights, rounding_key=jax.random.key(1)),
    lambda s: _perturb(s, tree, key, 0.5),
  ):
    some, full = run(sampler), run(everything)
    for name in ("kernel", "bias"):
      new, all_of_it, old = (t["layers"][name] for t in (some, full, tree))
      for layer in layers:
        np.testing.assert_array_equal(new[layer], all_of_it[layer])
      for layer in others:
        np.testing.assert_array_equal(new[layer], old[layer])
    some.pop("layers"), full.pop("layers")
    _same(some, full)  # leaves outside the stack move as ever
  written = _write(sampler, tree, keys, weights)["layers"]
  for leaf in jax.tree.leaves(written):
    assert not np.any(leaf[np.array(others)]) and np.any(leaf[np.array(layers)])


def test_decay_skips_vectors():
  tree, keys = _tree(), _keys(1)
  moved = _add(
    sampler_lib.Sampler(RADEMACHER, stacked=STACKED),
    tree,
    keys,
    jnp.zeros(1),
    decay=0.25,
  )
  _close(moved["embed"], 0.75 * tree["embed"], rtol=1e-7)
  layers = moved["layers"]
  _close(layers["kernel"], 0.75 * tree["layers"]["kernel"], rtol=1e-7)
  for got, old in (
    (layers["bias"], tree["layers"]["bias"]),
    (moved["norm"], tree["norm"]),
    (moved["temperature"], tree["temperature"]),
  ):
    np.testing.assert_array_equal(got, old)


@pytest.mark.many_devices
@kinds
def test_sharded_rows_exchange_nothing(kind):
  # Each device draws its own rows of z and moves its own weights.
  mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
  sharding = NamedSharding(mesh, P(None, "fsdp"))
  # A multiple of 64 rows on each: below that, words of bits are exchanged.
  kernel = np.random.default_rng(0).normal(size=(2, 512, 136))
  whole = {"layers": {"kernel": jnp.asarray(kernel, jnp.bfloat16)}}
  tree = jax.device_put(whole, sharding)
  sampler = sampler_lib.Sampler(kind, stacked=STACKED)
  arguments = (_keys(2), jnp.array([0.5, -1.0]))
  add = jax.jit(
    functools.partial(sampler.apply_directions, rounding_key=jax.random.key(4)),
    donate_argnums=0,
  ).lower(tree, *arguments)
  compiled = add.compile()
  for collective in ("all-gather", "all-reduce", "all-to-all", "permute("):
    assert collective not in compiled.as_text()
  expected = _add(sampler, whole, *arguments, rounding_key=jax.random.key(4))
  _same(compiled(tree, *arguments), expected)


_SHAPES = strategies.lists(strategies.integers(1, 9), max_size=3).map(tuple)


@pytest.mark.slow
@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
@hypothesis.given(
  kind=strategies.sampled_from(KINDS),
  plain=strategies.dictionaries(
    strategies.sampled_from("abc"), _SHAPES, max_size=2
  ),
  stacked=strategies.lists(_SHAPES, max_size=1),
  dtype=strategies.sampled_from([jnp.float32, *HALF]),
)
def test_any_tree_is_perturbed_as_it_is_updated(kind, plain, stacked, dtype):
  rng = np.random.default_rng(0)
  tree = {name: rng.normal(size=shape) for name, shape in plain.items()}
  tree["layers"] = [rng.normal(size=(2, *shape)) for shape in stacked]
  tree = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)
  keys = _keys(1)
  sampler = sampler_lib.Sampler(kind, stacked=STACKED)
  key = keys_lib.DirectionKey(keys.direction[0], keys.subspace)
  shifted = _perturb(sampler, tree, key, 0.5)
  moved = _add(sampler, tree, keys, jnp.array([0.5]))
  assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(moved))
  # float32 sums may be fused differently, by an ulp of either term.
  eps = 4 * float(jnp.finfo(dtype).eps)
  _close(moved, shifted, rtol=eps, atol=eps)


# Of several directions a kind is summed by the loop or by its own product.
@pytest.mark.parametrize(
  "kind, count",
  [
    *((kind, 1) for kind in (*KINDS, directions.Gaussian())),
    (directions.LowRank(40), 1),
    *((kind, 3) for kind in KINDS),
  ],
  ids=str,
)
def test_a_donated_tree_is_written_in_place(kind, count):
  sampler, keys = sampler_lib.Sampler(kind, stacked=STACKED), _keys(count)
  tree = {"layers": {"kernel": jnp.zeros((24, 256, 512))}}
  add = jax.jit(
    lambda tree, c: sampler.apply_directions(tree, keys, c), donate_argnums=0
  )
  compiled = add.lower(tree, jnp.ones(count)).compile()
  memory = compiled.memory_analysis()
  leaf = tree["layers"]["kernel"]
  assert memory.alias_size_in_bytes >= leaf.nbytes
  # A few layers of 24, and a low-rank kind's factors of all of them.
  assert memory.temp_size_in_bytes < 0.5 * leaf.nbytes


@pytest.mark.parametrize(
  "platform, loops", [("cpu", False), ("cuda", False), ("tpu", True)]
)
def test_layers_are_written_at_once_or_one_by_one(platform, loops):
  sampler, keys = (
    sampler_lib.Sampler(directions.Gaussian(), stacked=STACKED),
    _keys(1),
  )
  tree = {"layers": {"kernel": jnp.zeros((24, 256, 512))}}
  lowered = (
    jax.jit(lambda tree, c: sampler.apply_directions(tree, keys, c))
    .trace(tree, jnp.ones(1))
    .lower(lowering_platforms=(platform,))
  )
  assert ("dynamic_update_slice" in lowered.as_text()) == loops


def test_no_layer_may_move():
  tree, keys = _tree(), _keys(1)
  sampler = sampler_lib.Sampler(RADEMACHER, layers=(), stacked=STACKED)
  new = _add(sampler, tree, keys, jnp.ones(1))
  key = keys_lib.DirectionKey(keys.direction[0], keys.subspace)
  read = jax.jit(lambda tree: sampler.perturb(tree, key, 0.5))(tree)
  for moved in (new, read):
    jax.tree.map(np.testing.assert_array_equal, moved["layers"], tree["layers"])
    assert np.all(np.asarray(moved["embed"]) != np.asarray(tree["embed"]))


@pytest.mark.parametrize(
  "kind, dtype, count",
  [
    *((kind, jnp.bfloat16, 1) for kind in KINDS),
    (RADEMACHER, jnp.float32, 1),
    (RADEMACHER, jnp.float32, 3),
    (directions.LowRank(2), jnp.bfloat16, 3),
    (directions.PerExample(), jnp.float32, 3),
    (directions.Sparse(), jnp.bfloat16, 3),
  ],
)
def test_a_table_by_blocks_of_rows_is_the_table_at_once(
  kind, dtype, count, monkeypatch
):
  # Two blocks and a rest; on CPU the whole is written at once.
  monkeypatch.setattr(perturbed, "ROWS_PER_BLOCK", 64)
  tree = {"table": jnp.asarray(np.random.default_rng(1).normal(size=(150, 6)))}
  tree = jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
  arguments = (tree, _keys(count), jnp.linspace(0.5, 1.0, count))
  options = {"decay": 0.1, "rounding_key": jax.random.key(5)}
  sampler = sampler_lib.Sampler(kind, stacked=STACKED)

  def add():
    # A new function each time: jit would take what it has traced before.
    run = lambda *given: sampler.apply_directions(*given, **options)
    return jax.jit(run)(*arguments)

  at_once = add()

  def default(*operands, default, **branches):
    del branches
    return default(*operands)

  monkeypatch.setattr(jax.lax, "platform_dependent", default)
  by_blocks = add()
  np.testing.assert_array_equal(at_once["table"], by_blocks["table"])


@dataclasses.dataclass(frozen=True)
class Summed(directions.Rademacher):
  """A user's kind with `sample` and `weighted_sum` alone."""

  def weighted_sum(self, keys, weights, shape):
    z = jax.vmap(lambda key: self.sample(key, shape))(keys)
    return jnp.tensordot(weights, z, 1)


def test_a_users_weighted_sum_serves_a_table_of_many_rows(monkeypatch):
  tree, weights = jnp.ones((4101, 4)), jnp.array([0.5, -0.25])
  assert len(tree) > perturbed.ROWS_PER_BLOCK

  def default(*operands, default, **branches):  # as on an accelerator
    del branches
    return default(*operands)

  monkeypatch.setattr(jax.lax, "platform_dependent", default)
  moved = _add(sampler_lib.Sampler(Summed()), tree, _keys(2), weights)
  expected = _add(sampler_lib.Sampler(RADEMACHER), tree, _keys(2), weights)
  np.testing.assert_array_equal(moved, expected)
