"""Low-rank changes of matrices, as pairs of factors; no change is ever formed.

A model reads base + left right through the product path of low-rank directions
(`displace`), and a donated base takes it layer by layer (`add_in_place`).
"""

import dataclasses
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import custom_batching

from zofo_jax.core import directions, offload, perturbed, prng, rounding, xla
from zofo_jax.core import keys as keys_lib
from zofo_jax.core import tree as tree_lib
from zofo_jax.core.array_like import is_array_like
from zofo_jax.core.quantized import Quantized
from zofo_jax.core.types import Params

# Of so many products a sum is fused; with more, a matrix product is faster.
_FEW_TERMS = 8


class Factors(NamedTuple):
  """A matrix left @ right, which is never formed.

  Attributes:
    left: float32, [in, R] or, of stacked layers, [layers, in, R].
    right: float32, [R, out] or [layers, R, out].
  """

  left: jax.Array
  right: jax.Array


def difference(
  after: dict[str, Factors], back: dict[str, Factors]
) -> dict[str, Factors]:
  """Returns left right - left' right' of every matrix, of twice the rank.

  It is (left - left') right + left' (right - right'), whose terms are as small
  as the difference: nothing cancels.

  Args:
    after: left and right.
    back: left' and right', of the same shapes.
  """
  return {
    path: Factors(
      jnp.concatenate([new.left - old.left, old.left], axis=-1),
      jnp.concatenate([new.right, new.right - old.right], axis=-2),
    )
    for (path, new), old in zip(after.items(), back.values(), strict=True)
  }


def sum_products(factors: dict[str, Factors]) -> dict[str, Factors]:
  """Returns the sums of matrices over a leading axis, each as one product.

  Args:
    factors: of shapes [M, ..., in, R] and [M, ..., R, out].

  Returns:
    Factors of rank M * R.
  """

  def merge(x, axis):
    x = jnp.moveaxis(x, 0, axis)  # in front of the rank
    shape = list(x.shape)
    shape[axis : axis + 2] = [shape[axis] * shape[axis + 1]]
    return x.reshape(shape)

  return {
    path: Factors(
      merge(pair.left, pair.left.ndim - 2),
      merge(pair.right, pair.right.ndim - 3),
    )
    for path, pair in factors.items()
  }


@dataclasses.dataclass(frozen=True)
class _Product(directions.Direction):
  """A direction that is given: `Factors` take the place of its key."""

  def sample(self, key: Any, shape: Any, rows: Any = None) -> jax.Array:
    """Returns left @ right, or some rows of it; see `Direction`."""
    del shape
    left, right = key
    if isinstance(rows, prng.RowRange):
      left = jax.lax.dynamic_slice_in_dim(left, rows.start, rows.size)
    elif rows is not None:
      left = jnp.take(left, rows, axis=0)
    return jnp.matmul(left, right, precision="highest")

  def matmul(
    self, x: jax.Array, key: Any, shape: Any, *, transposed: bool = False
  ) -> jax.Array:
    """Returns (x left) right, or (x right^T) left^T, in float32."""
    del shape
    left, right = key
    if transposed:
      left, right = right.T, left.T
    return (x.astype(jnp.float32) @ left) @ right


class DrawnFactors(NamedTuple):
  """A matrix left^T @ right, stored by rank: the terms are rows in memory.

  Attributes:
    left: float16, [R, in] or, of stacked layers, [layers, R, in].
    right: float32, [R, out] or [layers, R, out].
  """

  left: jax.Array
  right: jax.Array


@dataclasses.dataclass(frozen=True)
class _Drawn(directions.Direction):
  """A low-rank direction that is drawn: its factors take the place of a key."""

  def sample(self, key: Any, shape: Any, rows: Any = None) -> jax.Array:
    """Returns z, or some rows of it; see `Direction`."""
    del shape
    left, right = key
    if isinstance(rows, prng.RowRange):
      left = jax.lax.dynamic_slice_in_dim(left, rows.start, rows.size, axis=1)
    elif rows is not None:
      left = jnp.take(left, rows, axis=1)
    return _sum_of_outer(left, right)

  def before_products(self, x: jax.Array, key: Any) -> jax.Array:
    """Returns x, stored: all members' are as large as a batch of their rows."""
    # Directions share it, so that it is not a condition for each of them.
    number = key.right.ravel()[0]
    word = jax.lax.bitcast_convert_type(number, jnp.uint32)
    return xla.by_platform(
      *(x, word), cpu=xla.in_a_loop, default=lambda x, word: x
    )

  def matmul(
    self, x: jax.Array, key: Any, shape: Any, *, transposed: bool = False
  ) -> jax.Array:
    """Returns x z, or x z^T, in float32."""
    del shape
    left, right = key
    first, second = (right, left) if transposed else (left, right)
    x, first = x.astype(jnp.float32), first.astype(jnp.float32)
    products = jnp.einsum("...i,ri->...r", x, first)  # x as it lies in memory
    return _sum_of_outer(jnp.moveaxis(products, -1, 0), second)


def _sum_of_outer(columns: jax.Array, rows: jax.Array) -> jax.Array:
  """Returns the sum over r of columns[r] rows[r]; float32 [..., N].

  Few terms are products that XLA fuses with whatever the sum is added to; a
  matrix product would be written to memory, as large as that.

  Args:
    columns: [R, ...].
    rows: [R, N].
  """
  columns, rows = columns.astype(jnp.float32), rows.astype(jnp.float32)
  if len(rows) > _FEW_TERMS:
    return jnp.einsum("r...,rn->...n", columns, rows)
  rows = rows.reshape(len(rows), *(1,) * (columns.ndim - 1), -1)
  terms = [c[..., None] * row for c, row in zip(columns, rows, strict=True)]
  return functools.reduce(jnp.add, terms)


@dataclasses.dataclass(frozen=True)
class _Given(directions.Direction):
  """A direction that is given: z itself takes the place of its key."""

  def sample(self, key: Any, shape: Any, rows: Any = None) -> jax.Array:
    """Returns z, float32; a vector is never read by rows."""
    del shape, rows
    return key


def draws(direction: directions.Direction) -> bool:
  """Returns whether `draw` replaces directions of a kind by their factors.

  Readings of a weight along several of these then share the product with theta.

  Args:
    direction: the kind.
  """
  return isinstance(direction, directions.LowRank)


def draw(tree: Params) -> Params:
  """Draws the low-rank directions of a tree for many readings of its weights.

  Without it, each reading draws the factors of z, as one forward pass needs
  them once. Drawn, they are kept: for a matrix, rank numbers for each row and
  column; for a vector all of z. A draw needs three times what it gives, and is
  done a layer at a time or, under `vmap` over directions, a table at a time.

  Args:
    tree: pytree with `Perturbed` nodes, of which those along
      `directions.LowRank` are replaced.

  Returns:
    A tree of the same weights up to rounding.
  """

  def replace(node):
    if not perturbed.is_perturbed(node) or not draws(node.direction):
      return node
    direction, num_layers = node.direction, node.scale.ndim  # axes of layers
    shape = node.shape[num_layers:]

    def left(key):
      # One of these for each direction, while all share those at the right;
      # fixed-point numbers, of which float16 has all but one bit at most.
      return direction.factors(key, shape)[0].T.astype(jnp.float16)

    def factors(key):
      draw_left = left if num_layers else custom_batching.sequential_vmap(left)
      return DrawnFactors(draw_left(key), direction.factors(key, shape)[1])

    def whole(key):
      return direction.sample(key, shape)

    draw_leaf, kind = (
      (factors, _Drawn()) if len(shape) == 2 else (whole, _Given())
    )
    drawn = (
      jax.lax.map(draw_leaf, node.key) if num_layers else draw_leaf(node.key)
    )
    return perturbed.Perturbed(node.value, drawn, node.scale, kind)

  return jax.tree.map(replace, tree, is_leaf=perturbed.is_perturbed)


def displace(base: Params, factors: dict[str, Factors]) -> Params:
  """Returns base + left right, formed only where a weight is read.

  Args:
    base: the backbone; only read.
    factors: what is added to some of its matrices, by path.

  Returns:
    A tree like `base` with `Perturbed` nodes at these paths.

  Raises:
    ValueError: the backbone has no matrix of a path, or one of another shape.
  """
  _check_factors(base, factors)

  def node(path, leaf):
    pair = factors.get(tree_lib.path_name(path))
    if pair is None:
      return leaf
    scale = jnp.ones(leaf.shape[:-2], jnp.float32)
    return perturbed.Perturbed(leaf, pair, scale, _Product())

  return jax.tree.map_with_path(node, base, is_leaf=is_array_like)


def add_in_place(
  base: Params, factors: dict[str, Factors], rounding_key: jax.Array
) -> Params:
  """Returns base + left right; a donated `base` is updated in place.

  Args:
    base: the backbone, any float dtype, or quantized.
    factors: what is added to some of its matrices, by path.
    rounding_key: typed PRNG key, shape [], of the stochastic rounding to dtypes
      narrower than float32, and to the levels of quantized matrices.

  Returns:
    A tree like `base`. The temporaries are one layer in float32.
  """
  _check_factors(base, factors)
  pair = keys_lib.DirectionKey(rounding_key, rounding_key)

  def add(stored, factors, key):
    change = _Product().sample(factors, None)
    if isinstance(stored, Quantized):
      uniform = directions.sample_rows(prng.uniform, key, change.shape, None)
      return stored.add(change, uniform)
    total = stored.astype(jnp.float32) + change
    return rounding.stochastic_round(total, stored.dtype, key)

  def add_layers(stack, factors, keys):
    def write_layer(i, stack):
      at = lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
      stored = offload.fetch(jax.tree.map(at, stack))
      layer = add(stored, jax.tree.map(at, factors), at(keys))
      return jax.tree.map(
        lambda whole, part: jax.lax.dynamic_update_index_in_dim(
          whole, offload.move_like(part, whole), i, 0
        ),
        stack,
        layer,
      )

    return jax.lax.fori_loop(0, stack.shape[0], write_layer, stack)

  def write(path, array, key, leaf):
    name = tree_lib.path_name(path)
    if name not in factors:
      return leaf
    call = add if array.ndim == 2 else add_layers
    return call(leaf, factors[name], key.direction)

  # Every matrix with a third axis is a stack: an adapter folds into matrices.
  stacked = "|".join(
    f"^{re.escape(path)}$"
    for path, pair in factors.items()
    if pair.left.ndim == 3
  )
  arrays = jax.tree.map(
    lambda leaf: leaf.values if isinstance(leaf, Quantized) else leaf,
    base,
    is_leaf=is_array_like,
  )
  keys = keys_lib.leaf_keys(pair, arrays, stacked or None)
  return jax.tree.map_with_path(write, arrays, keys, base)


def _check_factors(base: Params, factors: dict[str, Factors]) -> None:
  """Raises ValueError unless every factor has a matrix of its shape."""
  leaves = tree_lib.named_leaves(base, is_array_like)
  for path, (left, right) in factors.items():
    shape = (*left.shape[:-1], right.shape[-1])
    if path not in leaves:
      raise ValueError(
        f"Guide.fold: the backbone has no '{path}'; it has {', '.join(leaves)}."
      )
    if leaves[path].shape != shape or len(shape) not in (2, 3):
      raise ValueError(
        f"Guide.fold: '{path}' has shape {leaves[path].shape}; the factors' "
        f"product has {shape}; expected the same, of two axes or, stacked, "
        "three."
      )
