"""A decoder's cache of keys and values.

All layers share one cache, which is carried through the scan over layers, so
that each layer updates its part in place.

Shapes: N layers, B rows, S slots, L tokens of a call, K kv heads of width F.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Cache(NamedTuple):
  """Keys and values of all tokens so far, for all layers.

  Tokens occupy slots in the order of the calls, padding included, so the slots
  of a row's real tokens need not be contiguous. Positions are computed from the
  mask.

  Attributes:
    key: [N, B, S, K, F].
    value: [N, B, S, K, F].
    mask: bool [B, S], slots that hold a real token.
    length: int32 [], number of occupied slots.
    layer: int32 [], the layer to be updated next; 0 between calls.
  """

  key: jax.Array
  value: jax.Array
  mask: jax.Array
  length: jax.Array
  layer: jax.Array


def reserve_slots(
  mask_BxL: jax.Array, cache: Cache | None
) -> tuple[jax.Array, jax.Array, Cache | None]:
  """Reserves slots for the tokens of a call.

  Args:
    mask_BxL: bool, real tokens of this call.
    cache: cache of the earlier tokens; None without a cache.

  Returns:
    The mask [B, S] of all slots, the slots [L] of this call's tokens, and the
    cache in which these slots are occupied.
  """
  slots_L = jnp.arange(mask_BxL.shape[1])
  if cache is None:
    return mask_BxL, slots_L, None
  mask_BxS = jax.lax.dynamic_update_slice_in_dim(
    cache.mask, mask_BxL, cache.length, axis=1
  )
  length = cache.length + mask_BxL.shape[1]
  slots_L = slots_L + cache.length
  return mask_BxS, slots_L, cache._replace(mask=mask_BxS, length=length)


def append(
  cache: Cache | None, key_BxLxKxF: jax.Array, value_BxLxKxF: jax.Array
) -> tuple[jax.Array, jax.Array, Cache | None]:
  """Appends a layer's new keys and values to the cache.

  Args:
    cache: the cache after `reserve_slots`; None without a cache.
    key_BxLxKxF: keys of this call's tokens.
    value_BxLxKxF: values of this call's tokens.

  Returns:
    The layer's keys and values of all slots, [B, S, K, F], and the cache, ready
    for the next layer.
  """
  if cache is None:
    return key_BxLxKxF, value_BxLxKxF, None
  start = cache.length - key_BxLxKxF.shape[1]

  def write(stack, new):
    return jax.lax.dynamic_update_slice(
      stack, new[None].astype(stack.dtype), (cache.layer, 0, start, 0, 0)
    )

  key = write(cache.key, key_BxLxKxF)
  value = write(cache.value, value_BxLxKxF)
  return (
    jax.lax.dynamic_index_in_dim(key, cache.layer, keepdims=False),
    jax.lax.dynamic_index_in_dim(value, cache.layer, keepdims=False),
    cache._replace(key=key, value=value, layer=cache.layer + 1),
  )


def empty(
  shape: tuple[int, int, int], rows: int, slots: int, dtype: jnp.dtype
) -> Cache:
  """Returns an empty cache.

  Args:
    shape: number of layers, number of kv heads, and width of a head.
    rows: B.
    slots: S, maximum number of tokens of a row, padding included.
    dtype: dtype of keys and values.
  """
  layers, heads, width = shape
  zeros = jnp.zeros((layers, rows, slots, heads, width), dtype)
  return Cache(
    key=zeros,
    value=zeros,
    mask=jnp.zeros((rows, slots), bool),
    length=jnp.int32(0),
    layer=jnp.int32(0),
  )


def reset_layer(cache: Cache | None) -> Cache | None:
  """Resets the cache to the first layer after a pass through all layers."""
  return None if cache is None else cache._replace(layer=jnp.int32(0))


def gather_rows(cache: Cache, rows: jax.Array) -> Cache:
  """Returns a cache of the given rows, which may repeat."""
  return cache._replace(
    key=jnp.take(cache.key, rows, axis=1),
    value=jnp.take(cache.value, rows, axis=1),
    mask=jnp.take(cache.mask, rows, axis=0),
  )
