"""Compiles a run's programs ahead of time, for devices that may be absent.

The compiled programs report their memory, operations and collectives.
"""

import contextlib
import os
import re
import time
from typing import Any, NamedTuple

import jax
import optax

from zofo_jax import errors
from zofo_jax.builders import run as run_lib
from zofo_jax.core import inner, zo
from zofo_jax.plan import estimate, hlo, topologies
from zofo_jax.report import memory as memory_lib
from zofo_jax.sharding import dispatch, rules


def devices_of(topology: topologies.Topology) -> list[Any]:
  """Returns the devices of a topology, or stand-ins that compile for it.

  Raises:
    UserError: the TPU compiler is not installed, or too few devices of a CPU or
      GPU.
  """
  if topology.kind in topologies.LOCAL:
    with contextlib.suppress(RuntimeError):  # jax is initialized already
      if topology.kind == "cpu":
        jax.config.update("jax_num_cpu_devices", topology.num_chips)
    try:
      devices = jax.devices(topology.kind)
    except RuntimeError:
      devices = []
    if len(devices) < topology.num_chips:
      raise errors.UserError(
        f"--topology: {topology.name} needs {topology.num_chips} devices; "
        f"there are {len(devices)}."
      )
    return devices[: topology.num_chips]
  from jax.experimental import topologies as jax_topologies

  # Otherwise libtpu looks for a local TPU, and locks out other processes.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")

  # The compiler knows whole slices only.
  whole = topology
  if topology.num_chips == 1:
    whole = topologies.slices(topology.kind)[0]
  try:
    description = jax_topologies.get_topology_desc(
      platform="tpu", topology_name=whole.name
    )
  except Exception as error:  # jaxlib raises several types
    reason = (str(error) or type(error).__name__).splitlines()[0]
    raise errors.UserError(
      f"--topology: {topology.name} needs the TPU compiler, from pip install "
      f"'zofo-jax[tpu]' ({reason.rstrip('. ')})."
    ) from error
  return list(description.devices)[: topology.num_chips]


def memory_bytes(device: Any) -> int | None:
  """Returns the memory that jax may use on a device; None if it is not known.

  By default that is three quarters of a GPU's.
  """
  return (device.memory_stats() or {}).get("bytes_limit")


def lower_programs(
  run: run_lib.Run, adapter_tx: optax.GradientTransformation
) -> dict[str, jax.stages.Lowered]:
  """Lowers the programs that a plan measures.

  Args:
    run: the run.
    adapter_tx: optimizer of the program `lora`.

  Returns:
    `forward`: one loss of `upper.batch_size` rows; `zo`: a zeroth-order step of
    the backbone on that loss; `lora`: a first-order step of an adapter on it;
    `iteration`: an outer iteration of Bilevel-ZOFO. And `answers`, those of a
    population, if the run is trained by rewards.
  """
  state, batch = run.abstract_state(), estimate.abstract_batch(run)
  loss_fn, base_update = run.loss_fn, run.base_update
  hparams = run.hparams_fn(0)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

  def zo_step(base, opt, adapter, rows, key):
    objective = lambda base: loss_fn(base, adapter, rows, None)
    estimated = zo.estimate(
      objective, base, key, hparams.zo_eps, base_update.zo
    )
    return base_update.tx.update(
      base, opt, estimated, base_update.zo.sampler, objective, key
    )

  rows, key = batch.upper, state.key
  options = dispatch.compiler_options(run.mesh)
  answers = {}
  if run.reward is not None:
    answers["answers"] = jax.jit(
      run.reward.write_fn,
      out_shardings=rules.replicated(run.mesh),
      compiler_options=options,
    ).lower(
      *(state.base, state.upper, state.key, state.step, hparams.zo_eps),
      *estimate.abstract_prompts(run),
    )
  return {
    "forward": jax.jit(
      loss_fn, static_argnums=3, compiler_options=options
    ).lower(state.base, state.upper, rows, None),
    "zo": jax.jit(
      zo_step,
      donate_argnums=(0, 1),
      out_shardings=(shardings.base, shardings.base_opt),
      compiler_options=options,
    ).lower(state.base, state.base_opt, state.upper, rows, key),
    "lora": first_order_program(run, adapter_tx),
    "iteration": run.jit_step().lower(state, batch, hparams),
    **answers,
  }


def first_order_program(
  run: run_lib.Run, tx: optax.GradientTransformation
) -> jax.stages.Lowered:
  """Lowers a first-order step of an adapter on `upper.batch_size` rows.

  Args:
    run: the run.
    tx: optimizer of the adapter.
  """
  state, rows = run.abstract_state(), estimate.abstract_batch(run).upper
  whole = rules.replicated(run.mesh)

  def step(base, adapter, opt, rows, key):
    rows = jax.tree.map(lambda leaf: leaf[None], rows)
    return inner.minimize(run.loss_fn, base, adapter, opt, rows, key, tx=tx)

  abstract_opt = jax.eval_shape(tx.init, state.upper)
  opt = rules.with_shardings(
    abstract_opt, jax.tree.map(lambda _: whole, abstract_opt)
  )
  jitted = jax.jit(
    step,
    donate_argnums=(1, 2),
    out_shardings=whole,
    compiler_options=dispatch.compiler_options(run.mesh),
  )
  return jitted.lower(state.base, state.upper, opt, rows, state.key)


class CompiledStats(NamedTuple):
  """Statistics of a compiled program, for one chip; None where not known.

  Attributes:
    seconds: compilation time.
    temp_bytes: temporaries; of a refused program, if the compiler names them.
    host_bytes: arguments, temporaries and results in the host's memory; None
      where the device's memory is the host's.
    total_bytes: arguments, temporaries, and results that alias no argument; of
      a refused program, if the compiler names it.
    flops: operations.
    bytes_accessed: bytes read and written.
    collective_bytes: bytes received by each kind of collective; None if the
      compiled program cannot be read.
    text: the compiled program; "" if it cannot be read.
    problem: the first line of the compiler's refusal, else "".
  """

  seconds: float
  temp_bytes: int | None = None
  host_bytes: int | None = None
  total_bytes: int | None = None
  flops: float | None = None
  bytes_accessed: float | None = None
  collective_bytes: dict[str, int] | None = None
  text: str = ""
  problem: str = ""


def _text(compiled: jax.stages.Compiled) -> str:
  """Returns a compiled program's text; "" if jaxlib cannot read it."""
  try:
    return compiled.as_text() or ""
  except jax.errors.JaxRuntimeError:
    # jaxlib 0.10.2 does not know the asynchronous copies of several operands
    # of libtpu 0.0.52 (v5p and v6e).
    return ""


# What a program would have used, in two compilers' words: "Used 20.5G of 15.7G
# hbm", and of temporaries alone "HLO temporaries (27.2G) exceeds".
_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of")
_TEMPORARIES = re.compile(r"temporaries \(([\d.]+)([KMGT]?)\)")


def _bytes(match: re.Match[str] | None) -> int | None:
  """Returns a size in a compiler's message, such as 27.2G; None without."""
  if match is None:
    return None
  return int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " "))


def measure(lowered: jax.stages.Lowered) -> CompiledStats:
  """Compiles a program and returns its statistics."""
  start_time = time.monotonic()
  try:
    compiled = lowered.compile()
  except Exception as error:  # jaxlib raises several types
    reason = str(error)
    if "RESOURCE_EXHAUSTED" not in reason and "memory" not in reason.lower():
      raise
    return CompiledStats(
      seconds=time.monotonic() - start_time,
      temp_bytes=_bytes(_TEMPORARIES.search(reason)),
      total_bytes=_bytes(_USED.search(reason)),
      problem=errors.first_line(error),
    )
  seconds = time.monotonic() - start_time
  memory: Any = compiled.memory_analysis()
  cost: Any = compiled.cost_analysis() or {}
  text = _text(compiled)
  return CompiledStats(
    seconds=seconds,
    temp_bytes=memory.temp_size_in_bytes,
    host_bytes=memory.host_argument_size_in_bytes
    + memory.host_temp_size_in_bytes
    + memory.host_output_size_in_bytes
    - memory.host_alias_size_in_bytes,
    total_bytes=memory_lib.program_bytes(compiled),
    flops=cost.get("flops"),
    bytes_accessed=cost.get("bytes accessed"),
    collective_bytes=hlo.total_bytes(text) if text else None,
    text=text,
  )
