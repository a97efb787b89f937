"""A grid of devices: what lies where, and the same numbers on every one."""

import functools
import re
from typing import NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zofo_jax as zofo
from tests.models.reference import make_logits
from zofo_jax import adapters, errors, models
from zofo_jax.builders import model as model_lib
from zofo_jax.core import directions, losses, outer, sampler
from zofo_jax.core import keys as keys_lib
from zofo_jax.models.decoder import STACKED
from zofo_jax.models.hf import published, weights
from zofo_jax.plan import hlo
from zofo_jax.sharding import dispatch
from zofo_jax.sharding import mesh as mesh_lib
from zofo_jax.sharding import rules as rules_lib

pytestmark = pytest.mark.many_devices

ONE = {"data": 1, "fsdp": 1, "model": 1, "pert": 1}
CONFIGS = {
  "llama": {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
  },
  "opt": {
    "model_type": "opt",
    "vocab_size": 96,
    "hidden_size": 32,
    "word_embed_proj_dim": 16,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
  },
}
# Some weights of every sort: each that moves is more to compile.
SAMPLER = sampler.Sampler(
  directions.Rademacher(),
  select=re.compile("embed|query|down|norm").search,
  stacked=STACKED,
  lazy=True,
)
ROWS, LENGTH, T, EPS, PENALTY = 8, 12, 2, 0.02, 2.0


@functools.cache
def model(name="llama"):
  """Returns a module, its family and its weights in NumPy."""
  module, family = models.from_hf(CONFIGS[name])
  ids = jnp.ones((1, 4), jnp.int32)
  base = module.init(jax.random.key(0), ids, ids > 0, method="logits")
  # Far larger than at a fresh start, so that every weight matters.
  grow = lambda leaf: np.asarray(leaf) * (8.0 if leaf.ndim > 2 else 1.0)
  return module, family, jax.tree.map(grow, base["params"])


def rows(*lead, seed=0):
  rng = np.random.default_rng(seed)
  shape = (*lead, ROWS, 1)
  draw = lambda high, *tail: rng.integers(high, size=(*shape, *tail), dtype="i")
  return losses.Batch(
    tokens=draw(96, LENGTH),
    mask=np.ones((*shape, LENGTH), bool),
    positions=draw(LENGTH, 2),
    target_slot=draw(2, 3),
    target_token=draw(96, 3),
    target_option=draw(2, 3),
    target_weight=np.ones((*shape, 3), np.float32),
    label=rng.integers(2, size=shape[:-1], dtype="i"),
    option_mask=np.ones((*shape[:-1], 2), bool),
    example_weight=np.ones(shape[:-1], np.float32),
  )


BATCH = zofo.BilevelBatch(
  lower=rows(T), penalty=rows(seed=1), upper=rows(seed=2)
)


def loss_on(mesh):
  module = model()[0].clone(
    constrain=rules_lib.make_activation_constraint(mesh)
  )
  return model_lib.make_loss_fn("likelihood", module)


def algorithm(mesh):
  return zofo.make_bilevel_step(
    loss_on(mesh),
    lower_tx=optax.sgd(1e-2),
    upper_tx=optax.sgd(1e-2),
    base_tx=outer.sgd(1.0),
    zo=zofo.ZerothOrder(
      SAMPLER, num_directions=2, map_fn=dispatch.map_directions(mesh)
    ),
  )


def start(bilevel, base):
  make = lambda seed: adapters.init_lora(
    jax.random.key(seed), base, rank=2, alpha=4.0, targets=adapters.QUERY_VALUE
  )
  return bilevel.init(jax.random.key(7), base, make(1), make(2))


def iterate(sizes):
  """Takes an outer iteration on a mesh; returns state and info as NumPy."""
  mesh = mesh_lib.make(ONE | sizes)
  bilevel = algorithm(mesh)
  state = start(bilevel, jax.tree.map(jnp.asarray, model()[2]))
  rules = model()[1].SHARDINGS
  whole = rules_lib.replicated(mesh)
  places = jax.tree.map(lambda _: whole, state)
  places = places._replace(base=rules_lib.shardings(mesh, state.base, rules))
  batch = zofo.BilevelBatch(
    lower=dispatch.shard_batch(mesh, BATCH.lower, 1),
    penalty=dispatch.shard_batch(mesh, BATCH.penalty),
    upper=dispatch.shard_batch(mesh, BATCH.upper),
  )
  step = jax.jit(bilevel.step, donate_argnums=0, out_shardings=(places, whole))
  state, info = step(
    jax.device_put(state, places),
    batch,
    zofo.BilevelHParams(EPS, PENALTY),
  )
  for leaf, place in zip(
    jax.tree.leaves(state), jax.tree.leaves(places), strict=True
  ):
    assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
  state = state._replace(key=jax.random.key_data(state.key))
  return jax.device_get((state, info))


@functools.cache
def alone():
  return iterate({})


@pytest.mark.parametrize(
  "sizes",
  [
    {"fsdp": 2, "model": 2, "pert": 2},
    *(
      pytest.param(sizes, marks=pytest.mark.slow)
      for sizes in (
        {"data": 8},
        {"fsdp": 4},
        {"data": 2, "model": 2, "pert": 2},
      )
    ),
  ],
  ids=lambda sizes: "-".join(f"{k}{v}" for k, v in sizes.items()),
)
def test_an_iteration_is_the_same_on_every_mesh(sizes):
  state, info = iterate(sizes)
  one_state, one_info = alone()
  # A few ulps of each loss, in another order, over eps.
  scale = one_info.upper_loss + 2 * PENALTY * one_info.penalty_loss
  atol = 8 * 2.0**-23 * scale / EPS
  close = np.testing.assert_allclose
  close(info.coefficients, one_info.coefficients, rtol=1e-4, atol=atol)
  assert np.abs(one_info.coefficients).min() > 100 * atol
  # The weights moved along the same z, to the bit: what differs is c alone.
  jax.tree.map(
    lambda a, b: close(a, b, rtol=1e-6, atol=2 * atol),
    state.base,
    one_state.base,
  )
  for part in ("lower", "upper"):
    jax.tree.map(
      lambda a, b: close(a, b, rtol=1e-4, atol=1e-5),
      getattr(state, part),
      getattr(one_state, part),
    )


@pytest.mark.slow  # as leaves: core/directions_test.py
@pytest.mark.parametrize(
  "kind",
  [directions.Rademacher(), directions.Gaussian(), directions.LowRank(2)],
  ids=lambda kind: type(kind).__name__,
)
def test_z_has_the_same_bits_on_every_mesh(kind):
  _, family, base = model("opt")
  some = sampler.Sampler(kind, stacked=STACKED)
  keys = keys_lib.DirectionKey(
    jax.random.split(jax.random.key(3), 1), jax.random.key(4)
  )

  def draw(base):
    return some.weighted_sum(base, keys, jnp.ones(1))

  one = jax.jit(draw)(base)
  assert any(np.any(leaf) for leaf in jax.tree.leaves(one))
  mesh = mesh_lib.make({"data": 1, "fsdp": 2, "model": 4, "pert": 1})
  places = rules_lib.shardings(mesh, base, family.SHARDINGS)
  jitted = jax.jit(draw, out_shardings=places)
  many = jitted(jax.device_put(base, places))
  jax.tree.map(np.testing.assert_array_equal, many, one)


# What is said of every mesh and every weight.


@pytest.mark.parametrize(
  "name",
  [name for name in published.CONFIGS if "350m" in name or "1.3b" in name]
  + ["meta-llama/Llama-2-7b-hf", "Qwen/Qwen2.5-7B"],
)
def test_every_weight_has_a_rule(name):
  module, family = models.from_hf(published.CONFIGS[name])
  shapes = {
    path: jax.ShapeDtypeStruct(shape, jnp.float32)
    for path, shape in weights.shapes(family, module.config).items()
  }
  mesh = mesh_lib.abstract(ONE | {"fsdp": 2, "model": 4}, 8)
  places = rules_lib.shardings(mesh, shapes, family.SHARDINGS)
  # What is large is divided among all.
  for path, place in places.items():
    part = np.prod(place.shard_shape(shapes[path].shape))
    assert part * 8 == np.prod(shapes[path].shape) or part < 1e6, path


@pytest.mark.parametrize("name", make_logits.CASES)
def test_every_weight_of_every_feature_has_a_rule(name):
  """Biases, untied heads, projections: what published models have not all."""
  module, family = models.from_hf(make_logits.CASES[name])
  shapes = {
    path: jax.ShapeDtypeStruct(shape, jnp.float32)
    for path, shape in weights.shapes(family, module.config).items()
  }
  rules_lib.shardings(mesh_lib.abstract(ONE, 1), shapes, family.SHARDINGS)


def test_a_weight_without_a_rule():
  mesh = mesh_lib.make(ONE)
  tree = {"layers": {"gate": {"kernel": jnp.ones((2, 4, 4))}}}
  with pytest.raises(errors.UserError, match=r"no rule.* layers/gate/kernel"):
    rules_lib.shardings(mesh, tree, models.opt.SHARDINGS)


def test_rules_tell_embeddings_apart():
  place = jax.sharding.PartitionSpec
  mesh = mesh_lib.abstract(ONE | {"fsdp": 2}, 2)
  tree = {"my_embed": {"embedding": jnp.ones((6, 12))}}
  rules = (*models.opt.SHARDINGS, (r"my_embed/embedding$", place("fsdp")))
  (found,) = jax.tree.leaves(rules_lib.shardings(mesh, tree, rules))
  assert found.spec == place("fsdp")


def test_a_weight_that_is_not_divided():
  mesh = mesh_lib.abstract(ONE | {"model": 8}, 8)
  tree = {"embed": {"embedding": jnp.ones((6, 12))}}
  with pytest.raises(errors.UserError, match=r"12 on axis 1.*mesh.model=8"):
    rules_lib.shardings(mesh, tree, models.opt.SHARDINGS)


@pytest.mark.parametrize(
  "sizes, message",
  [
    ({"data": -1, "model": -1}, "one of them -1"),
    ({"data": 0}, "mesh.data=0"),
    ({"data": -1, "model": 3}, "takes 3 devices; expected a divisor"),
    ({"data": 4, "model": 4}, "takes 16 devices; expected at most"),
  ],
)
def test_meshes_that_there_are_not(sizes, message):
  with pytest.raises(errors.UserError, match=message):
    mesh_lib.make(ONE | sizes)


def test_the_rest_of_the_devices():
  mesh = mesh_lib.make(ONE | {"data": -1, "model": 2})
  assert dict(mesh.shape) == ONE | {"data": 4, "model": 2}
  assert mesh_lib.make(ONE).size == 1  # the others idle


def test_rows_and_directions_that_are_not_divided():
  mesh = mesh_lib.abstract(ONE | {"data": 2, "fsdp": 2, "pert": 2}, 8)
  mesh_lib.check_rows(mesh, {"lower.batch_size": 8})
  with pytest.raises(errors.UserError, match=r"lower.batch_size: 6 .* of 4"):
    mesh_lib.check_rows(mesh, {"lower.batch_size": 6})
  mesh_lib.check_directions(mesh, 4)
  with pytest.raises(errors.UserError, match=r"num_directions: 3 .*pert=2"):
    mesh_lib.check_directions(mesh, 3)


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_read_in_parts(name, tmp_path):
  module, family, base = model(name)
  weights.save(tmp_path, family, module.config, base, shard_bytes=20_000)
  mesh = mesh_lib.make(ONE | {"fsdp": 2, "model": 2})
  places = flax.traverse_util.flatten_dict(
    rules_lib.shardings(mesh, base, family.SHARDINGS), sep="/"
  )
  largest = {}

  def make(path, shape, read):
    def noted(index):
      part = read(index)
      largest[path] = max(largest.get(path, 0), part.size)
      return part

    return dispatch.make_sharded_array(shape, places[path], noted)

  loaded = weights.load(
    tmp_path, family, module.config, np.dtype("float32"), make
  )
  jax.tree.map(np.testing.assert_array_equal, loaded, base)
  for path, leaf in flax.traverse_util.flatten_dict(loaded, sep="/").items():
    assert leaf.sharding == places[path]
    assert largest[path] == leaf.addressable_shards[0].data.size
  kernel = "layers/attention/query/kernel"
  assert (
    4 * largest[kernel] == base["layers"]["attention"]["query"]["kernel"].size
  )


def test_each_weight_is_gathered_once_a_pass():
  _, family, base = model()
  mesh = mesh_lib.make(ONE | {"fsdp": 8})
  places = rules_lib.shardings(mesh, base, family.SHARDINGS)
  loss_fn = loss_on(mesh)
  compiled = (
    jax.jit(loss_fn, static_argnums=3)
    .lower(
      rules_lib.with_shardings(base, places),
      {},
      dispatch.shard_batch(mesh, BATCH.upper),
      None,
    )
    .compile()
  )
  exchanges = hlo.collectives(compiled.as_text())
  gathered = [one for one in exchanges if one[0] == "all-gather"]
  size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
  layers = base["layers"]
  kernels = size((layers["attention"], layers["mlp"]))
  assert sum(n * times for _, n, times in gathered if times > 1) == kernels
  assert sum(n * times for _, n, times in gathered) < size(base) * 1.01


class _Chip(NamedTuple):
  """What arranging asks of a TPU's chip."""

  id: int
  coords: tuple[int, int, int]
  platform: str = "tpu"
  device_kind: str = "TPU v6 lite"
  process_index: int = 0
  core_on_chip: int = 0


def test_an_axis_may_be_a_part_of_a_torus(monkeypatch):
  chips = [_Chip(i, (i % 4, i // 4, 0)) for i in range(16)]
  kept = []
  monkeypatch.setattr(
    jax.sharding, "Mesh", lambda grid, names, **_: kept.append(grid) or grid
  )
  sizes = {"pert": 1, "data": 8, "fsdp": 1, "model": 2}
  grid = mesh_lib.make(sizes, chips)
  assert grid.shape == (1, 8, 1, 2)
  assert sorted(chip.id for chip in grid.ravel()) == list(range(16))
  for pair in grid.reshape(8, 2):  # neighbours exchange most
    far = np.abs(np.subtract(pair[0].coords, pair[1].coords)).sum()
    assert far == 1


def test_on_cpus_a_step_is_scheduled_for_memory():
  def step(state, batch):
    products = [jnp.sin(state + i) @ batch for i in range(12)]
    return sum(jnp.cos(one) @ one for one in products), 0.0

  mesh = mesh_lib.make(ONE)
  x = jnp.ones((256, 256))
  temporaries = [
    jitted.lower(x, x).compile().memory_analysis().temp_size_in_bytes
    for jitted in (
      dispatch.jit_step(step, mesh, rules_lib.replicated(mesh)),
      jax.jit(step, donate_argnums=0),
    )
  ]
  # Not twelve products at once.
  assert temporaries[0] < 0.7 * temporaries[1]
