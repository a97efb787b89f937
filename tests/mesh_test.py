"""A grid of devices: what lies where, and the same numbers on every one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zofo_jax as zofo
from zofo_jax import (
  adapters,
  backbone,
  directions,
  losses,
  models,
  outer,
  sampler,
)
from zofo_jax import mesh as mesh_lib

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
SAMPLER = sampler.Sampler(directions.Rademacher(), lazy=True)
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


def algorithm(**options):
  return zofo.make_bilevel_step(
    backbone.make_loss_fn("likelihood", model()[0]),
    lower_tx=optax.sgd(1e-2),
    upper_tx=optax.sgd(1e-2),
    base_tx=outer.sgd(1.0),
    sampler=SAMPLER,
    num_directions=2,
    **options,
  )


def start(bilevel, base):
  make = lambda seed: adapters.init_lora(
    jax.random.key(seed), base, rank=2, alpha=4.0, targets=adapters.QUERY_VALUE
  )
  return bilevel.init(jax.random.key(7), base, make(1), make(2))


def iterate(sizes):
  """Takes an outer iteration on a mesh; returns state and info as NumPy."""
  mesh = mesh_lib.make(ONE | sizes)
  bilevel = algorithm(map_fn=mesh_lib.map_directions(mesh))
  state = start(bilevel, jax.tree.map(jnp.asarray, model()[2]))
  rules = model()[1].SHARDINGS
  whole = mesh_lib.everywhere(mesh)
  places = jax.tree.map(lambda _: whole, state)
  places = places._replace(
    base=mesh_lib.shardings(mesh, state.base, rules),
  )
  batch = zofo.BilevelBatch(
    lower=mesh_lib.put_rows(mesh, BATCH.lower, 1),
    penalty=mesh_lib.put_rows(mesh, BATCH.penalty),
    upper=mesh_lib.put_rows(mesh, BATCH.upper),
  )
  step = jax.jit(bilevel.step, donate_argnums=0, out_shardings=(places, whole))
  state, info = step(
    jax.device_put(state, places),
    batch,
    zofo.BilevelHParams(np.float32(EPS), np.float32(PENALTY)),
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
    {"data": 8},
    {"fsdp": 4},
    {"model": 4},
    {"pert": 2},
    {"data": 2, "model": 2, "pert": 2},
    {"data": 2, "fsdp": 2, "model": 2},
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
