"""Memory of this process and of its devices, in bytes."""

import pathlib
import sys
from typing import Any


def peak_rss_bytes() -> int:
  """Returns the largest resident memory that this process has had, in bytes."""
  # getrusage also counts what the parent had when it started this process.
  if (high := _proc_status("VmHWM")) is not None:
    return high
  import resource  # not on every system

  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024


def rss_bytes() -> int:
  """Returns the resident memory now, or its peak where only that is known."""
  now = _proc_status("VmRSS")
  return peak_rss_bytes() if now is None else now


def available_host_bytes() -> int | None:
  """Returns the memory that this process may still allocate, if it is known.

  That is what the machine has left, or the limit of the process's container or
  job, if that is less.
  """
  sizes = [_kilobytes("/proc/meminfo", "MemAvailable"), *_limits()]
  return min((size for size in sizes if size is not None), default=None)


def _limits(root: pathlib.Path = pathlib.Path("/")) -> list[int]:
  """Returns the limits of the control groups that this process is in.

  Args:
    root: the root of the file system.
  """
  try:
    lines = (root / "proc/self/cgroup").read_text().splitlines()
  except OSError:
    return []
  limits = []
  for line in lines:  # such as 0::/job/step (version 2), 4:memory:/job
    _, controllers, path = line.split(":", 2)
    if controllers not in ("", "memory"):
      continue
    mount = root / "sys/fs/cgroup" / controllers
    file = "memory.limit_in_bytes" if controllers else "memory.max"
    group = mount / path.lstrip("/")
    for place in (group, *group.parents):
      if not place.is_relative_to(mount):
        break
      try:
        text = (place / file).read_text().strip()
      except OSError:  # of the root, or in a container
        continue
      if text != "max":
        limits.append(int(text))
  return limits


def device_bytes(which: str = "bytes_in_use") -> int | None:
  """Returns the memory used on the fullest local device, if it is known.

  Args:
    which: "bytes_in_use", or "peak_bytes_in_use".
  """
  import jax  # a reader of metrics has no use for devices

  stats = [device.memory_stats() for device in jax.local_devices()]
  used = [s[which] for s in stats if s and which in s]
  return max(used) if used else None


def program_bytes(program: Any) -> int | None:
  """Returns what a compiled program needs on a device, if it is known.

  That is arguments, temporaries, and results that do not reuse an argument.
  """
  analysis = program.memory_analysis()
  if analysis is None:
    return None
  return (
    analysis.argument_size_in_bytes
    + analysis.temp_size_in_bytes
    + analysis.output_size_in_bytes
    - analysis.alias_size_in_bytes
  )


def usage() -> dict[str, int]:
  """Returns the memory fields of a row of metrics.

  The process's resident size now, and `peaks`.
  """
  fields = {"rss_bytes": rss_bytes(), **peaks()}
  # Linux may report a peak a few pages below a size that was read before it.
  fields["peak_rss_bytes"] = max(fields["peak_rss_bytes"], fields["rss_bytes"])
  return fields


def peaks() -> dict[str, int]:
  """Returns the peaks of the process and, if it is known, of a device."""
  fields = {"peak_rss_bytes": peak_rss_bytes()}
  if (peak := device_bytes("peak_bytes_in_use")) is not None:
    fields["peak_device_bytes"] = peak
  return fields


def _proc_status(field: str) -> int | None:
  return _kilobytes("/proc/self/status", field)


def _kilobytes(path: str, field: str) -> int | None:
  """Returns a size that Linux gives in kilobytes, in bytes."""
  try:
    with open(path) as file:
      for line in file:
        if line.startswith(field + ":"):
          return int(line.split()[1]) * 1024
  except OSError:
    pass
  return None
