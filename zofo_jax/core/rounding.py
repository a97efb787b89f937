"""Stochastic rounding: small steps survive in bfloat16 on average."""

from typing import Any

import jax
import jax.numpy as jnp

from zofo_jax.core import directions, prng
from zofo_jax.core import keys as keys_lib


def stochastic_round(
  x: jax.Array,
  dtype: Any,
  key: jax.Array | None,
  rows: prng.RowRange | None = None,
) -> jax.Array:
  """Rounds float32 numbers to a narrower dtype so that the mean is kept.

  A number between two neighbours of the dtype becomes the further one with the
  probability that makes the expectation exact.

  Args:
    x: float32, a whole leaf or some rows of it.
    dtype: a float dtype.
    key: uint32 words of a leaf's rounding key, shape [2]; None rounds to
      nearest, ties to even.
    rows: which rows of the leaf `x` holds; None for all.

  Returns:
    The rounded numbers, of dtype `dtype`.
  """
  nearest = x.astype(dtype)
  if key is None or nearest.dtype == x.dtype:
    return nearest
  stored = _to_float32(nearest)
  error = x - stored
  side = jnp.where(error > 0, jnp.inf, -jnp.inf).astype(dtype)
  other = jnp.nextafter(nearest, side)
  gap = jnp.abs(other.astype(jnp.float32) - stored)
  uniform = directions.sample_rows(prng.uniform, key, x.shape, rows)
  return jnp.where(uniform * gap < jnp.abs(error), other, nearest)


def _to_float32(x: jax.Array) -> jax.Array:
  """Returns x [...] in float32, with the bits that were rounded off gone.

  XLA may replace a conversion to a narrower dtype and back by nothing (it keeps
  "excess precision"). On a GPU it does: the rounding error above would be zero,
  and every write would round to nearest. Conversions of integers are kept.
  """
  if x.dtype == jnp.bfloat16:  # the upper half of a float32
    words = jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(words << 16, jnp.float32)
  return jax.lax.optimization_barrier(x).astype(jnp.float32)


def apply_updates(tree: Any, updates: Any, rounding_key: jax.Array) -> Any:
  """Returns tree + updates like `optax.apply_updates`, rounded stochastically.

  Args:
    tree: pytree of weights, any dtype.
    updates: a tree like it.
    rounding_key: typed PRNG key, shape [], folded with every leaf's path;
      float32 leaves do not use it.

  Returns:
    A tree like `tree`, of its dtypes.
  """
  keys = keys_lib.leaf_keys(
    keys_lib.DirectionKey(rounding_key, rounding_key), tree
  )

  def add(leaf, update, leaf_key):
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      return leaf
    total = leaf.astype(jnp.float32) + update.astype(jnp.float32)
    return stochastic_round(total, leaf.dtype, leaf_key.direction)

  return jax.tree.map(add, tree, updates, keys)
