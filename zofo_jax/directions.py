"""Directions z, and weights theta + scale * z that exist only where used.

A direction is a value: z = draw(key, leaf path, layer, element). `perturb`
pairs each weight with the key of its z in a `Perturbed` node and computes
nothing. The node is a pytree, so `lax.scan` over stacked layers slices it and
`vmap` over scales batches it; a model reads its weights through `value`,
`take` and `dot`, and theta + scale * z exists one layer at a time.

Keys: direction key -> (leaf path) -> (layer, for stacked leaves) -> element.
"""

import dataclasses
import re
import zlib
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from zofo_jax import noise

STACKED = r"(^|/)layers/"


# Rows of a leaf's axis 0: their numbers, or consecutive ones.
Rows = jax.Array | noise.Block


class Direction(Protocol):
  """A kind of random direction; hashable, so that jit can key on it."""

  def draw(
    self, key: jax.Array, shape: tuple[int, ...], rows: Rows | None = None
  ) -> jax.Array:
    """Returns z, float32; only the given rows of axis 0 if `rows` is set."""
    ...


def _draw_rows(
  element_fn: Callable[[jax.Array, Rows, int], jax.Array],
  key: jax.Array,
  shape: tuple[int, ...],
  rows: Rows | None,
) -> jax.Array:
  """Draws a leaf as a matrix of rows; scalars are one row of one element."""
  if rows is None:
    rows = noise.Block(0, shape[0] if shape else 1)
    leading = shape[:1]
  elif isinstance(rows, noise.Block):
    leading = (rows.size,)
  else:
    leading = rows.shape
    rows = rows.astype(jnp.uint32)
  columns = int(np.prod(shape[1:], dtype=np.int64))
  z = element_fn(key, rows, columns)
  return z.reshape(*leading, *shape[1:])


@dataclasses.dataclass(frozen=True)
class Gaussian:
  """z ~ N(0, I), drawn in float32."""

  def draw(
    self, key: jax.Array, shape: tuple[int, ...], rows: Rows | None = None
  ) -> jax.Array:
    """Returns z, float32; only the given rows of axis 0 if `rows` is set."""
    return _draw_rows(noise.gaussian, key, shape, rows)


@dataclasses.dataclass(frozen=True)
class Rademacher:
  """z uniform on {-1, +1}^d; exact in every dtype, 64 elements a draw."""

  def draw(
    self, key: jax.Array, shape: tuple[int, ...], rows: Rows | None = None
  ) -> jax.Array:
    """Returns z, float32; only the given rows of axis 0 if `rows` is set."""
    return _draw_rows(noise.rademacher, key, shape, rows)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Perturbed:
  """A weight to be read as value + scale * z.

  Attributes:
    value: the stored weight, shape [...] or, stacked, [layers, ...].
    key: uint32 key of z, shape [2] or [layers, 2].
    scale: signed step along z, float32, shape [] or [layers].
    direction: the kind of z.
  """

  value: jax.Array
  key: jax.Array
  scale: jax.Array
  direction: Direction = dataclasses.field(metadata={"static": True})

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the stored weight."""
    return self.value.shape

  @property
  def dtype(self) -> jnp.dtype:
    """Type of the stored weight, and of the perturbed one."""
    return self.value.dtype

  @property
  def ndim(self) -> int:
    """Number of axes of the stored weight."""
    return self.value.ndim


def _is_perturbed(leaf: Any) -> bool:
  return isinstance(leaf, Perturbed)


def path_name(path: tuple[Any, ...]) -> str:
  """Writes a key path as `layers/attention/query/kernel`."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def leaf_keys(key: jax.Array, tree: Any, stacked: str = STACKED) -> Any:
  """Gives every leaf the key of its direction.

  Args:
    key: typed threefry PRNG key, shape []. Folded, not consumed.
    tree: any pytree of arrays.
    stacked: pattern of the paths whose axis 0 counts layers.

  Returns:
    A tree like `tree` of uint32 keys, [2] for a plain leaf and [layers, 2]
    for a stacked one.

  Raises:
    ValueError: the key is not a threefry key. Other generators give different
      numbers under vmap and in a loop, so z could not be drawn again.
  """
  data = jax.random.key_data(key)
  if data.shape != (2,):
    raise ValueError(
      "directions need one threefry key (jax.random.key(seed)); got key data "
      f"of shape {data.shape}"
    )

  def leaf_key(path, leaf):
    name = path_name(path)
    own = noise.fold_in(
      data, np.uint32(zlib.crc32(name.encode())), np.uint32(0)
    )
    if not re.search(stacked, name):
      return own
    layers = jnp.arange(leaf.shape[0], dtype=jnp.uint32)
    return noise.fold_in(own, layers, np.uint32(1))

  return jax.tree_util.tree_map_with_path(leaf_key, tree)


def select_all(name: str) -> bool:
  """Selects every floating-point leaf; the default subset to perturb."""
  del name
  return True


def perturb(
  tree: Any,
  key: jax.Array,
  scale: jax.Array,
  direction: Direction,
  *,
  select: Callable[[str], bool] = select_all,
  stacked: str = STACKED,
) -> Any:
  """Pairs each selected weight with its direction; draws nothing yet.

  Args:
    tree: pytree of weights.
    key: typed PRNG key of the direction, shape []. Folded, not consumed.
    scale: signed step along z, shape [], float32.
    direction: the kind of direction.
    select: tells from a leaf's path whether it is perturbed.
    stacked: pattern of the paths whose axis 0 counts layers.

  Returns:
    `tree` with `Perturbed` nodes in place of the selected float leaves.
  """
  scale = jnp.asarray(scale, jnp.float32)

  def node(path, leaf, leaf_key):
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      return leaf
    if not select(path_name(path)):
      return leaf
    leaf_scale = jnp.broadcast_to(scale, leaf_key.shape[:-1])
    return Perturbed(leaf, leaf_key, leaf_scale, direction)

  return jax.tree_util.tree_map_with_path(
    node, tree, leaf_keys(key, tree, stacked)
  )


def draw(
  direction: Direction, key: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
  """Draws a leaf's z, float32; layer by layer where the key is stacked."""
  if key.ndim == 1:
    return direction.draw(key, shape)
  return jax.vmap(lambda layer: direction.draw(layer, shape[1:]))(key)


def value(weight: Any) -> jax.Array:
  """Reads a weight: the array itself, or value + scale * z in its dtype."""
  if not _is_perturbed(weight):
    return weight
  z = draw(weight.direction, weight.key, weight.shape)
  scale = weight.scale.reshape(
    weight.scale.shape + (1,) * (weight.ndim - weight.scale.ndim)
  )
  shifted = weight.value.astype(jnp.float32) + scale * z
  return shifted.astype(weight.dtype)


def take(weight: Any, rows: jax.Array) -> jax.Array:
  """Reads rows of axis 0 (an embedding look-up); z only for those rows."""
  if not _is_perturbed(weight):
    return jnp.take(weight, rows, axis=0)
  z = weight.direction.draw(weight.key, weight.shape, rows)
  taken = jnp.take(weight.value, rows, axis=0).astype(jnp.float32)
  return (taken + weight.scale * z).astype(weight.dtype)


def block(weight: Any, start: jax.typing.ArrayLike, size: int) -> jax.Array:
  """Reads `size` consecutive rows of axis 0 from `start`, a multiple of 64."""
  stored = weight.value if _is_perturbed(weight) else weight
  rows = jax.lax.dynamic_slice_in_dim(stored, start, size)
  if not _is_perturbed(weight):
    return rows
  z = weight.direction.draw(weight.key, weight.shape, noise.Block(start, size))
  return (rows.astype(jnp.float32) + weight.scale * z).astype(weight.dtype)


def dot(x: jax.Array, weight: Any) -> jax.Array:
  """Multiplies x [..., in] by a weight [in, out], perturbed or not."""
  return x @ value(weight)


def materialize(tree: Any) -> Any:
  """Replaces every `Perturbed` node by its value, whole."""
  return jax.tree.map(value, tree, is_leaf=_is_perturbed)


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Says which weights are probed, along what, and how they are read.

  Attributes:
    direction: the kind of direction.
    select: tells from a leaf's path whether it is perturbed and updated.
    stacked: pattern of the paths whose axis 0 counts layers.
    lazy: hand the loss `Perturbed` nodes instead of whole perturbed arrays;
      for models that read weights through `value`, `take` and `dot`.
  """

  direction: Direction = Gaussian()
  select: Callable[[str], bool] = select_all
  stacked: str = STACKED
  lazy: bool = False

  def perturb(self, tree: Any, key: jax.Array, scale: jax.Array) -> Any:
    """Returns tree + scale * z(key), as nodes if `lazy`, else as arrays."""
    nodes = perturb(
      tree,
      key,
      scale,
      self.direction,
      select=self.select,
      stacked=self.stacked,
    )
    return nodes if self.lazy else materialize(nodes)

  def add(self, tree: Any, keys: jax.Array, weights: jax.Array) -> Any:
    """Returns tree + sum_q weights[q] * z(keys[q]), a layer at a time.

    Written so that a donated `tree` is updated in place: the temporaries are
    one layer in float32, whatever the number of directions.

    Args:
      tree: pytree of weights, any float dtype.
      keys: typed PRNG keys, shape [Q]. Folded, not consumed.
      weights: float32, shape [Q].

    Returns:
      A tree like `tree`; leaves that are not selected come back untouched.
    """
    keys_tree = jax.vmap(lambda key: leaf_keys(key, tree, self.stacked))(keys)

    def add_block(block, block_keys):
      def add_one(q, total):
        z = self.direction.draw(block_keys[q], block.shape)
        return total + weights[q] * z

      total = jax.lax.fori_loop(
        0, weights.shape[0], add_one, block.astype(jnp.float32)
      )
      return total.astype(block.dtype)

    def add_leaf(path, leaf, keys_of_leaf):
      if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
      if not self.select(path_name(path)):
        return leaf
      if keys_of_leaf.ndim == 2:
        return add_block(leaf, keys_of_leaf)

      def add_layer(layer, stack):
        block = jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)
        block = add_block(block, keys_of_leaf[:, layer])
        return jax.lax.dynamic_update_index_in_dim(stack, block, layer, 0)

      return jax.lax.fori_loop(0, leaf.shape[0], add_layer, leaf)

    return jax.tree_util.tree_map_with_path(add_leaf, tree, keys_tree)
