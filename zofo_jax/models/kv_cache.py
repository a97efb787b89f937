"""Keys and values that a decoder keeps from one call to the next.

One cache serves all layers and is carried through the scan over them, so that
each layer writes its part in place.

Shapes: N layers, B rows, S slots, L tokens of a call, K kv heads of width F.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Cache(NamedTuple):
  """Keys and values of the tokens so far, for all layers.

  Tokens take slots in the order of the calls, padding included, so a row's
  real tokens need not be neighbours; their positions come from the mask.

  Attributes:
    key: [N, B, S, K, F].
    value: [N, B, S, K, F].
    mask: bool [B, S], slots that hold a real token.
    length: int32 [], slots that are taken.
    layer: int32 [], the layer whose turn it is; 0 between calls.
  """

  key: jax.Array
  value: jax.Array
  mask: jax.Array
  length: jax.Array
  layer: jax.Array


def reserve_slots(
  mask_BxL: jax.Array, cache: Cache | None
) -> tuple[jax.Array, jax.Array, Cache | None]:
  """Gives the tokens of a call the next slots.

  Args:
    mask_BxL: bool, real tokens of this call.
    cache: what came before; None where these tokens are all there are.

  Returns:
    The mask [B, S] of all slots, the slots [L] of this call's tokens, and the
    cache with them marked as taken.
  """
  slots_L = jnp.arange(mask_BxL.shape[1])
  if cache is None:
    return mask_BxL, slots_L, None
  mask_BxS = jax.lax.dynamic_update_slice_in_dim(
    cache.mask, mask_BxL, cache.length, axis=1
  )
  taken = cache.length + mask_BxL.shape[1]
  slots_L = slots_L + cache.length
  return mask_BxS, slots_L, cache._replace(mask=mask_BxS, length=taken)


def append(
  cache: Cache | None, key_BxLxKxF: jax.Array, value_BxLxKxF: jax.Array
) -> tuple[jax.Array, jax.Array, Cache | None]:
  """Puts a layer's new keys and values with the old ones.

  Args:
    cache: after `reserve_slots`; None where there are no old ones.
    key_BxLxKxF: keys of this call's tokens.
    value_BxLxKxF: values of this call's tokens.

  Returns:
    Keys and values of all slots, [B, S, K, F], and the cache at the next layer.
  """
  if cache is None:
    return key_BxLxKxF, value_BxLxKxF, None
  start = cache.length - key_BxLxKxF.shape[1]

  def put(stack, new):
    return jax.lax.dynamic_update_slice(
      stack, new[None].astype(stack.dtype), (cache.layer, 0, start, 0, 0)
    )

  key, value = put(cache.key, key_BxLxKxF), put(cache.value, value_BxLxKxF)
  return (
    jax.lax.dynamic_index_in_dim(key, cache.layer, keepdims=False),
    jax.lax.dynamic_index_in_dim(value, cache.layer, keepdims=False),
    cache._replace(key=key, value=value, layer=cache.layer + 1),
  )


def empty(
  shape: tuple[int, int, int], rows: int, slots: int, dtype: jnp.dtype
) -> Cache:
  """Makes a cache that holds nothing.

  Args:
    shape: number of layers and kv heads, and a head's width.
    rows: B.
    slots: S, tokens that a row can have in all, padding included.
    dtype: of keys and values.
  """
  layers, heads, width = shape
  nothing = jnp.zeros((layers, rows, slots, heads, width), dtype)
  return Cache(
    key=nothing,
    value=nothing,
    mask=jnp.zeros((rows, slots), bool),
    length=jnp.int32(0),
    layer=jnp.int32(0),
  )


def reset_layer(cache: Cache | None) -> Cache | None:
  """Turns a cache that went through the layers back to the first."""
  return None if cache is None else cache._replace(layer=jnp.int32(0))


def gather_rows(cache: Cache, rows: jax.Array) -> Cache:
  """Makes a cache of the given rows, any of them any number of times."""
  return cache._replace(
    key=jnp.take(cache.key, rows, axis=1),
    value=jnp.take(cache.value, rows, axis=1),
    mask=jnp.take(cache.mask, rows, axis=0),
  )
