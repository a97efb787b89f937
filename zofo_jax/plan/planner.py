"""Plans a run: whether it fits, on how few chips, and at what cost.

For TPUs the real compiler runs ahead of time, without a TPU; "cpu:8" and
"gpu:1" run XLA's compiler for this machine's CPU and GPU; for other GPUs the
figures are estimated from shapes.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import ml_collections
import optax
from etils import epath

from zofo_jax import errors, report
from zofo_jax.builders import model as model_lib
from zofo_jax.builders import optimizers
from zofo_jax.builders import run as run_lib
from zofo_jax.config import validate
from zofo_jax.core.types import BilevelState
from zofo_jax.plan import aot, estimate, largest, show, topologies
from zofo_jax.sharding import mesh as mesh_lib
from zofo_jax.sharding import rules

_SHARDS = tuple(2**i for i in range(9))


def plan(
  config: ml_collections.ConfigDict, name: str, path: str | None = None
) -> dict[str, Any]:
  """Prints and returns what a run needs on a topology.

  Args:
    config: the run's config. With the default `config.mesh`, `choose_mesh`
      chooses the mesh.
    name: of a topology, such as "v5e:4x4", "cpu:8" or "h100:8".
    path: JSON file to write; None for none.

  Returns:
    What is in the file: `mesh`; `per_chip_bytes` of weights, optimizer (all
    other state), forward_temp, zo_temp, lora_temp, iteration_temp and total,
    with rewards also answers_temp, of the program that writes a population's;
    `per_chip_host_bytes` of weights in the host's memory, and in total, with
    copies that the compiler makes there; `host_transfers` of an iteration, on
    all chips: bytes to_device and to_host, and the seconds that the larger of
    them takes at `topologies.HOST_BANDWIDTH` a chip;
    `remat_temp_bytes` of a first-order step, `off` and `on`, unless estimated;
    `method_bytes`, see `estimate.memory_by_method`;
    `chip_bytes` and `fits`; `flops` of the matrix products, on all chips;
    `bytes_accessed`, the compiler's figure for one chip, which counts the body
    of a loop once; `collective_bytes` that a chip receives, by kind, None if
    jaxlib cannot read the compiled program; `compile_seconds`;
    `smallest_slice`; and whether the figures are an `estimate`. What the
    compiler refused has no figures, which are None, and its message is in
    `refused`, by program. If the run does not fit, `would_fit` has changes of
    the config with which it is estimated to; None if no such are known.
    `offloaded` then has the estimated `per_chip_bytes` and
    `per_chip_host_bytes`, in total, with config.model.offload "host".
    `largest`, for a single chip, has the largest models of the family that are
    estimated to fit it, see `largest.largest`; else None.

  Raises:
    UserError: no such topology, or the config or its mesh is wrong.
  """
  topology = topologies.find(name)
  devices = aot.devices_of(topology) if topology.compiled else None
  if devices and topology.kind == "gpu":
    topology = topology._replace(chip_bytes=aot.memory_bytes(devices[0]))
  single = dict.fromkeys(mesh_lib.AXES, 1)
  chosen = dict(config.mesh) == {**single, "data": -1}

  def changed_run(changes, mesh):
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict(changes)
    return make_run(other, mesh)

  # The run that chooses a mesh has the smallest, which divides everything.
  mesh = mesh_lib.abstract(
    single if chosen else config.mesh, topology.num_chips
  )

  def estimated_total(changes):
    run = changed_run(changes, mesh)
    state = run.abstract_state()
    sizes = choose_mesh(run, state, topology) if chosen else mesh.shape
    sharded = mesh_lib.abstract(sizes, topology.num_chips)
    return estimate.estimate(run, state, sharded)["total"]

  run = make_run(config, mesh)
  state = run.abstract_state()
  run_mesh = mesh
  if chosen:
    run_mesh = mesh_lib.abstract(
      choose_mesh(run, state, topology), topology.num_chips
    )
  if devices:
    real_mesh, upper = mesh_lib.make(run_mesh.shape, devices), config.upper
    figures = _compile(
      make_run(config, real_mesh),
      changed_run({"model.remat": not config.model.remat}, real_mesh),
      optimizers.make_optimizer(upper.optimizer, upper.learning_rate),
    )
  else:
    figures = {
      "estimate": True,
      "per_chip_bytes": estimate.estimate(run, state, run_mesh),
      "per_chip_host_bytes": _host_bytes(run, state, run_mesh),
      "refused": {},
    }
  size = figures["per_chip_bytes"]
  chip, total = topology.chip_bytes, size["total"]
  refused = bool({"iteration", "answers"} & figures["refused"].keys())
  fits = not refused and total <= (chip or math.inf)
  plan = {
    "model": config.model.name,
    "dtype": config.model.dtype,
    "topology": name,
    "mesh": dict(run_mesh.shape),
    "remat": config.model.remat,
    "chip_bytes": chip,
    "fits": fits,
    "flops": estimate.flops(run),
    "host_transfers": _host_transfers(run, topology),
    **figures,
    "method_bytes": estimate.memory_by_method(size),
    "smallest_slice": _smallest_slice(run, state, topology.kind),
    "would_fit": None
    if fits
    else _would_fit(
      smaller(config.model.dtype, config.model.remat, config.data.max_length),
      lambda changes: _fits(estimated_total(changes), topology),
    ),
    "offloaded": None
    if fits or config.model.offload
    else _offloaded(changed_run, run_mesh),
    "largest": None
    if topology.num_chips > 1 or not chip
    else largest.largest(
      model_lib.published_config(config.model.name)["model_type"],
      lambda changes: _fits(estimated_total(changes), topology),
      config.model.remat,
    ),
  }
  if path:
    report.write_json(epath.Path(path), plan)
  show.print_plan(plan)
  return plan


def make_run(
  config: ml_collections.ConfigDict, mesh: mesh_lib.AnyMesh
) -> run_lib.Run:
  """Makes a run without weights or a tokenizer.

  Args:
    config: the run's config.
    mesh: of real devices, of those of a topology, or of shapes alone.

  Raises:
    UserError: the model's shapes are not known, or the config or its mesh is
      wrong.
  """
  validate.check(config)
  model = model_lib.published_model(
    config.model.name,
    dtype=config.model.dtype,
    quantize=config.model.quantize,
    offload=config.model.offload,
    remat=config.model.remat,
    mesh=mesh,
  )
  return run_lib.make_run(config, mesh=mesh, model=model)


def choose_mesh(
  run: run_lib.Run, state: BilevelState, topology: topologies.Topology
) -> dict[str, int]:
  """Chooses the mesh that shards the weights least and is estimated to fit.

  Among equals it prefers `model` to `fsdp`: the products of a zeroth-order step
  exchange few activations, while fsdp gathers weights.

  Args:
    run: the run, on any mesh.
    state: its shapes.
    topology: the devices.

  Returns:
    Sizes of all axes; if no mesh fits, those with the smallest estimate.

  Raises:
    UserError: no mesh divides the rows of a batch.
  """
  candidates = []
  problem: errors.UserError | None = None
  for model in (n for n in _SHARDS if n <= 16):
    for fsdp in _SHARDS:
      data, remainder = divmod(topology.num_chips, model * fsdp)
      if remainder or not data:
        continue
      sizes = {"pert": 1, "data": data, "fsdp": fsdp, "model": model}
      mesh = mesh_lib.abstract(sizes, topology.num_chips)
      try:
        total = estimate.estimate(run, state, mesh)["total"]
      except errors.UserError as error:
        problem = error
        continue
      fits = _fits(total, topology)
      shards = model * fsdp
      rank = (not fits, shards if fits else total, fsdp)
      candidates.append((rank, sizes))
  if not candidates:
    raise problem or errors.UserError("config.mesh: no mesh was found.")
  return min(candidates, key=lambda candidate: candidate[0])[1]


def smaller(
  dtype: str, remat: bool, max_length: int
) -> Iterator[tuple[str, Any]]:
  """Yields changes of a config that take less memory, the mildest first.

  Args:
    dtype: `model.dtype`.
    remat: `model.remat`.
    max_length: `data.max_length`.
  """
  if dtype != "bfloat16":
    yield "model.dtype", "bfloat16"
  if not remat:
    yield "model.remat", True
  while max_length > 64:
    max_length //= 2
    yield "data.max_length", max_length


def _would_fit(
  changes: Iterator[tuple[str, Any]], fits: Callable[[dict[str, Any]], bool]
) -> dict[str, Any] | None:
  """Returns the fewest of the changes, in order, with which a run fits."""
  taken: dict[str, Any] = {}
  for name, value in changes:
    taken[name] = value
    if fits(taken):
      return taken
  return None


def _fits(total: int, topology: topologies.Topology) -> bool:
  """Returns whether an estimate leaves a tenth of the memory free."""
  return total <= 0.9 * (topology.chip_bytes or math.inf)


def _compile(
  run: run_lib.Run,
  other_remat: run_lib.Run,
  tx: optax.GradientTransformation,
) -> dict[str, Any]:
  """Returns the compiler's figures.

  Args:
    run: the run.
    other_remat: the run with the other choice of `model.remat`.
    tx: optimizer of a first-order step of an adapter.
  """
  lowered = aot.lower_programs(run, tx)
  measured = {name: aot.measure(program) for name, program in lowered.items()}
  other = aot.measure(aot.first_order_program(other_remat, tx))
  by_remat = {
    run.model.module.remat: measured["lora"].temp_bytes,
    other_remat.model.module.remat: other.temp_bytes,
  }
  iteration = measured["iteration"]
  stored = estimate.state_bytes(run.abstract_state())
  total = iteration.total_bytes
  if total is None and iteration.temp_bytes is not None:
    total = sum(stored.values()) + iteration.temp_bytes
  answers = measured.get("answers")
  if answers and answers.temp_bytes and total is not None:
    total = max(total, sum(stored.values()) + answers.temp_bytes)
  return {
    "estimate": False,
    "per_chip_bytes": {
      **stored,
      **{f"{k}_temp": stats.temp_bytes for k, stats in measured.items()},
      "total": total,
    },
    "per_chip_host_bytes": _host_bytes(
      run, run.abstract_state(), run.mesh, iteration.host_bytes
    ),
    "remat_temp_bytes": {"off": by_remat[False], "on": by_remat[True]},
    "bytes_accessed": iteration.bytes_accessed,
    "collective_bytes": iteration.collective_bytes,
    "compile_seconds": iteration.seconds,
    "refused": {k: v.problem for k, v in measured.items() if v.problem},
  }


def _host_bytes(
  run: run_lib.Run,
  state: BilevelState,
  mesh: mesh_lib.AnyMesh,
  compiled: int | None = None,
) -> dict[str, int]:
  """Returns the bytes per chip in the host's memory, as named in a plan."""
  shardings = rules.state_shardings(
    mesh, state, run.model.family.SHARDINGS, run.model.on_host
  )
  weights = estimate.host_bytes(rules.with_shardings(state, shardings))
  return {"weights": weights, "total": max(weights, compiled or 0)}


def _host_transfers(
  run: run_lib.Run, topology: topologies.Topology
) -> dict[str, float]:
  """Returns what an iteration copies, and the time that it takes at least."""
  copied = estimate.transfers(run)
  seconds = max(copied) / (topologies.HOST_BANDWIDTH * topology.num_chips)
  return {**copied._asdict(), "seconds": seconds}


def _offloaded(
  changed_run: Callable[[dict[str, Any], mesh_lib.AnyMesh], run_lib.Run],
  mesh: mesh_lib.AnyMesh,
) -> dict[str, int] | None:
  """Estimates the run with weights in the host's memory, if it may have them.

  Args:
    changed_run: (changes of the config, mesh) -> a run.
    mesh: the mesh to estimate for.
  """
  try:
    run = changed_run({"model.offload": "host"}, mesh)
  except errors.UserError:
    return None
  state = run.abstract_state()
  return {
    "per_chip_bytes": estimate.estimate(run, state, mesh)["total"],
    "per_chip_host_bytes": estimate.host_bytes(state),
  }


def _smallest_slice(
  run: run_lib.Run, state: BilevelState, kind: str
) -> str | None:
  """Returns the smallest slice on which the run is estimated to fit."""
  for topology in topologies.slices(kind):
    try:
      sizes = choose_mesh(run, state, topology)
    except errors.UserError:
      continue
    mesh = mesh_lib.abstract(sizes, topology.num_chips)
    if _fits(estimate.estimate(run, state, mesh)["total"], topology):
      return topology.name
  return None
