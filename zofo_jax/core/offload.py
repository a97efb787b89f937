"""Weights in the host's memory, copied to the device where they are read.

An array in the host's memory (its sharding has `memory_kind="pinned_host"`)
has a type of its own, also when it is traced: jax refuses arithmetic between
the two memories. A stack of layers stays there, a model that scans over it gets
one layer of it, and `fetch` copies this layer to the device. A donated stack is
updated in place, a layer at a time; see `Sampler.apply_directions`.
"""

from typing import Any, TypeVar

import jax

_T = TypeVar("_T")

MEMORY_KIND = "pinned_host"


def is_on_host(x: Any) -> bool:
  """Returns whether x is an array, traced or not, in the host's memory."""
  return (
    isinstance(x, jax.Array)
    and jax.typeof(x).memory_space == jax.memory.Space.Host
  )


def fetch(tree: _T) -> _T:
  """Copies the leaves of a tree that are in the host's memory to the device.

  To be called in the body of a scan over stacked layers, on what it reads of
  them. The functions of `perturbed` call it.

  Args:
    tree: any pytree; leaves on the device are returned unchanged.

  Returns:
    A tree like `tree`.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> import zofo_jax as zofo
    >>> device = jax.devices()[0]
    >>> host = jax.sharding.SingleDeviceSharding(
    ...     device, memory_kind="pinned_host")
    >>> kernels = jax.device_put(jnp.ones((3, 2, 2)), host)
    >>> def layer(x, kernel):
    ...   return x @ zofo.offload.fetch(kernel), None
    >>> x, _ = jax.jit(lambda x, w: jax.lax.scan(layer, x, w))(
    ...     jnp.ones(2), kernels)
    >>> x.tolist()
    [8.0, 8.0]
  """
  return jax.tree.map(
    lambda leaf: (
      jax.device_put(leaf, jax.memory.Space.Device)
      if is_on_host(leaf)
      else leaf
    ),
    tree,
  )


def move_like(x: jax.Array, other: jax.Array) -> jax.Array:
  """Copies an array on the device to the memory that another is in."""
  return jax.device_put(x, jax.memory.Space.Host) if is_on_host(other) else x
