"""Counts the kernels that a zeroth-order step launches, from XLA's program.

  python experiments/launches.py --work large [--target FILE]

With small batches on a GPU, time is dominated by kernel launches. The programs
are those of benchmark.py, compiled from shapes for the local device or, with
jax's CUDA plugin and without a GPU, for the one described in FILE (a
GpuTargetConfigProto in text format; XLA has one for every chip). Prints each
program's number of kernels, those in loops counted for every iteration, and its
temporaries.
"""

import argparse
import os
import pathlib
import re

import jax
import rich.console
import rich.table
from bench import models, steps, workload

# Instructions without a kernel, or that run on the host only.
FREE = frozenset(
  {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "while"}
  | {"call", "conditional", "after-all", "partition-id", "replica-id"}
)


def device(target: pathlib.Path | None) -> jax.Device:
  """Returns the device to compile for, described by a file if there is one."""
  if target is None:
    return jax.devices()[0]
  from jax.experimental import topologies

  topology = topologies.get_topology_desc(
    platform="cuda",
    topology_name="",
    target_config=target.read_text(),
    topology="1x1x1",
  )
  return topology.devices[0]


def computations(text: str) -> tuple[dict[str, list[str]], str]:
  """Returns an HLO module's computations by name, and the entry's name."""
  bodies: dict[str, list[str]] = {}
  name = entry = ""
  for line in text.splitlines():
    head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
    if head:
      name = head[2]
      bodies[name] = []
      entry = name if head[1] else entry
    elif name and line.startswith("  "):
      bodies[name].append(line)
  return bodies, entry


def launches(text: str) -> int:
  """Counts the instructions of an HLO module that run as kernels.

  Raises:
    ValueError: the number of iterations of a loop is unknown.
  """
  bodies, entry = computations(text)

  def count(name: str) -> int:
    total = 0
    for line in bodies[name]:
      # A type has no word before a bracket.
      operation = re.search(r" = .*?(?<= )([a-z][\w\-]*)\(", line)
      if not operation:
        continue
      called = dict(re.findall(r"(body|to_apply)=%?([\w.\-]+)", line))
      if operation[1] == "while":
        turns = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
        if not turns:
          raise ValueError(f"a loop of unknown length: {called['body']}")
        total += int(turns[1]) * count(called["body"])
      elif operation[1] == "call":
        total += count(called["to_apply"])
      # Asynchronous operations are a start and an end.
      total += operation[1] not in FREE and not operation[1].endswith("-done")
    return total

  return count(entry)


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--work", choices=workload.WORKS, default="full")
  parser.add_argument("--target", type=pathlib.Path)
  given = parser.parse_args()
  if given.target:
    # Lets the plugin work without CUDA libraries.
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
  on = device(given.target)
  table = rich.table.Table("program", "kernels", "temporaries, MB")
  work, kinds = workload.WORKS[given.work], tuple(steps.DIRECTIONS)
  module = models.llama_module(work.llama)
  programs, _ = steps.compile_zo(module, work, kinds, on)
  for name, compiled in programs.items():
    size = compiled.memory_analysis().temp_size_in_bytes
    kernels = launches(compiled.as_text())
    table.add_row(name, str(kernels), f"{size / 1e6:.0f}")
  rich.console.Console().print(table)


if __name__ == "__main__":
  main()
