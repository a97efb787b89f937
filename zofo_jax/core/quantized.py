"""Weights stored as small integers and scales, read as an array of floats.

A scale belongs to a block of weights along the axis over which a product sums:

  int8  one block for each channel; weight = value * scale
  int4  blocks of 64;               weight = value * scale
  nf4   blocks of 64;               weight = quantile[value] * scale

`nf4` has the quantiles of QLoRA (Dettmers et al., 2023, arXiv 2305.14314). The
scales are leaves of the parameter tree like any other, at `PATH/scales`, so
that a sampler perturbs and updates them. Integers move only along an adapter,
see `Quantized.add`.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zofo_jax.core import offload
from zofo_jax.core.array_like import ArrayLike

KINDS = ("int8", "int4", "nf4")
_BLOCK = 64
# The largest value of a kind whose values are multiples of a scale.
_LARGEST = {"int8": 127, "int4": 7}
_NF4 = np.array(
  [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
  ],
  np.float32,
)
# Checkpoints know signed integers of four bits only: the first quantile is -8.
_NF4_OFFSET = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Quantized(ArrayLike):
  """A weight to be read as integers times scales.

  It is an array to whatever reads it, and a pytree to `lax.scan`, `vmap`, `jit`
  and `jax.tree.map`; see `perturbed.Perturbed`.

  Attributes:
    values: int8 or int4 array, shape [...] or, stacked, [layers, ...].
    scales: float32, one for each block: the axes of `values`, one of them
      divided by the size of a block.
    kind: one of `KINDS`.
    weight_dtype: dtype of the weight that is read.
  """

  values: Any
  scales: Any
  kind: str = dataclasses.field(metadata={"static": True})
  weight_dtype: Any = dataclasses.field(metadata={"static": True})

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the weight."""
    return self.values.shape

  @property
  def dtype(self) -> Any:
    """Dtype of the weight that is read."""
    return self.weight_dtype

  def __jax_array__(self) -> jax.Array:
    """Returns the whole weight."""
    values, scales = self._fetch()
    return self.dequantize(values, scales)

  def _fetch(self) -> tuple[jax.Array, jax.Array]:
    """Returns values and scales, perturbed or not, on the device."""
    values, scales = offload.fetch((self.values, self.scales))
    return values, jnp.asarray(scales)

  def __getitem__(self, index: Any) -> Any:
    """Indexes the weight; a layer of a stack is not read yet."""
    if self.rows_have_scales and isinstance(index, (int, np.integer)):
      return jax.tree.map(lambda leaf: leaf[index], self)
    return self.__jax_array__()[index]

  @property
  def rows_have_scales(self) -> bool:
    """Whether no block reaches over several indices of axis 0."""
    return self.values.shape[:1] == self.scales.shape[:1]

  def dequantize(self, values: jax.Array, scales: jax.Array) -> jax.Array:
    """Returns the weights of some values and of the scales of their blocks."""
    scales = _repeat_blocks(scales, values.shape)
    return (self._levels(values) * scales).astype(self.weight_dtype)

  def _levels(self, values: jax.Array) -> jax.Array:
    """Returns the multiples of a scale that values stand for, float32."""
    if self.kind != "nf4":
      return values.astype(jnp.float32)
    codes = values.astype(jnp.int32) + _NF4_OFFSET
    return jnp.take(jnp.asarray(_NF4), codes, mode="clip")

  def add(self, change: jax.Array, uniform: jax.Array) -> "Quantized":
    """Returns the weight plus a change, rounded stochastically.

    Scales are kept. A weight between two levels becomes either, so that its
    mean is exact, and moves by less than the distance between the two more or
    less than it should; beyond the largest level it becomes that.

    Args:
      change: of the weight's shape, float32.
      uniform: numbers between 0 and 1, of the same shape.

    Returns:
      The node, on the device.
    """
    values, scales = self._fetch()
    repeated = _repeat_blocks(scales, values.shape)
    # A block of zeros has the scale 0 and cannot move.
    ratios = change / jnp.where(repeated > 0, repeated, jnp.inf)
    ratios = self._levels(values) + ratios
    if self.kind == "nf4":
      levels = jnp.asarray(_NF4)
      low = jnp.searchsorted(levels, ratios, side="right") - 1
      low = jnp.clip(low, 0, len(_NF4) - 2)
      below, above = levels[low], levels[low + 1]
      new = low + (uniform < (ratios - below) / (above - below)) - _NF4_OFFSET
    else:
      most = _LARGEST[self.kind]
      new = jnp.clip(jnp.floor(ratios + uniform), -most, most)
    return dataclasses.replace(
      self, values=new.astype(jnp.int8).astype(values.dtype), scales=scales
    )

  def matmul(self, x: jax.Array) -> jax.Array:
    """Returns x w for a matrix w [in, out], of the dtype of x.

    Scales of channels multiply the product; others, the values.

    Args:
      x: [..., in].
    """
    if self.kind != "int8" or self.scales.shape[0] != 1:
      return x @ self.__jax_array__()
    values, scales = self._fetch()
    product = x @ values.astype(x.dtype)
    scales = scales.reshape((1,) * (x.ndim - 1) + (-1,))
    return (product.astype(jnp.float32) * scales).astype(x.dtype)


def _repeat_blocks(scales: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns the scales of blocks so that they broadcast to weights."""
  for axis, (length, blocks) in enumerate(
    zip(shape, scales.shape, strict=True)
  ):
    if 1 < blocks < length:
      scales = jnp.repeat(scales, length // blocks, axis=axis)
  return scales


def block_size(length: int, kind: str) -> int:
  """Returns the size of a block along an axis: a divisor of its length."""
  return length if kind == "int8" else math.gcd(length, _BLOCK)


def shape_of(
  shape: tuple[int, ...], kind: str, axis: int, dtype: Any
) -> Quantized:
  """Returns the shapes and dtypes of a quantized weight.

  Args:
    shape: of the weight.
    kind: one of `KINDS`.
    axis: axis over which products with the weight sum.
    dtype: of the weight that is read.
  """
  blocks = list(shape)
  blocks[axis] //= block_size(shape[axis], kind)
  return Quantized(
    jax.ShapeDtypeStruct(shape, jnp.int8 if kind == "int8" else jnp.int4),
    jax.ShapeDtypeStruct(tuple(blocks), jnp.float32),
    kind,
    jnp.dtype(dtype),
  )


def quantize(
  weight: Any, kind: str, *, axis: int = -2, dtype: Any = jnp.float32
) -> Quantized:
  """Rounds a weight to the nearest values, on the host.

  A weight of a block whose largest absolute value is m moves by at most m / 254
  (int8), m / 14 (int4) or m * 0.152 (nf4).

  Args:
    weight: float array, at least two axes.
    kind: one of `KINDS`.
    axis: axis over which products with the weight sum: -2 of a matrix [in,
      out], -1 of a table [rows, columns].
    dtype: of the weight that is read.

  Returns:
    The node, of NumPy arrays: the same bits on every machine.

  Raises:
    ValueError: there is no such kind.

  Examples:
    >>> import jax.numpy as jnp
    >>> import zofo_jax as zofo
    >>> kernel = jnp.array([[1.0, -0.5], [0.25, 2.0]])
    >>> node = zofo.quantized.quantize(kernel, "int8")
    >>> node.values.tolist()
    [[127, -32], [32, 127]]
    >>> bool(jnp.max(jnp.abs(jnp.asarray(node) - kernel)) < 0.005)
    True
  """
  if kind not in KINDS:
    raise ValueError(
      f"quantize: kind is {kind!r}; expected one of {', '.join(KINDS)}."
    )
  weight = np.asarray(weight, np.float32)
  shapes = shape_of(weight.shape, kind, axis, dtype)
  axis %= weight.ndim
  size = block_size(weight.shape[axis], kind)
  blocked = weight.reshape(
    *weight.shape[:axis], -1, size, *weight.shape[axis + 1 :]
  )
  largest = np.max(np.abs(blocked), axis=axis + 1, keepdims=True)
  scales = largest / np.float32(_LARGEST.get(kind, 1))
  ratios = blocked / np.where(scales > 0, scales, np.float32(1))
  if kind == "nf4":
    middles = (_NF4[1:] + _NF4[:-1]) / 2
    values = np.searchsorted(middles, ratios) - _NF4_OFFSET
  else:
    values = np.rint(ratios)
  return dataclasses.replace(
    shapes,
    values=values.astype(np.int8)
    .reshape(weight.shape)
    .astype(shapes.values.dtype),
    scales=scales.reshape(shapes.scales.shape),
  )
