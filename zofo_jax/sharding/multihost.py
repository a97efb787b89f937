"""Several processes as one program: joining, agreeing, and who writes."""

import contextlib
import socket
import time
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from zofo_jax import errors

# Bytes of a sentence that processes tell each other.
_SENTENCE = 2048


def initialize(
  where: str,
  *,
  num_processes: int | None = None,
  process_id: int | None = None,
  timeout: int = 300,
) -> None:
  """Joins the processes of a run; to be called before any device is used.

  Args:
    where: "auto" where the cluster says who is who (TPU pods, SLURM, Open
      MPI, Kubernetes), else HOST:PORT of process 0.
    num_processes: how many there are; not with "auto".
    process_id: which of them this is, from 0; not with "auto".
    timeout: seconds to wait for the others.

  Raises:
    UserError: the arguments do not fit, or not all processes came in time.
  """
  numbers = {"num_processes": num_processes, "process_id": process_id}
  given = {name: n for name, n in numbers.items() if n is not None}
  if where == "auto":
    if given:
      name, value = next(iter(given.items()))
      raise errors.UserError(
        f"--{name}: 'auto' finds it itself; expected nothing, or "
        f"--distributed=HOST:PORT; found {value}."
      )
    arguments: dict[str, Any] = {}
  else:
    host, _, port = where.rpartition(":")
    if not host or not port.isdigit():
      raise errors.UserError(
        f"--distributed: expected auto or HOST:PORT; found '{where}'."
      )
    count, index = num_processes or 0, -1 if process_id is None else process_id
    if count < 1 or index not in range(count):
      raise errors.UserError(
        "--process_id: expected a number from 0 to below --num_processes; "
        f"found {process_id} of {num_processes}."
      )
    # jax waits as well, but where that fails the process ends from within.
    _meet(host, int(port), count, index, timeout)
    arguments = {"coordinator_address": where, **given}
  # Between processes on CPUs; of no effect elsewhere.
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
      f"--distributed: '{where}' did not bring all processes together within "
      f"{timeout} s ({reason.rstrip('. ')})."
    ) from error


def _meet(host: str, port: int, count: int, index: int, timeout: int) -> None:
  """Waits until all processes are there: they call at process 0."""
  end = time.monotonic() + timeout
  if index:
    _call(host, port, f"{index} of {count}", end, timeout)
    return
  arrived: dict[int, socket.socket] = {}
  try:
    with socket.create_server(("", port)) as server:
      while len(arrived) < count - 1:
        server.settimeout(max(end - time.monotonic(), 0.01))
        caller, _ = server.accept()
        caller.settimeout(5)
        told = caller.recv(64).decode(errors="replace")
        number, _, total = told.partition(" of ")
        if total == str(count) and number not in map(str, arrived):
          arrived[int(number)] = caller
        elif total:
          caller.sendall(f"process 0 expects others than {told}".encode())
  except TimeoutError as error:
    missing = [str(i) for i in range(1, count) if i not in arrived]
    raise errors.UserError(
      f"--distributed: of {count} processes {', '.join(missing)} did not come "
      f"to {host}:{port} within {timeout} s."
    ) from error
  except OSError as error:
    raise errors.UserError(
      f"--distributed: process 0 cannot listen at port {port} ({error})."
    ) from error
  for caller in arrived.values():
    caller.sendall(b"go")
    caller.recv(1)  # They hang up first, so that the port is free again.
    caller.close()


def _call(host: str, port: int, who: str, end: float, timeout: int) -> None:
  """Calls at process 0 and waits for its word."""
  while True:
    try:
      with socket.create_connection((host, port), timeout=5) as line:
        line.sendall(who.encode())
        line.settimeout(max(end - time.monotonic(), 0.01))
        word = line.recv(256).decode(errors="replace")
      if word == "go":
        return
      if word:
        raise errors.UserError(f"--process_id: {word}.")
      reason = "it hung up"
    except OSError as error:
      reason = str(error)
    if time.monotonic() > end:
      raise errors.UserError(
        f"--distributed: process 0 did not answer at {host}:{port} within "
        f"{timeout} s ({reason})."
      )
    time.sleep(0.2)


def is_primary() -> bool:
  """Tells whether this process writes logs; asks for no device if alone."""
  return not jax.distributed.is_initialized() or jax.process_index() == 0


@contextlib.contextmanager
def raise_on_all_processes() -> Iterator[None]:
  """Makes a mistake that one process finds stop them all with one sentence.

  Raises:
    UserError: of the first process that found one.
  """
  found: errors.UserError | None = None
  try:
    yield
  except errors.UserError as error:
    found = error
  if not _is_multiprocess():
    if found:
      raise found
    return
  text = str(found or "").encode()[:_SENTENCE]
  everyone = _gather(np.frombuffer(text.ljust(_SENTENCE, b"\0"), np.uint8))
  for index, each in enumerate(everyone):
    sentence = each.tobytes().rstrip(b"\0").decode(errors="replace")
    if sentence:
      raise errors.UserError(f"process {index}: {sentence}") from found


def assert_same_inputs(fields: Mapping[str, Any]) -> None:
  """Stops where processes were given different things.

  Args:
    fields: by name; every process has the same names.

  Raises:
    UserError: names the first field that differs.
  """
  if not _is_multiprocess():
    return
  sums = [zlib.crc32(repr(value).encode()) for value in fields.values()]
  everyone = _gather(np.array(sums, np.uint32))
  for name, each in zip(fields, everyone.T, strict=True):
    others = np.flatnonzero(each != each[0])
    if others.size:
      raise errors.UserError(
        f"{name}: process {others[0]} was given another value than process 0; "
        f"expected the same command everywhere; here it is {fields[name]!r}."
      )


def _is_multiprocess() -> bool:
  return jax.distributed.is_initialized() and jax.process_count() > 1


def _gather(array: np.ndarray) -> np.ndarray:
  """Returns every process's array, stacked."""
  from jax.experimental import multihost_utils

  return np.asarray(multihost_utils.process_allgather(array))
