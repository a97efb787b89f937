"""Reads the collectives of a compiled program from its text."""

import math
import re
from collections import defaultdict

KINDS = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-broadcast",
  "collective-permute",
  "ragged-all-to-all",
  "reduce-scatter",
)
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(
  r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+)")
_BOUND = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_TRIPS = re.compile(r'"?known_trip_count"?:\{"?n"?:"?(\d+)"?')


def collectives(text: str) -> list[tuple[str, int, int]]:
  """Finds the collectives of a program.

  Args:
    text: of a compiled program, `compiled.as_text()`.

  Returns:
    (kind, bytes that one device receives, count) of each collective; the count
    is the product of the trip counts of the loops around it.
  """
  by_computation: dict[str, list[tuple[str, int]]] = defaultdict(list)
  calls: dict[str, list[tuple[str, int]]] = defaultdict(list)
  bounds: dict[str, int] = {}
  entry = name = ""
  for line in text.splitlines():
    if (start := _COMPUTATION.match(line)) and " = " not in line:
      name = start[2]
      entry = name if start[1] else entry
      continue
    if match := _BOUND.search(line):
      bounds[name] = int(match[1])
    if match := _COLLECTIVE.search(line):
      size = _bytes(match[1], match[2], started=bool(match[3]))
      by_computation[name].append((match[2], size))
    called = _CALLED.findall(line)
    if loop := _LOOP.search(line):
      # The condition, which precedes, compares a counter from 0 with a bound.
      trips = _TRIPS.search(line)
      count = int(trips[1]) if trips else bounds.get(loop[1], 1)
    else:
      count = 1
    for branches in _BRANCHES.findall(line):
      called += [branch.strip().lstrip("%") for branch in branches.split(",")]
    calls[name] += [(callee, count) for callee in called]

  result: list[tuple[str, int, int]] = []

  def visit(name: str, times: int) -> None:
    result.extend((kind, size, times) for kind, size in by_computation[name])
    for called, count in calls[name]:
      visit(called, times * count)

  visit(entry, 1)
  return result


def total_bytes(text: str) -> dict[str, int]:
  """Sums the bytes of `collectives` by kind."""
  total: dict[str, int] = defaultdict(int)
  for kind, size, times in collectives(text):
    total[kind] += size * times
  return dict(total)


def _bytes(shapes: str, kind: str, *, started: bool) -> int:
  """Counts the bytes of a result; that of a start also holds operands."""
  sizes = []
  for dtype, bits, dims in _SHAPE.findall(shapes):
    count = math.prod(int(n) for n in dims.split(",") if n)
    width = 8 if dtype == "pred" else int(bits)
    sizes.append(-(-count * width // 8))
  if started and kind in ("all-gather", "collective-permute"):
    return max(sizes)
  return sum(sizes)
