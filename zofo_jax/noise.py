"""Counter-based random numbers: every element is a function of its position.

Threefry-2x32 (Salmon et al., 2011, "Parallel random numbers: as easy as
1, 2, 3") written out in jnp, so that XLA fuses the draw with whatever uses it.
An element's bits depend on the key and its (row, column) alone: any slice, any
sharding and any order of evaluation give the same numbers.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)


def threefry2x32(
  key: jax.Array, high: jax.Array, low: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Encrypts the counter (high, low) under a key: 64 random bits an element.

  Args:
    key: uint32, shape [2] or [..., 2] broadcasting against the counters.
    high: uint32 counter words, any shape.
    low: uint32 counter words, a shape that broadcasts with `high`.

  Returns:
    Two uint32 arrays of the broadcast shape.
  """
  k0, k1 = key[..., 0], key[..., 1]
  schedule = (k0, k1, k0 ^ k1 ^ _PARITY)
  x0 = high + schedule[0]
  x1 = low + schedule[1]
  for block in range(5):
    for rotation in _ROTATIONS[block % 2]:
      x0 = x0 + x1
      x1 = (x1 << rotation) | (x1 >> (32 - rotation))
      x1 = x0 ^ x1
    x0 = x0 + schedule[(block + 1) % 3]
    x1 = x1 + schedule[(block + 2) % 3] + np.uint32(block + 1)
  return x0, x1


def fold_in(
  key: jax.Array, high: jax.typing.ArrayLike, low: jax.typing.ArrayLike
) -> jax.Array:
  """Derives child keys, shape [..., 2], from a key [2] and counters [...]."""
  high, low = jnp.asarray(high, jnp.uint32), jnp.asarray(low, jnp.uint32)
  return jnp.stack(threefry2x32(key, high, low), axis=-1)


def _last_axis(size: int, ndim: int) -> jax.Array:
  """Counts along the last of `ndim` axes, uint32, shape [1, ..., 1, size]."""
  return jnp.arange(size, dtype=jnp.uint32).reshape((1,) * (ndim - 1) + (size,))


def gaussian(key: jax.Array, rows: jax.Array, columns: int) -> jax.Array:
  """Draws N(0, 1) elements, float32, shape [*rows.shape, columns].

  Args:
    key: uint32, shape [2].
    rows: uint32 row numbers, any shape; the same row gives the same numbers.
    columns: elements in a row.

  Returns:
    float32 array; |z| <= 5.42, since the uniform beneath has 23 bits.
  """
  column = _last_axis(columns, rows.ndim + 1)
  x0, x1 = threefry2x32(key, rows[..., None], column)
  # 23 random bits give a float in [1, 2); the half ulp keeps 0 and 1 out.
  mantissa = ((x0 ^ x1) >> 9) | np.uint32(0x3F800000)
  unit = jax.lax.bitcast_convert_type(mantissa, jnp.float32) - 1.0
  uniform = 2.0 * unit + np.float32(2.0**-23 - 1.0)
  return np.float32(math.sqrt(2.0)) * jax.lax.erf_inv(uniform)


def rademacher(key: jax.Array, rows: jax.Array, columns: int) -> jax.Array:
  """Draws +1 or -1 with equal chance, 64 elements to one block of bits.

  Args:
    key: uint32, shape [2].
    rows: uint32 row numbers, any shape; the same row gives the same signs.
    columns: elements in a row.

  Returns:
    float32 array of +1 and -1, shape [*rows.shape, columns].
  """
  block = _last_axis(-(-columns // 64), rows.ndim + 1)
  words = jnp.stack(threefry2x32(key, rows[..., None], block), axis=-1)
  shifts = _last_axis(32, words.ndim + 1)
  bits = (words[..., None] >> shifts) & np.uint32(1)
  bits = bits.reshape(*rows.shape, -1)[..., :columns]
  return 1.0 - 2.0 * bits.astype(jnp.float32)
