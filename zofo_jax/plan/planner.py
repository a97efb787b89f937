"""Plans a run: does it fit, on how few chips, at what cost.

For TPUs the real compiler is asked, ahead of time and without a TPU; "cpu:8"
asks XLA's compiler for CPUs; for GPUs shapes give an estimate.
"""

import math
from typing import Any

import ml_collections
from etils import epath

from zofo_jax import errors, report
from zofo_jax.builders import run as run_lib
from zofo_jax.core.types import BilevelState
from zofo_jax.plan import aot, estimate, topologies
from zofo_jax.sharding import mesh as mesh_lib

_SHARDS = tuple(2**i for i in range(9))


def plan(
  config: ml_collections.ConfigDict, name: str, path: str | None = None
) -> dict[str, Any]:
  """Prints and returns what a run needs on a topology.

  Args:
    config: the run's config. Where `config.mesh` is left as it is, the mesh
      that divides the weights least and fits is taken.
    name: of a topology, such as "v5e:4x4", "cpu:8" or "h100:8".
    path: JSON file to write; None for none.

  Returns:
    What is in the file: `mesh`; `per_chip_bytes` of weights, optimizer (all
    other state), forward_temp, zo_temp, lora_temp, iteration_temp and total;
    `remat_temp_bytes` of a first-order step, `off` and `on`, unless estimated;
    `method_bytes` of bilevel, mezo, lora and full (at least), see `costs`;
    `chip_bytes` and `fits`; `flops`, of the products of matrices, on all chips;
    `bytes_accessed`, the compiler's figure for one chip, which counts the body
    of a loop once; `collective_bytes` that a chip receives, by kind, None where
    jaxlib cannot read the compiled program;
    `compile_seconds`; `smallest_slice` and whether figures are an `estimate`.

  Raises:
    UserError: no such topology, or the config or its mesh is wrong.
  """
  topology = topologies.find(name)
  devices = aot.devices_of(topology) if topology.compiled else None
  config = _without_tokenizer(config)
  one = dict.fromkeys(mesh_lib.AXES, 1)
  chosen = dict(config.mesh) == {**one, "data": -1}
  # To choose a mesh nothing need fit the default one, which all rows divide.
  mesh = mesh_lib.abstract(one if chosen else config.mesh, topology.num_chips)
  run = estimate.make_run(config, mesh)
  state = run.abstract_state()
  if chosen:
    mesh = mesh_lib.abstract(choose(run, state, topology), topology.num_chips)
  if devices:
    real = mesh_lib.make(mesh.shape, devices)
    found = _compiled(estimate.make_run(config, real))
  else:
    found = {
      "estimate": True,
      "per_chip_bytes": estimate.estimate(run, state, mesh),
    }
  size = found["per_chip_bytes"]
  chip, total = topology.chip_bytes, size["total"]
  methods = estimate.memory_by_method(size)
  plan = {
    "model": config.model.name,
    "dtype": config.model.dtype,
    "topology": name,
    "mesh": dict(mesh.shape),
    "remat": config.model.remat,
    "chip_bytes": chip,
    "fits": not found.get("problem") and total <= (chip or math.inf),
    "flops": estimate.flops(run),
    **found,
    "method_bytes": methods,
    "smallest_slice": _smallest(run, state, topology.kind),
  }
  if path:
    report.write_json(epath.Path(path), plan)
  _print_plan(plan)
  return plan


def _without_tokenizer(
  config: ml_collections.ConfigDict,
) -> ml_collections.ConfigDict:
  """Returns a copy of the config that needs no tokenizer."""
  config = config.copy_and_resolve_references()
  if config.prompt.init == "text":  # another start, of the same shape
    config.prompt.init, config.prompt.text = "random", ""
  return config


def choose(
  run: run_lib.Run, state: BilevelState, topology: topologies.Topology
) -> dict[str, int]:
  """Chooses the mesh that divides the weights least and is estimated to fit.

  Of equals the one of more `model` and less `fsdp`: products of a
  zeroth-order step exchange few activations, and gathering exchanges weights.

  Args:
    run: the run, on any mesh.
    state: its shapes.
    topology: the devices.

  Returns:
    Sizes of all axes; where nothing fits those that need least.

  Raises:
    UserError: no mesh divides the rows of a batch.
  """
  found = []
  problem: errors.UserError | None = None
  for model in (n for n in _SHARDS if n <= 16):
    for fsdp in _SHARDS:
      data, rest = divmod(topology.num_chips, model * fsdp)
      if rest or not data:
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
      found.append(((not fits, shards if fits else total, fsdp), sizes))
  if not found:
    raise problem or errors.UserError("config.mesh: no mesh was found.")
  return min(found, key=lambda one: one[0])[1]


def _fits(total: int, topology: topologies.Topology) -> bool:
  """Tells whether an estimate leaves a tenth of the memory free."""
  return total <= 0.9 * (topology.chip_bytes or math.inf)


def _compiled(run: run_lib.Run) -> dict[str, Any]:
  """Asks the compiler."""
  lowered = aot.lower_programs(run)
  measured = {name: aot.measure(one) for name, one in lowered.items()}
  other = aot.measure(aot.first_order_program(_other_remat(run)))
  by_remat = {
    run.config.model.remat: measured["lora"].temp_bytes,
    not run.config.model.remat: other.temp_bytes,
  }
  whole = measured["iteration"]
  return {
    "estimate": False,
    "per_chip_bytes": {
      **estimate.sizes(run.abstract_state()),
      **{f"{k}_temp": one.temp_bytes for k, one in measured.items()},
      "total": whole.total_bytes,
    },
    "remat_temp_bytes": {"off": by_remat[False], "on": by_remat[True]},
    "bytes_accessed": whole.bytes_accessed,
    "collective_bytes": whole.collective_bytes,
    "compile_seconds": whole.seconds,
    "problem": whole.problem,
  }


def _other_remat(run: run_lib.Run) -> run_lib.Run:
  """Returns the run with the other choice of `model.remat`."""
  config = run.config.copy_and_resolve_references()
  config.model.remat = not config.model.remat
  return estimate.make_run(config, run.mesh)


def _smallest(run: run_lib.Run, state: BilevelState, kind: str) -> str | None:
  """Returns the least slice on which the run is estimated to fit."""
  for topology in topologies.slices(kind):
    try:
      sizes = choose(run, state, topology)
    except errors.UserError:
      continue
    mesh = mesh_lib.abstract(sizes, topology.num_chips)
    if _fits(estimate.estimate(run, state, mesh)["total"], topology):
      return topology.name
  return None


def _print_plan(plan: dict[str, Any]) -> None:
  """Prints a plan for people."""
  how = "estimated from shapes" if plan["estimate"] else "by the compiler"
  mesh = ", ".join(f"mesh.{k}={v}" for k, v in plan["mesh"].items())
  report.results_table(
    [
      {"a chip": name, "GB": size / 1e9}
      for name, size in plan["per_chip_bytes"].items()
    ],
    title=f"{plan['model']} on {plan['topology']}, {how}",
  )
  report.results_table(
    [
      {"with": name, "GB a chip": size / 1e9}
      for name, size in plan["method_bytes"].items()
    ],
    title="to compare with; full: at least",
  )
  if plan.get("collective_bytes"):
    report.results_table(
      [
        {"a chip receives": k, "GB an iteration": v / 1e9}
        for k, v in plan["collective_bytes"].items()
      ]
    )
  if remat := plan.get("remat_temp_bytes"):
    print(
      f"Temporaries of a first-order step: {remat['off'] / 1e9:.2f} GB without "
      f"model.remat, {remat['on'] / 1e9:.2f} GB with it; it is "
      f"{'on' if plan['remat'] else 'off'}."
    )
  chip = plan["chip_bytes"]
  of = f" of {chip / 1e9:.1f} GB" if chip else ""
  print(f"{mesh}: it {'fits' if plan['fits'] else 'does not fit'}{of}.")
  print(
    f"Smallest slice, estimated: {plan['smallest_slice'] or 'none listed'}."
  )
