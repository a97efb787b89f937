"""A run's programs, compiled ahead of time for devices that need not be here.

Compiled programs are asked for their memory, work and messages.
"""

import contextlib
import os
import re
import time
from typing import Any, NamedTuple

import jax

from zofo_jax import errors
from zofo_jax.builders import algorithm, model
from zofo_jax.builders import run as run_lib
from zofo_jax.core import inner, zo
from zofo_jax.core.types import BilevelHParams
from zofo_jax.plan import estimate, hlo, topologies
from zofo_jax.report import memory as memory_lib
from zofo_jax.sharding import dispatch, rules


def devices_of(topology: topologies.Topology) -> list[Any]:
  """Returns the devices of a topology, or stand-ins that compile for it.

  Raises:
    UserError: the TPU compiler is not installed, or too few CPU devices.
  """
  if topology.kind == "cpu":
    with contextlib.suppress(RuntimeError):  # devices were asked for before
      jax.config.update("jax_num_cpu_devices", topology.num_chips)
    found = jax.devices("cpu")
    if len(found) < topology.num_chips:
      raise errors.UserError(
        f"--topology: {topology.name} needs {topology.num_chips} devices; "
        f"there are {len(found)}."
      )
    return found[: topology.num_chips]
  from jax.experimental import topologies as jax_topologies

  # The compiler's library would look for the TPU that is not here, and would
  # be one process's alone.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")

  try:
    described = jax_topologies.get_topology_desc(
      platform="tpu", topology_name=topology.name
    )
  except Exception as error:  # jaxlib's own, of several types
    reason = (str(error) or type(error).__name__).splitlines()[0]
    raise errors.UserError(
      f"--topology: {topology.name} needs the TPU compiler, from pip install "
      f"'zofo-jax[tpu]' ({reason.rstrip('. ')})."
    ) from error
  return list(described.devices)


def lower_programs(run: run_lib.Run) -> dict[str, jax.stages.Lowered]:
  """Lowers what is measured.

  Returns:
    `forward`: one loss of `upper.batch_size` rows; `zo`: a step of the backbone
    on that loss alone; `lora`: a first-order step of an adapter on it;
    `iteration`: an outer iteration of Bilevel-ZOFO.
  """
  config = run.config
  state = run.abstract_state()
  batch = estimate.abstract_batch(config, run.model, run.mesh)
  loss_fn = model.make_loss_fn(config.loss, run.model.module)
  places = jax.tree.map(lambda leaf: leaf.sharding, state)
  zeroth_order = algorithm.make_zeroth_order(
    config.zo, map_fn=dispatch.map_directions(run.mesh)
  )
  base_tx = algorithm.make_base_tx(config.zo)

  def zo_step(base, opt, adapter, rows, key):
    objective = lambda base: loss_fn(base, adapter, rows, None)
    estimated = zo.estimate(objective, base, key, config.zo.eps, zeroth_order)
    return base_tx.update(
      base, opt, estimated, zeroth_order.sampler, objective, key
    )

  rows, key = batch.upper, state.key
  hparams = BilevelHParams(config.zo.eps, config.penalty)
  options = dispatch.compiler_options(run.mesh)
  return {
    "forward": jax.jit(
      loss_fn, static_argnums=3, compiler_options=options
    ).lower(state.base, state.upper, rows, None),
    "zo": jax.jit(
      zo_step,
      donate_argnums=(0, 1),
      out_shardings=(places.base, places.base_opt),
      compiler_options=options,
    ).lower(state.base, state.base_opt, state.upper, rows, key),
    "lora": first_order_program(run),
    "iteration": run.jit_step().lower(state, batch, hparams),
  }


def first_order_program(run: run_lib.Run) -> jax.stages.Lowered:
  """Lowers a first-order step of an adapter on `upper.batch_size` rows."""
  config, state = run.config, run.abstract_state()
  rows = estimate.abstract_batch(config, run.model, run.mesh).upper
  loss_fn = model.make_loss_fn(config.loss, run.model.module)
  whole = rules.replicated(run.mesh)
  tx = algorithm.make_optimizer(
    config.upper.optimizer, config.upper.learning_rate
  )

  def step(base, adapter, opt, rows, key):
    rows = jax.tree.map(lambda leaf: leaf[None], rows)
    return inner.minimize(loss_fn, base, adapter, opt, rows, key, tx=tx)

  opt = rules.with_shardings(
    *_twice(jax.eval_shape(tx.init, state.upper), whole)
  )
  jitted = jax.jit(
    step,
    donate_argnums=(1, 2),
    out_shardings=whole,
    compiler_options=dispatch.compiler_options(run.mesh),
  )
  return jitted.lower(state.base, state.upper, opt, rows, state.key)


def _twice(tree: Any, place: Any) -> tuple[Any, Any]:
  return tree, jax.tree.map(lambda _: place, tree)


class CompiledStats(NamedTuple):
  """What a compiler says of a program, for one chip.

  Attributes:
    temp_bytes: temporaries.
    total_bytes: arguments, temporaries, and results that are no argument.
    flops: operations.
    bytes_accessed: bytes read and written.
    collective_bytes: what is received, by kind; None where the compiled program
      cannot be read.
    seconds: that it took to compile.
    text: the compiled program; "" likewise.
    problem: why it was not compiled: it does not fit.
  """

  temp_bytes: int = 0
  total_bytes: int = 0
  flops: float = 0.0
  bytes_accessed: float = 0.0
  collective_bytes: dict[str, int] | None = None
  seconds: float = 0.0
  text: str = ""
  problem: str = ""


def _text(compiled: jax.stages.Compiled) -> str:
  """Returns a compiled program's text, if jaxlib can read what it is."""
  try:
    return compiled.as_text() or ""
  except jax.errors.JaxRuntimeError:
    # The TPU compiler's asynchronous copies of several operands, which this
    # jaxlib does not know (v5p and v6e, jaxlib 0.10.2 with libtpu 0.0.52).
    return ""


_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of")


def measure(lowered: jax.stages.Lowered) -> CompiledStats:
  """Compiles a program and reads what it needs."""
  began = time.monotonic()
  try:
    compiled = lowered.compile()
  except Exception as error:  # jaxlib's own
    reason = str(error)
    if "RESOURCE_EXHAUSTED" not in reason and "memory" not in reason.lower():
      raise
    used = _USED.search(reason)
    power = " KMGT".index(used[2] or " ") if used else 0
    total = int(float(used[1]) * 1024**power) if used else 0
    return CompiledStats(
      total_bytes=total,
      seconds=time.monotonic() - began,
      problem=reason.splitlines()[0],
    )
  seconds = time.monotonic() - began
  memory: Any = compiled.memory_analysis()
  cost: Any = compiled.cost_analysis() or {}
  text = _text(compiled)
  return CompiledStats(
    temp_bytes=memory.temp_size_in_bytes,
    total_bytes=memory_lib.program_bytes(compiled) or 0,
    flops=cost.get("flops", 0.0),
    bytes_accessed=cost.get("bytes accessed", 0.0),
    collective_bytes=hlo.total_bytes(text) if text else None,
    seconds=seconds,
    text=text,
  )
