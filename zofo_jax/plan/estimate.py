"""What shapes alone tell of a run: its bytes a chip, and its operations."""

import json
import math
import pathlib
from typing import Any

import jax
import ml_collections

from zofo_jax import errors, models, tasks
from zofo_jax.builders import algorithm, budget, data
from zofo_jax.builders import model as model_lib
from zofo_jax.builders import run as run_lib
from zofo_jax.config import validate
from zofo_jax.core import tree as tree_lib
from zofo_jax.core.types import BilevelBatch, BilevelHParams, BilevelState
from zofo_jax.data import batching, encode_options
from zofo_jax.evaluation import scoring
from zofo_jax.models import apply
from zofo_jax.models.hf import published
from zofo_jax.sharding import dispatch, rules
from zofo_jax.sharding import mesh as mesh_lib


def abstract_batch(
  config: ml_collections.ConfigDict,
  model: model_lib.Model,
  mesh: mesh_lib.AnyMesh,
) -> BilevelBatch:
  """Returns the shapes of an iteration's rows, of data.max_length tokens each.

  Rows are of two options of one token, as those of SST-2.
  """
  length = data.max_train_length(config, model)
  shape = batching.Shape(1, length, 1, 2, 2)
  row = encode_options.EncodedRow((0,) * length, (length - 1,), ((0, 0, 0),))
  example = encode_options.Example((row,), 0, (0,), (True, True), "")
  one = batching.collate([example], shape, pad=0)

  def rows(size, *lead):
    return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        (*lead, size, *leaf.shape[1:]),
        leaf.dtype,
        sharding=rules.batch_sharding(mesh, len(lead)),
      ),
      one,
    )

  return BilevelBatch(
    lower=rows(config.lower.batch_size, config.lower.num_steps),
    penalty=rows(config.upper.batch_size),
    upper=rows(config.upper.batch_size),
  )


def make_run(
  config: ml_collections.ConfigDict, mesh: mesh_lib.AnyMesh
) -> run_lib.Run:
  """Makes a run of a known model, or of a local folder's, without weights.

  Args:
    config: the run's config.
    mesh: of real devices, of those of a topology, or a shape.

  Raises:
    UserError: the model's shape cannot be known here, or the config or its
      mesh is wrong.
  """
  validate.check(config)
  run_lib.check_mesh(config, mesh)
  module, family = models.from_hf(
    _hf_config(config.model.name),
    remat=config.model.remat,
    constrain=rules.make_activation_constraint(mesh),
  )
  model = model_lib.Model(module, family, pathlib.Path(), None)
  return run_lib.Run(
    config=config,
    model=model,
    task=tasks.get(config.data.task),
    algorithm=algorithm.make_algorithm(
      config,
      model_lib.make_loss_fn(config.loss, module),
      map_fn=dispatch.map_directions(mesh),
    ),
    score_fn=scoring.make_score_fn(apply.make_log_probs_fn(module)),
    mesh=mesh,
  )


def _hf_config(name: str) -> dict[str, Any]:
  """Returns config.json of a known model or of a local folder."""
  if name in published.CONFIGS:
    return published.CONFIGS[name]
  path = pathlib.Path(name).expanduser() / "config.json"
  if not path.exists():
    raise errors.UserError(
      f"config.model.name: expected a folder with config.json or one of "
      f"{', '.join(published.CONFIGS)}; found '{name}'."
      f"{errors.nearest(name, published.CONFIGS)}"
    )
  return json.loads(path.read_text())


def sizes(state: BilevelState) -> dict[str, int]:
  """Returns the bytes of the weights, and of the rest of a state, a chip."""
  weights = _local_bytes(state.base)
  return {"weights": weights, "optimizer": _local_bytes(state) - weights}


def _local_bytes(tree: Any) -> int:
  """Counts the bytes of a tree of shapes with shardings on one device."""

  def one(leaf):
    shape = leaf.sharding.shard_shape(leaf.shape)
    size = leaf.dtype.itemsize  # a key's are those of its data
    return math.prod(shape) * size

  return sum(one(leaf) for leaf in jax.tree.leaves(tree))


def estimate(
  run: run_lib.Run, state: BilevelState, mesh: mesh_lib.AnyMesh
) -> dict[str, int]:
  """Estimates the bytes a chip from shapes alone, as a plan names them.

  A layer's activations are counted as if all lived at once, scores of
  attention in float32; a backward pass keeps every product.

  Args:
    run: the run, on any mesh.
    state: its shapes.
    mesh: the grid in question.

  Raises:
    UserError: the mesh does not divide weights, rows or directions.
  """
  config = run.config
  run_lib.check_mesh(config, mesh)
  places = rules.state_shardings(mesh, state, run.model.family.SHARDINGS)
  state = rules.with_shardings(state, places)
  found, base = sizes(state), state.base
  kernels = [
    leaf
    for name, leaf in tree_lib.named_leaves(base["layers"]).items()
    if name.endswith("kernel")
  ]
  width = kernels[0].dtype.itemsize
  length = data.max_train_length(config, run.model)
  rows = config.upper.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])
  heads = run.model.module.config.num_heads
  products = sum(leaf.shape[-1] for leaf in kernels) // mesh.shape["model"]
  layer = rows * length * products * width
  layer += 2 * rows * heads // mesh.shape["model"] * length**2 * 4
  one_layer = sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)[1:]) for leaf in kernels
  )
  depth = kernels[0].shape[0]
  perturbed_layer = one_layer * mesh.shape["fsdp"] * (2 * width + 4)
  forward = layer + one_layer * (mesh.shape["fsdp"] - 1) * width
  # Two signs at once, of one loss and of three.
  zo_temp = 2 * layer + perturbed_layer
  # A backward pass holds up to twice what it keeps, by the TPU compiler.
  hidden = run.model.module.config.hidden_size
  kept = (hidden if config.model.remat else products) * width
  backward = 2 * (rows * length * kept * depth + 2 * layer)
  temp = max(3 * zo_temp, backward)
  return found | {
    "forward_temp": forward,
    "zo_temp": zo_temp,
    "lora_temp": backward,
    "iteration_temp": temp,
    "total": sum(found.values()) + temp,
  }


def memory_by_method(size: dict[str, int]) -> dict[str, int]:
  """Returns the bytes a chip of Bilevel-ZOFO and of what it is compared with.

  Args:
    size: bytes a chip, as a plan names them.

  Returns:
    `bilevel`; `mezo`: the weights and a zeroth-order step; `lora`: one adapter
    of the two, its optimizer and a first-order step; `full`: all weights by
    Adam, which is at least a gradient and two moments of the weights' own
    dtype more than `lora`.
  """
  weights = size["weights"]
  return {
    "bilevel": size["total"],
    "mezo": weights + size["zo_temp"],
    "lora": weights + size["optimizer"] // 2 + size["lora_temp"],
    "full": 4 * weights + size["lora_temp"],
  }


def flops(run: run_lib.Run) -> float:
  """Counts the operations of an iteration's products of matrices, all chips."""
  batch = abstract_batch(run.config, run.model, run.mesh)
  return budget.flops(
    run.algorithm.step, run.abstract_state(), batch, BilevelHParams()
  )
