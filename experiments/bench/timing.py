"""Alternating timing, ratios of pairs, and a description of the machine."""

import importlib.metadata
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any


def timed_in_turn(
  programs: dict[str, Callable[[], Any]],
  repeats: int,
  clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
  """Times programs alternately, after one call of each to warm up.

  Args:
    programs: name -> function that waits for its result.
    repeats: rounds.
    clock: returns seconds.

  Returns:
    name -> seconds of each round.
  """
  for program in programs.values():
    program()
  seconds: dict[str, list[float]] = {name: [] for name in programs}
  for _ in range(repeats):
    for name, program in programs.items():
      start = clock()
      program()
      seconds[name].append(clock() - start)
  return seconds


def ratio(a_seconds: list[float], b_seconds: list[float]) -> dict[str, Any]:
  """Summarises a / b over pairs of consecutive timings."""
  ratios = [a / b for a, b in zip(a_seconds, b_seconds, strict=True)]
  return {
    "ratio": statistics.median(ratios),
    "min": min(ratios),
    "max": max(ratios),
    "pairs": len(ratios),
    "a_seconds": statistics.median(a_seconds),
    "b_seconds": statistics.median(b_seconds),
  }


def bytes_ratio(a_bytes: int, b_bytes: int) -> dict[str, Any]:
  """Returns a / b of sizes, which are measured once."""
  return {
    "ratio": a_bytes / b_bytes,
    "min": a_bytes / b_bytes,
    "max": a_bytes / b_bytes,
    "pairs": 1,
    "a_bytes": a_bytes,
    "b_bytes": b_bytes,
  }


def machine() -> dict[str, Any]:
  """Describes the machine."""
  name = platform.processor() or platform.machine()
  cpuinfo = pathlib.Path("/proc/cpuinfo")
  if cpuinfo.exists():
    for line in cpuinfo.read_text().splitlines():
      if line.startswith("model name"):
        name = line.partition(":")[2].strip()
        break
  return {
    "processor": name,
    "architecture": platform.machine(),
    "system": platform.system(),
    "cores": os.cpu_count(),
  }


def versions() -> dict[str, str | None]:
  """Lists the versions of what is measured."""
  installed: dict[str, str | None] = {"python": platform.python_version()}
  for name in ("jax", "jaxlib", "flax", "optax", "torch", "transformers"):
    try:
      installed[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      installed[name] = None
  return installed
