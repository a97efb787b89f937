"""How weights are stored: as integers, and in which memory.

Used where a model's weights are read, see `model.load_base`.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zofo_jax import errors
from zofo_jax.core import offload, perturbed, quantized
from zofo_jax.models.decoder import SUMMED_AXES
from zofo_jax.models.hf import weights
from zofo_jax.report import memory
from zofo_jax.sharding import mesh as mesh_lib


def check_host_memory(mesh: mesh_lib.AnyMesh, abstract: Any) -> None:
  """Checks that weights can be in the host's memory.

  Raises:
    UserError: jax knows no such memory of these devices, or it is too small.
  """
  device = mesh.local_devices[0]
  kinds = [space.kind for space in device.addressable_memories()]
  if offload.MEMORY_KIND not in kinds:
    raise errors.UserError(
      f"config.model.offload: expected devices with the memory "
      f"'{offload.MEMORY_KIND}'; those of {device.device_kind} have "
      f"{', '.join(kinds)}."
    )
  needed = num_bytes(abstract) // jax.process_count()
  available = memory.available_host_bytes()
  if available is not None and needed > available:
    raise errors.UserError(
      f"config.model.offload: the weights take {needed / 1e9:.1f} GB of host "
      f"memory, and {available / 1e9:.1f} GB are available; expected more, or "
      "model.quantize, or a smaller model.dtype."
    )


def num_bytes(tree: Any) -> int:
  """Returns the bytes of a tree of arrays or shapes; four bits are half one."""
  return sum(
    array_bytes(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)
  )


def array_bytes(shape: tuple[int, ...], dtype: Any) -> int:
  """Returns the bytes of an array; of PRNG keys, those of their data."""
  size = math.prod(shape)
  if jnp.issubdtype(dtype, jnp.integer):
    return size * int(jnp.iinfo(dtype).bits) // 8
  return size * dtype.itemsize


def summed_axis(path: str) -> int | None:
  """Returns the axis over which products with a weight sum; None: no matrix."""
  axes = [axis for pattern, axis in SUMMED_AXES if re.search(pattern, path)]
  return axes[0] if axes else None


def read_quantized(
  abstract: quantized.Quantized, axis: Any, read: weights.ReadFn
) -> quantized.Quantized:
  """Reads and quantizes a weight, a layer or a block of rows at a time."""
  parts = jax.tree.map(lambda part: np.empty(part.shape, part.dtype), abstract)
  length, *lengths = abstract.shape
  size = 1 if lengths[1:] else perturbed.ROWS_PER_BLOCK
  if not abstract.rows_have_scales:
    size = length
  for start in range(0, length, size):
    rows = slice(start, min(start + size, length))
    block = quantized.quantize(
      read((rows, *(slice(None) for _ in lengths))),
      abstract.kind,
      axis=axis,
      dtype=abstract.dtype,
    )
    parts.values[rows], parts.scales[rows] = block.values, block.scales
  return parts
