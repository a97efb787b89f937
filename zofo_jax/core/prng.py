"""Counter-based random numbers: every element is a function of its position.

Threefry-2x32 (Salmon et al., 2011, "Parallel random numbers: as easy as
1, 2, 3") written out in jnp, so that XLA fuses the draw with whatever uses it.
An element's bits depend on the key and its (row, column) alone: any slice, any
sharding and any order of evaluation give the same numbers.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zofo_jax.core import xla

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)
# Largest |z| of `gaussian`, whose uniform numbers have 23 bits.
GAUSSIAN_MAX = 5.42

# Coefficients of `normal_quantile`, lowest power first: of log2(1 + m) / m for
# m in [0, 1), and of the numerator and denominator of (quantile / x)^2 for w in
# [0, 23].
_LOG2 = (
  1.4425532,
  -0.71828187,
  0.45827037,
  -0.27953702,
  0.12345032,
  -0.02645702,
)
_ABOVE = (
  1.57080354,
  0.66739338,
  0.131138156,
  0.0148991261,
  0.00116414679,
  -1.16751620e-6,
)
_BELOW = (1.0, 0.0620229906, 0.0153206532, 0.000773512427)


class RowRange(NamedTuple):
  """Consecutive rows, which are cheaper to draw than rows in any order.

  Attributes:
    start: index of the first row, a multiple of 64; may be traced.
    size: number of rows.
  """

  start: jax.typing.ArrayLike
  size: int


def _rounds(
  x0: jax.Array, x1: jax.Array, rotations: jax.Array | tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
  for i in range(4):
    rotation = rotations[i]
    x0 = x0 + x1
    x1 = (x1 << rotation) | (x1 >> (32 - rotation))
    x1 = x0 ^ x1
  return x0, x1


def _schedule(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the key words that are added between blocks of rounds."""
  k0, k1 = key[..., 0], key[..., 1]
  return k0, k1, k0 ^ k1 ^ _PARITY


# Jitted so that it is traced once per shape, not for each of the hundreds of
# draws of a step.
@jax.jit
def threefry2x32(
  key: jax.Array, high: jax.Array, low: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Encrypts the counter (high, low) under a key: 64 random bits per element.

  Args:
    key: uint32, shape [2] or [..., 2] broadcasting against the counters.
    high: uint32 counter words, any shape.
    low: uint32 counter words, a shape that broadcasts with `high`.

  Returns:
    Two uint32 arrays of the broadcast shape.
  """
  schedule = _schedule(key)
  x0, x1 = jnp.broadcast_arrays(high + schedule[0], low + schedule[1])
  for block in range(5):
    x0, x1 = _rounds(x0, x1, _ROTATIONS[block % 2])
    x0 = x0 + schedule[(block + 1) % 3]
    x1 = x1 + (schedule[(block + 2) % 3] + np.uint32(block + 1))
  return x0, x1


@functools.partial(jax.jit, static_argnames="transform")
def threefry2x32_materialized(
  key: jax.Array,
  high: jax.Array,
  low: jax.Array,
  transform: Callable[[jax.Array, jax.Array], Any] | None = None,
) -> Any:
  """Returns threefry2x32(key, high, low), computed once and stored.

  For numbers that many elements share: XLA would otherwise fuse the cipher with
  its uses, and recompute it for each of these elements.

  Args:
    key: as for `threefry2x32`; so are `high` and `low`.
    high: uint32.
    low: uint32.
    transform: function of the two words; its result is stored instead.

  Returns:
    The two words, or `transform` of them.
  """

  def vectorized(key, high, low):
    words = threefry2x32(key, high, low)
    return xla.no_fusion(transform(*words) if transform else words)

  return xla.by_platform(
    *(key, high, low),
    gpu=vectorized,
    default=functools.partial(_threefry2x32_loop, transform=transform),
  )


def _threefry2x32_loop(key, high, low, transform):
  """Computes `threefry2x32_materialized` in a loop, which XLA does not fuse.

  For platforms (CPU, TPU) that remove optimization barriers before fusion. GPUs
  keep them, and a loop would launch a kernel per iteration. A loop also
  compiles faster.
  """
  schedule = jnp.stack(_schedule(key))
  rotations = jnp.array(_ROTATIONS, jnp.uint32)
  x0, x1 = jnp.broadcast_arrays(high + schedule[0], low + schedule[1])

  # `transform` is part of the loop: only the last iteration's result is used.
  def next_block(block, carry):
    x0, x1, _ = carry
    x0, x1 = _rounds(x0, x1, rotations[block % 2])
    number = block + 1
    x0 = x0 + schedule[number % 3]
    x1 = x1 + (schedule[(number + 1) % 3] + jnp.uint32(number))
    return x0, x1, transform(x0, x1) if transform else ()

  result = transform(x0, x1) if transform else ()
  x0, x1, result = jax.lax.fori_loop(0, 5, next_block, (x0, x1, result))
  return result if transform else (x0, x1)


def fold_in(
  key: jax.Array, high: jax.typing.ArrayLike, low: jax.typing.ArrayLike
) -> jax.Array:
  """Derives child keys, shape [..., 2], from a key [2] and counters [...]."""
  high, low = jnp.asarray(high, jnp.uint32), jnp.asarray(low, jnp.uint32)
  return jnp.stack(threefry2x32_materialized(key, high, low), axis=-1)


def _last_axis(size: int, ndim: int) -> jax.Array:
  """Returns 0 to size - 1 along the last of `ndim` axes, uint32."""
  return jnp.arange(size, dtype=jnp.uint32).reshape((1,) * (ndim - 1) + (size,))


def _unit(x0: jax.Array, x1: jax.Array) -> jax.Array:
  """Returns a float in (0, 1) from two words."""
  # 23 random bits give a float in [1, 2); the half step keeps 0 and 1 out.
  mantissa = ((x0 ^ x1) >> 9) | np.uint32(0x3F800000)
  unit = jax.lax.bitcast_convert_type(mantissa, jnp.float32)
  return unit + np.float32(2.0**-24 - 1.0)


def _counters(
  rows: jax.Array | RowRange, columns: int
) -> tuple[jax.Array, jax.Array]:
  """Returns the row and column of every element, as arrays that broadcast."""
  if isinstance(rows, RowRange):
    rows = _consecutive(rows.start, rows.size)
  return rows[..., None], _last_axis(columns, rows.ndim + 1)


def uniform(
  key: jax.Array, rows: jax.Array | RowRange, columns: int
) -> jax.Array:
  """Draws from (0, 1), float32, shape [*rows.shape, columns].

  Args:
    key: uint32, shape [2].
    rows: uint32 row numbers, any shape, or consecutive ones; the same row gives
      the same numbers.
    columns: elements in a row.

  Returns:
    Odd multiples of 2^-24: 23 random bits, and neither 0 nor 1.
  """
  return _unit(*threefry2x32(key, *_counters(rows, columns)))


def _horner(coefficients: tuple[float, ...], x: jax.Array) -> jax.Array:
  """Evaluates a polynomial, lowest power first."""
  y = jnp.float32(coefficients[-1])
  for c in coefficients[-2::-1]:
    y = y * x + np.float32(c)
  return y


# Jitted so that it is one program in eager code, too: op by op, products and
# sums would round differently.
@jax.jit
def normal_quantile(x: jax.Array) -> jax.Array:
  """Returns sqrt(2) erf_inv(x) to a relative error of 5e-6.

  With w = -log2(1 - x^2), (quantile / x)^2 is nearly linear in w at both ends,
  and is approximated by a rational function with the least maximal relative
  error. Faster than `jax.lax.erf_inv`.

  Args:
    x: float32, multiples of 2^-23 in (-1, 1), such as 2 u - 1 for u of
      `uniform`.

  Returns:
    Normal quantiles of (1 + x) / 2, float32.
  """
  # Both factors are exact. The logarithm is the exponent of the float plus
  # m q(m) for log2(1 + m), all of it multiplications that fuse.
  word = jax.lax.bitcast_convert_type((1.0 - x) * (1.0 + x), jnp.uint32)
  exponent = (word >> 23).astype(jnp.float32) - 127.0
  m = jax.lax.bitcast_convert_type(
    (word & np.uint32(0x007FFFFF)) | np.uint32(0x3F800000), jnp.float32
  )
  m = m - 1.0
  w = -(exponent + m * _horner(_LOG2, m))
  squared = x * x * (_horner(_ABOVE, w) / _horner(_BELOW, w))
  # The sign is set last, as a bit, so that no product is left that a compiler
  # could contract with what follows.
  sign = jax.lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(0x80000000)
  size = jax.lax.bitcast_convert_type(jnp.sqrt(squared), jnp.uint32)
  return jax.lax.bitcast_convert_type(size | sign, jnp.float32)


def _normal(x0: jax.Array, x1: jax.Array) -> jax.Array:
  """Returns a normal number from two words."""
  return normal_quantile(2.0 * _unit(x0, x1) - 1.0)


def gaussian(
  key: jax.Array, rows: jax.Array | RowRange, columns: int
) -> jax.Array:
  """Draws N(0, 1) elements, float32, shape [*rows.shape, columns].

  Arguments as for `uniform`, whose numbers go through `normal_quantile`;
  |z| <= GAUSSIAN_MAX.
  """
  return _normal(*threefry2x32(key, *_counters(rows, columns)))


def gaussian_materialized(
  key: jax.Array, rows: jax.Array | RowRange, columns: int
) -> jax.Array:
  """Draws the numbers of `gaussian`, computed once for many elements each."""
  return threefry2x32_materialized(
    key, *_counters(rows, columns), transform=_normal
  )


def rademacher(
  key: jax.Array, rows: jax.Array | RowRange, columns: int
) -> jax.Array:
  """Draws +1 or -1 with equal probability, one bit per element.

  A column's 64 random bits serve 64 consecutive rows, so that neighbours in
  memory differ in the word and share the shift. Devices that hold fewer than 64
  rows of a leaf may exchange words, 1/32 of the leaf; the bits are the same.

  Args:
    key: uint32, shape [2].
    rows: uint32 row numbers, any shape, or consecutive ones; the same row gives
      the same signs.
    columns: elements in a row.

  Returns:
    float32 array of +1 and -1, shape [*rows.shape, columns].
  """
  if not isinstance(rows, RowRange):
    column = _last_axis(columns, rows.ndim + 1)
    x0, x1 = threefry2x32_materialized(key, rows[..., None] >> 6, column)
    row = jnp.broadcast_to(rows[..., None], x0.shape)
    return _sign(jnp.where(row & 32, x1, x0) << (row & 31))
  blocks = -(-rows.size // 64)
  first = jnp.asarray(rows.start, jnp.uint32) >> 6
  x0, x1 = threefry2x32_materialized(
    key, _consecutive(first, blocks)[:, None], _last_axis(columns, 2)
  )
  # Selected, not concatenated: XLA does not vectorise loops over concatenated
  # arrays.
  second = jnp.arange(2, dtype=jnp.uint32).reshape(1, 2, 1, 1) == 1
  words = jnp.where(second, x1[:, None, None], x0[:, None, None])
  bits = words << jnp.arange(32, dtype=jnp.uint32).reshape(1, 1, 32, 1)
  return _sign(bits.reshape(blocks * 64, columns)[: rows.size])


def _consecutive(start: jax.typing.ArrayLike, size: int) -> jax.Array:
  return jnp.asarray(start, jnp.uint32) + jnp.arange(size, dtype=jnp.uint32)


def _sign(bits: jax.Array) -> jax.Array:
  """Returns +1 or -1 from the highest bit of each word."""
  bits_of_one = np.uint32(0x3F800000)
  return jax.lax.bitcast_convert_type(
    (bits & np.uint32(0x80000000)) | bits_of_one, jnp.float32
  )
