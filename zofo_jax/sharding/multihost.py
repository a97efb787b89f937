"""Several processes as one program: joining, agreeing, and who writes."""

import contextlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from zofo_jax import errors
from zofo_jax.sharding import rendezvous

# Bytes of an error message that processes exchange.
_MESSAGE_BYTES = 2048


def initialize(
  coordinator: str,
  *,
  num_processes: int | None = None,
  process_id: int | None = None,
  timeout: int = 300,
) -> None:
  """Joins the processes of a run; to be called before any device is used.

  Args:
    coordinator: "auto" where the cluster's environment describes the processes
      (TPU pods, SLURM, Open MPI, Kubernetes), else HOST:PORT of process 0.
    num_processes: how many there are; not with "auto".
    process_id: which of them this is, from 0; not with "auto".
    timeout: seconds to wait for the others.

  Raises:
    UserError: the arguments are inconsistent, or not all processes came in
      time.
  """
  numbers = {"num_processes": num_processes, "process_id": process_id}
  given = {name: n for name, n in numbers.items() if n is not None}
  if coordinator == "auto":
    if given:
      name, value = next(iter(given.items()))
      raise errors.UserError(
        f"--{name}: 'auto' finds it itself; expected nothing, or "
        f"--distributed=HOST:PORT; found {value}."
      )
    arguments: dict[str, Any] = {}
  else:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
      raise errors.UserError(
        f"--distributed: expected auto or HOST:PORT; found '{coordinator}'."
      )
    count, index = num_processes or 0, -1 if process_id is None else process_id
    if count < 1 or index not in range(count):
      raise errors.UserError(
        "--process_id: expected a number from 0 to below --num_processes; "
        f"found {process_id} of {num_processes}."
      )
    rendezvous.wait_for_all(host, int(port), count, index, timeout)
    arguments = {"coordinator_address": coordinator, **given}
  # Between processes on CPUs; no effect elsewhere.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    jax.distributed.initialize(
      **arguments,
      initialization_timeout=timeout,
      shutdown_timeout_seconds=min(timeout, 60),
    )
  except (RuntimeError, ValueError) as error:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    raise errors.UserError(
      f"--distributed: '{coordinator}' did not bring all processes together "
      f"within {timeout} s ({reason.rstrip('. ')})."
    ) from error


def is_primary() -> bool:
  """Returns whether this process writes files; a single process always does.

  It touches no device unless there are several processes.
  """
  return not jax.distributed.is_initialized() or jax.process_index() == 0


@contextlib.contextmanager
def raise_on_all_processes() -> Iterator[None]:
  """Raises on all processes the `UserError` that any of them raised.

  Raises:
    UserError: that of the first such process.
  """
  raised: errors.UserError | None = None
  try:
    yield
  except errors.UserError as error:
    raised = error
  if not _is_multiprocess():
    if raised:
      raise raised
    return
  encoded = (
    str(raised or "").encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
  )
  for index, row in enumerate(_gather(np.frombuffer(encoded, np.uint8))):
    message = row.tobytes().rstrip(b"\0").decode(errors="replace")
    if message:
      raise errors.UserError(f"process {index}: {message}") from raised


def assert_same_inputs(fields: Mapping[str, Any]) -> None:
  """Checks that all processes were given the same values.

  Unlike `multihost_utils.assert_equal` it names the field, and raises on all
  processes, so that none is left waiting.

  Args:
    fields: by name; every process has the same names.

  Raises:
    UserError: names the first field that differs.
  """
  if not _is_multiprocess():
    return
  sums = [zlib.crc32(repr(value).encode()) for value in fields.values()]
  # [processes, fields]
  gathered = _gather(np.array(sums, np.uint32))
  for name, column in zip(fields, gathered.T, strict=True):
    different = np.flatnonzero(column != column[0])
    if different.size:
      raise errors.UserError(
        f"{name}: process {different[0]} was given another value than process "
        "0; expected the same command everywhere; here it is "
        f"{fields[name]!r}."
      )


def own_share(count: int) -> range:
  """Returns which of some items this process deals with."""
  if not _is_multiprocess():
    return range(count)
  return range(jax.process_index(), count, jax.process_count())


def sum_over_processes(array: np.ndarray) -> np.ndarray:
  """Returns the sum of every process's array, the same in each of them."""
  return _gather(array).sum(axis=0) if _is_multiprocess() else array


def _is_multiprocess() -> bool:
  return jax.distributed.is_initialized() and jax.process_count() > 1


def _gather(array: np.ndarray) -> np.ndarray:
  """Returns every process's array, stacked."""
  from jax.experimental import multihost_utils

  return np.asarray(multihost_utils.process_allgather(array))
