"""Weights in the host's memory, copied to the device where they are read.

An array in the host's memory (its sharding has `memory_kind="pinned_host"`)
has a type of its own, also when it is traced: jax refuses arithmetic between
the two memories. A stack of layers stays there, a model that scans over it gets
one layer of it, and `fetch` copies this layer to the device. A donated stack is
updated in place, a layer at a time; see `Sampler.apply_directions`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from zofo_jax.core.array_like import ArrayLike

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Deferred(ArrayLike):
  """A weight in the host's memory whose last updates are deferred.

  It is an array to whatever reads it, which gets the updated weight; see
  `deferred.read`.

  Attributes:
    value: the stored weight, shape [...] or, stacked, [layers, ...].
    updates: pytree of what `apply` takes; leaves [...] or [layers, ...].
    count: how many updates there are, int32, shape [] or [layers].
    apply: (weight on the device, updates, count) -> the updated weight.
  """

  value: jax.Array
  updates: Any
  count: jax.Array
  apply: Callable[[jax.Array, Any, jax.Array], jax.Array] = dataclasses.field(
    metadata={"static": True}
  )

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the weight."""
    return self.value.shape

  @property
  def dtype(self) -> Any:
    """Dtype of the weight."""
    return self.value.dtype

  def __jax_array__(self) -> jax.Array:
    """Returns the updated weight, on the device."""
    if self.count.ndim:  # stacked layers, not sliced by a scan
      return jax.lax.map(Deferred.__jax_array__, self)
    return self.apply(fetch(self.value), self.updates, self.count)

  def __getitem__(self, index: Any) -> Any:
    """Indexes the weight; a layer of a stack is not read yet."""
    if self.count.ndim and isinstance(index, (int, np.integer)):
      return jax.tree.map(lambda leaf: leaf[index], self)
    return self.__jax_array__()[index]


def _is_deferred(x: Any) -> bool:
  return isinstance(x, Deferred)


def stored(tree: Any) -> Any:
  """Returns a tree with the stored weights in place of `Deferred` nodes."""
  return jax.tree.map(
    lambda leaf: leaf.value if _is_deferred(leaf) else leaf,
    tree,
    is_leaf=_is_deferred,
  )


def move_like(x: jax.Array, other: jax.Array) -> jax.Array:
  """Copies an array on the device to the memory that another is in."""
  return jax.device_put(x, jax.memory.Space.Host) if is_on_host(other) else x
