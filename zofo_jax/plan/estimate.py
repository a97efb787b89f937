"""Estimates from shapes alone: a run's bytes per chip, and its operations."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from zofo_jax.builders import budget, storage
from zofo_jax.builders import run as run_lib
from zofo_jax.config import methods
from zofo_jax.core import offload
from zofo_jax.core import tree as tree_lib
from zofo_jax.core.array_like import is_array_like
from zofo_jax.core.types import BilevelBatch, BilevelHParams, BilevelState
from zofo_jax.data import batching, encode_options
from zofo_jax.sharding import mesh as mesh_lib
from zofo_jax.sharding import rules


def abstract_batch(run: run_lib.Run) -> BilevelBatch:
  """Returns the shapes and shardings of an iteration's batch.

  Rows have the longest training length and two options of one token, as in
  SST-2.
  """
  length = run.encoder.max_train_length
  shape = batching.Shape(1, length, 1, 2, 2)
  row = encode_options.EncodedRow((0,) * length, (length - 1,), ((0, 0, 0),))
  example = encode_options.Example((row,), 0, (0,), (True, True), "")
  batch = batching.collate([example], shape, pad=0)

  def rows(size, *lead):
    return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        (*lead, size, *leaf.shape[1:]),
        leaf.dtype,
        sharding=rules.batch_sharding(run.mesh, len(lead)),
      ),
      batch,
    )

  guide, num_probe = run.base_update.guide, run.batch_sizes.probe
  return BilevelBatch(
    lower=rows(run.batch_sizes.lower, run.inner_steps),
    penalty=rows(run.batch_sizes.upper),
    upper=rows(run.batch_sizes.upper),
    probe=rows(num_probe, guide.rule.num_updates)
    if guide and num_probe
    else None,
    scores=jax.ShapeDtypeStruct(
      (run.base_update.zo.num_directions, 2), "float32"
    )
    if methods.uses_reward(run.config.method, run.config.zo.objective)
    else None,
  )


def abstract_prompts(run: run_lib.Run) -> tuple[Any, Any, Any]:
  """Returns the shapes and shardings of prompts that a population answers.

  Args:
    run: the run.

  Returns:
    Tokens and mask, of the longest training length, and numbers of the rows.
  """
  size, length = run.batch_sizes.upper, run.encoder.max_train_length
  sharding = rules.batch_sharding(run.mesh, 0)
  tokens, mask, numbers = (
    jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    for shape, dtype in (
      ((size, length), "int32"),
      ((size, length), "bool"),
      ((size,), "uint32"),
    )
  )
  return tokens, mask, numbers


def state_bytes(state: BilevelState) -> dict[str, int]:
  """Returns the bytes per chip of the weights, and of the rest of a state.

  Without those that are in the host's memory.
  """
  weights = _local_bytes(state.base)
  return {"weights": weights, "optimizer": _local_bytes(state) - weights}


def host_bytes(state: BilevelState) -> int:
  """Returns the bytes per chip of the weights in the host's memory."""
  return _local_bytes(state.base, on_host=True)


def _local_bytes(tree: Any, on_host: bool = False) -> int:
  """Counts the bytes of a tree of shapes with shardings, for one device."""
  return sum(
    storage.array_bytes(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
    for leaf in jax.tree.leaves(tree)
    if _is_on_host(leaf) == on_host
  )


def _is_on_host(leaf: Any) -> bool:
  """Returns whether a shape with a sharding is in the host's memory."""
  return leaf.sharding.memory_kind == offload.MEMORY_KIND


def _stored(leaf: Any) -> Any:
  """Returns the array that has the shape of a weight: of a node, its values."""
  return jax.tree.leaves(leaf)[0]


def estimate(
  run: run_lib.Run, state: BilevelState, mesh: mesh_lib.AnyMesh
) -> dict[str, int]:
  """Estimates the bytes per chip from shapes alone, named as in a plan.

  Counts a layer's activations as if all were alive at once, with attention
  scores in float32. A zeroth-order step has those of both signs, a layer
  of weights, and of its largest matrix the direction and both signs. A backward
  pass keeps every product, or with `model.remat` what enters each layer.

  Args:
    run: the run, on any mesh.
    state: its shapes.
    mesh: the mesh to estimate for.

  Raises:
    UserError: the mesh does not divide weights, rows or directions.
  """
  batch_sizes, module = run.batch_sizes, run.model.module
  run_lib.check_mesh(mesh, batch_sizes, run.base_update.zo.num_directions)
  shardings = rules.state_shardings(
    mesh, state, run.model.family.SHARDINGS, run.model.on_host
  )
  state = rules.with_shardings(state, shardings)
  stored, base = state_bytes(state), state.base
  kernels = [
    leaf
    for name, leaf in tree_lib.named_leaves(
      base["layers"], is_array_like
    ).items()
    if name.endswith("kernel")
  ]
  width, depth = kernels[0].dtype.itemsize, kernels[0].shape[0]
  length = run.encoder.max_train_length
  rows = batch_sizes.upper // (mesh.shape["data"] * mesh.shape["fsdp"])
  tokens = rows * length
  scores = tokens * length * module.config.num_heads // mesh.shape["model"]
  products = sum(leaf.shape[-1] for leaf in kernels) // mesh.shape["model"]
  hidden = tokens * module.config.hidden_size * width  # whole on every chip
  layer = tokens * products * width + 2 * scores * 4 + 2 * hidden
  sizes = [
    math.prod(_stored(leaf).sharding.shard_shape(leaf.shape)[1:])
    for leaf in kernels
  ]
  one_layer = sum(sizes) * width
  # Of the weights, what exists besides them: the layer that is fetched, the one
  # that is dequantized.
  read = (bool(run.model.offload) + bool(run.model.quantize)) * one_layer
  gathered = one_layer * (mesh.shape["fsdp"] - 1)
  forward = read + gathered + layer
  zo_temp = max(read, one_layer) + gathered + 2 * layer
  zo_temp += max(sizes) * mesh.shape["fsdp"] * (2 * width + 4)
  saved = hidden
  if not module.remat:
    saved += (tokens * products + scores) * width
  backward = read + gathered + depth * saved + 2 * layer
  temp = max(zo_temp, backward)
  answers = {}
  if run.reward is not None:
    c = module.config
    cached = 2 * c.num_layers * c.num_kv_heads * c.head_dim * width
    cached *= rows * (length + run.encoder.max_new_tokens)
    members = run.reward.members_at_once
    answers["answers_temp"] = read + members * (cached + 2 * layer)
  return stored | {
    "forward_temp": forward,
    "zo_temp": zo_temp,
    "lora_temp": backward,
    "iteration_temp": temp,
    **answers,
    "total": sum(stored.values()) + max([temp, *answers.values()]),
  }


def memory_by_method(size: Mapping[str, int | None]) -> dict[str, int | None]:
  """Returns the bytes per chip of Bilevel-ZOFO and of its baselines.

  Args:
    size: bytes per chip, named as in a plan; None where not known.

  Returns:
    `bilevel`; `mezo`: the weights and a zeroth-order step; `lora`: one adapter
    of the two, its optimizer and a first-order step; `full`: all weights by
    Adam, which is at least a gradient and two moments of the weights' own
    dtype more than `lora`. None for what rests on a size that is not known.
  """
  weights, optimizer = size["weights"] or 0, size["optimizer"] or 0

  def total(stored, temporaries):
    return None if temporaries is None else stored + temporaries

  return {
    "bilevel": size["total"],
    "mezo": total(weights, size["zo_temp"]),
    "lora": total(weights + optimizer // 2, size["lora_temp"]),
    "full": total(4 * weights, size["lora_temp"]),
  }


def transfers(run: run_lib.Run) -> budget.Transfers:
  """Counts what an iteration copies between host and devices, on all chips.

  What is copied once in several iterations counts as its part of one.
  """
  state = run.abstract_state()
  copied = budget.transfers(
    run.algorithm.step, state, abstract_batch(run), BilevelHParams()
  )
  every = run.config.zo.write_every
  if every == 1:
    return copied
  # The loop that writes has no known length, and counts as one turn both ways.
  written = sum(
    storage.array_bytes(leaf.shape, leaf.dtype)
    for leaf in jax.tree.leaves(state.base)
    if _is_on_host(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
  )
  read = copied.to_device - copied.to_host
  return budget.Transfers(read + written / every, written / every)


def flops(run: run_lib.Run) -> float:
  """Counts the operations of an iteration's matrix products, on all chips."""
  batch = abstract_batch(run)
  return budget.flops(
    run.algorithm.step, run.abstract_state(), batch, BilevelHParams()
  )
