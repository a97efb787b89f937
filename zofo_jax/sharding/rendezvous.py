"""Waits for all processes of a run before jax initializes them.

`jax.distributed.initialize` waits too, but on a timeout it aborts the process
from C++ (SIGABRT and a stack trace, jax 0.10): no exception reaches Python, and
nobody learns which process is missing. Here process 0 listens at the port that
jax uses afterwards, and the others report to it.
"""

import socket
import time

from zofo_jax import errors

_GO = "go"


def wait_for_all(
  host: str, port: int, num_processes: int, process_id: int, timeout: int
) -> None:
  """Returns once all processes have reported to process 0.

  Args:
    host: of process 0.
    port: of process 0; free again on return.
    num_processes: number of processes.
    process_id: of this one, from 0.
    timeout: seconds to wait for the others.

  Raises:
    UserError: a process did not connect in time, or connected twice.
  """
  if process_id == 0:
    _listen(host, port, num_processes, timeout)
  else:
    _report(host, port, f"{process_id} of {num_processes}", timeout)


def _listen(host: str, port: int, num_processes: int, timeout: int) -> None:
  """Accepts a connection of every other process, then answers all of them."""
  deadline = time.monotonic() + timeout
  connections: dict[int, socket.socket] = {}
  try:
    with socket.create_server(("", port)) as server:
      while len(connections) < num_processes - 1:
        server.settimeout(max(deadline - time.monotonic(), 0.01))
        connection, _ = server.accept()
        connection.settimeout(5)
        message = connection.recv(64).decode(errors="replace")
        index, _, total = message.partition(" of ")
        if total == str(num_processes) and index not in map(str, connections):
          connections[int(index)] = connection
        elif total:
          connection.sendall(
            f"process 0 expects others than {message}".encode()
          )
  except TimeoutError as error:
    missing = [str(i) for i in range(1, num_processes) if i not in connections]
    raise errors.UserError(
      f"--distributed: of {num_processes} processes {', '.join(missing)} did "
      f"not come to {host}:{port} within {timeout} s."
    ) from error
  except OSError as error:
    raise errors.UserError(
      f"--distributed: process 0 cannot listen at port {port} ({error})."
    ) from error
  for connection in connections.values():
    connection.sendall(_GO.encode())
    connection.recv(1)  # the other side closes first, which frees the port
    connection.close()


def _report(host: str, port: int, message: str, timeout: int) -> None:
  """Connects to process 0, again and again, and waits for its answer."""
  deadline = time.monotonic() + timeout
  while True:
    try:
      with socket.create_connection((host, port), timeout=5) as connection:
        connection.sendall(message.encode())
        connection.settimeout(max(deadline - time.monotonic(), 0.01))
        answer = connection.recv(256).decode(errors="replace")
      if answer == _GO:
        return
      if answer:
        raise errors.UserError(f"--process_id: {answer}.")
      reason = "it closed the connection"
    except OSError as error:
      reason = str(error)
    if time.monotonic() > deadline:
      raise errors.UserError(
        f"--distributed: process 0 did not answer at {host}:{port} within "
        f"{timeout} s ({reason})."
      )
    time.sleep(0.2)
