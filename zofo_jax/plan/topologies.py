"""Accelerator topologies by name: their chips and the memory of each."""

import math
import re
from typing import NamedTuple

from zofo_jax import errors

# Bytes a second between a chip and its host, each way: 16 lanes of PCIe 4.
HOST_BANDWIDTH = 32e9
_GIB = 2**30


class Topology(NamedTuple):
  """Devices, which may be absent.

  Attributes:
    name: such as "v5p:4x4x4", "cpu:8" or "h100:8".
    kind: the part before the colon.
    num_chips: number of chips.
    chip_bytes: memory of one; None if it is the host's, or not known.
    compiled: whether plans come from their compiler, not from shapes.
  """

  name: str
  kind: str
  num_chips: int
  chip_bytes: int | None
  compiled: bool


# Available slices, the smallest first.
_TORUS_2D = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_TORUS_3D = (
  *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
)
TPUS: dict[str, tuple[int, tuple[str, ...]]] = {
  "v5e": (16 * _GIB, _TORUS_2D),
  "v6e": (32 * _GIB, _TORUS_2D),
  "v5p": (95 * _GIB, _TORUS_3D),
}
# One chip of the smallest slice.
SINGLE_CHIP = "1x1"
# Devices of this machine, whatever they are.
LOCAL = ("cpu", "gpu")
GPUS = {
  "l4": 24 * _GIB,
  "a100-40gb": 40 * _GIB,
  "a100": 80 * _GIB,
  "h100": 80 * _GIB,
  "h200": 141 * 10**9,
  "b200": 180 * _GIB,
}


def find(name: str) -> Topology:
  """Looks a topology up.

  Args:
    name: KIND:SHAPE, for instance "v5e:4x4", "v5e:1x1", "cpu:8", "gpu:1" (the
      GPU of this machine) or "h100:8".

  Raises:
    UserError: no such kind, or no such shape of it.
  """
  kind, _, shape = name.partition(":")
  kinds = (*TPUS, *GPUS, *LOCAL)
  if kind not in kinds:
    raise errors.UserError(
      f"--topology: expected KIND:SHAPE with one of {', '.join(kinds)}; found "
      f"'{name}'.{errors.nearest(kind, kinds)}"
    )
  if kind in TPUS:
    chip_bytes, shapes = TPUS[kind]
    shapes = (*shapes, SINGLE_CHIP)
    if shape not in shapes:
      raise errors.UserError(
        f"--topology: {kind} comes as {', '.join(shapes)}; found '{shape}'."
        f"{errors.nearest(shape, shapes)}"
      )
    count = math.prod(int(n) for n in shape.split("x"))
    return Topology(name, kind, count, chip_bytes, True)
  if not re.fullmatch(r"[1-9]\d*", shape):
    raise errors.UserError(
      f"--topology: expected a number of devices after '{kind}:'; found "
      f"'{shape}'."
    )
  return Topology(name, kind, int(shape), GPUS.get(kind), kind in LOCAL)


def slices(kind: str) -> list[Topology]:
  """Returns all listed slices of a kind, the smallest first."""
  if kind in TPUS:
    return [find(f"{kind}:{shape}") for shape in TPUS[kind][1]]
  return [find(f"{kind}:{2**i}") for i in range(8)]
