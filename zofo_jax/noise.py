"""Counter-based random numbers: every element is a function of its position.

Threefry-2x32 (Salmon et al., 2011, "Parallel random numbers: as easy as
1, 2, 3") written out in jnp, so that XLA fuses the draw with whatever uses it.
An element's bits depend on the key and its (row, column) alone: any slice, any
sharding and any order of evaluation give the same numbers.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
# Largest |z| of `gaussian`, whose uniform numbers have 23 bits.
GAUSSIAN_MAX = 5.42

_PARITY = np.uint32(0x1BD11BDA)


class Block(NamedTuple):
  """Consecutive rows, cheaper to draw than rows in any order.

  Attributes:
    start: number of the first row, a multiple of 64; may be traced.
    size: how many rows.
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


def threefry2x32(
  key: jax.Array, high: jax.Array, low: jax.Array, *, fused: bool = True
) -> tuple[jax.Array, jax.Array]:
  """Encrypts the counter (high, low) under a key: 64 random bits an element.

  Args:
    key: uint32, shape [2] or [..., 2] broadcasting against the counters.
    high: uint32 counter words, any shape.
    low: uint32 counter words, a shape that broadcasts with `high`.
    fused: whether XLA may merge the cipher into what uses the bits. False runs
      it in a loop: for bits that many elements share, which would otherwise be
      computed anew for each of them, and for quicker compilation.

  Returns:
    Two uint32 arrays of the broadcast shape; the same bits either way.
  """
  k0, k1 = key[..., 0], key[..., 1]
  schedule = (k0, k1, k0 ^ k1 ^ _PARITY)
  x0, x1 = jnp.broadcast_arrays(high + k0, low + k1)

  if fused:
    for block in range(5):
      x0, x1 = _rounds(x0, x1, _ROTATIONS[block % 2])
      x0 = x0 + schedule[(block + 1) % 3]
      x1 = x1 + (schedule[(block + 2) % 3] + np.uint32(block + 1))
    return x0, x1

  # All rounds are inside the loop: what follows it would be fused with the use
  # of the bits, and computed for every element that shares them.
  stacked = jnp.stack(schedule)
  rotations = jnp.array(_ROTATIONS, jnp.uint32)

  def next_block(block, pair):
    x0, x1 = _rounds(pair[0], pair[1], rotations[block % 2])
    number = block + 1
    x0 = x0 + stacked[number % 3]
    x1 = x1 + (stacked[(number + 1) % 3] + jnp.uint32(number))
    return x0, x1

  return jax.lax.fori_loop(0, 5, next_block, (x0, x1))


def fold_in(
  key: jax.Array, high: jax.typing.ArrayLike, low: jax.typing.ArrayLike
) -> jax.Array:
  """Derives child keys, shape [..., 2], from a key [2] and counters [...]."""
  high, low = jnp.asarray(high, jnp.uint32), jnp.asarray(low, jnp.uint32)
  return jnp.stack(threefry2x32(key, high, low, fused=False), axis=-1)


def _last_axis(size: int, ndim: int) -> jax.Array:
  """Counts along the last of `ndim` axes, uint32, shape [1, ..., 1, size]."""
  return jnp.arange(size, dtype=jnp.uint32).reshape((1,) * (ndim - 1) + (size,))


def uniform(key: jax.Array, rows: jax.Array | Block, columns: int) -> jax.Array:
  """Draws from (0, 1), float32, shape [*rows.shape, columns].

  Args:
    key: uint32, shape [2].
    rows: uint32 row numbers, any shape, or consecutive ones; the same row gives
      the same numbers.
    columns: elements in a row.

  Returns:
    Odd multiples of 2^-24: 23 random bits, and neither 0 nor 1.
  """
  if isinstance(rows, Block):
    rows = _consecutive(rows.start, rows.size)
  column = _last_axis(columns, rows.ndim + 1)
  x0, x1 = threefry2x32(key, rows[..., None], column)
  # 23 random bits give a float in [1, 2); the half step keeps 0 and 1 out.
  mantissa = ((x0 ^ x1) >> 9) | np.uint32(0x3F800000)
  unit = jax.lax.bitcast_convert_type(mantissa, jnp.float32)
  return unit + np.float32(2.0**-24 - 1.0)


def gaussian(
  key: jax.Array, rows: jax.Array | Block, columns: int
) -> jax.Array:
  """Draws N(0, 1) elements, float32, shape [*rows.shape, columns].

  Arguments as for `uniform`, whose numbers go through the inverse of the normal
  distribution function; |z| <= 5.42.
  """
  symmetric = 2.0 * uniform(key, rows, columns) - 1.0
  return np.float32(math.sqrt(2.0)) * jax.lax.erf_inv(symmetric)


def rademacher(
  key: jax.Array, rows: jax.Array | Block, columns: int
) -> jax.Array:
  """Draws +1 or -1 with equal chance, one bit an element.

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
  if not isinstance(rows, Block):
    column = _last_axis(columns, rows.ndim + 1)
    x0, x1 = threefry2x32(key, rows[..., None] >> 6, column, fused=False)
    row = jnp.broadcast_to(rows[..., None], x0.shape)
    return _sign(jnp.where(row & 32, x1, x0) << (row & 31))
  blocks = -(-rows.size // 64)
  first = jnp.asarray(rows.start, jnp.uint32) >> 6
  x0, x1 = threefry2x32(
    key,
    _consecutive(first, blocks)[:, None],
    _last_axis(columns, 2),
    fused=False,
  )
  # Chosen, not joined: XLA's loops over joined arrays are no vector loops.
  second = jnp.arange(2, dtype=jnp.uint32).reshape(1, 2, 1, 1) == 1
  words = jnp.where(second, x1[:, None, None], x0[:, None, None])
  bits = words << jnp.arange(32, dtype=jnp.uint32).reshape(1, 1, 32, 1)
  return _sign(bits.reshape(blocks * 64, columns)[: rows.size])


def _consecutive(start: jax.typing.ArrayLike, size: int) -> jax.Array:
  return jnp.asarray(start, jnp.uint32) + jnp.arange(size, dtype=jnp.uint32)


def _sign(bits: jax.Array) -> jax.Array:
  """Turns the highest bit of each word into +1 or -1."""
  one = np.uint32(0x3F800000)
  return jax.lax.bitcast_convert_type(
    (bits & np.uint32(0x80000000)) | one, jnp.float32
  )
