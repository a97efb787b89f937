"""Random directions z, each element a function of a key and its position.

A leaf's key has two parts: `direction` is new for every direction, `subspace`
may be shared by several; see `keys.LeafKey`. Every kind except `Sparse` has
E[z z^T] = I.

A new kind is a frozen dataclass that subclasses `Direction` and defines
`sample`; the other members are optimisations.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from zofo_jax.core import prng
from zofo_jax.core.keys import LeafKey

# Rows of a leaf's axis 0: an array of indices, or a range.
Rows = jax.Array | prng.RowRange
Shape = tuple[int, ...]


class Direction(Protocol):
  """A kind of random direction; hashable, so that jit can key on it."""

  @property
  def cache_draw(self) -> bool:
    """Whether drawing z costs more than keeping it until it is used again.

    Default: False.
    """
    return False

  @property
  def elementwise(self) -> bool:
    """Whether an element of z depends on O(1) random numbers.

    And on no other element of its row. Default: True; a stack of layers is then
    updated in one vectorised pass, with hardly any temporaries.
    """
    return True

  @property
  def exact_in_low_precision(self) -> bool:
    """Whether every float dtype represents z exactly. Default: False."""
    return False

  def sample(
    self, key: LeafKey, shape: Shape, rows: Rows | None = None
  ) -> jax.Array:
    """Draws z of one leaf, or of some rows of its axis 0.

    Args:
      key: key of the leaf.
      shape: shape of the leaf, without an axis of layers.
      rows: which rows of axis 0 to draw; None for all.

    Returns:
      float32, of shape `shape`, or [*rows, *shape[1:]].
    """
    ...

  def mask(self, z: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns the part of z along which a weight moves. Default: all of it.

    Args:
      z: float32, of the shape of `weight`.
      weight: the stored weight, unperturbed.
    """
    del weight
    return z

  def matmul(
    self, x: jax.Array, key: LeafKey, shape: Shape, *, transposed: bool = False
  ) -> jax.Array | None:
    """Returns x z, or x z^T, computed without z. Default: None.

    Args:
      x: [..., in], or [..., out] if transposed.
      key: key of a matrix z [in, out].
      shape: (in, out).
      transposed: whether to multiply by z^T.

    Returns:
      The product, of the dtype of `x`; None if forming z is no more expensive,
      or the only way.
    """
    del x, key, shape, transposed
    return None

  def before_products(self, x: jax.Array, key: LeafKey) -> jax.Array:
    """Returns x, of which both x theta and x z are computed. Default: x itself.

    Args:
      x: [..., in].
      key: key of a matrix z [in, out].
    """
    del key
    return x

  def weighted_sum(
    self, keys: LeafKey, weights: jax.Array, shape: Shape
  ) -> jax.Array | None:
    """Returns sum_q weights[q] z(keys[q]) without a loop over q. Default: None.

    Args:
      keys: keys of one leaf's directions, each part [Q, 2].
      weights: float32, shape [Q].
      shape: shape of the leaf, without an axis of layers.

    Returns:
      float32, of shape `shape`; None if the loop is the only way.
    """
    del keys, weights, shape
    return None


def sample_rows(
  elements: Callable[[jax.Array, Rows, int], jax.Array],
  key: jax.Array,
  shape: Shape,
  rows: Rows | None = None,
) -> jax.Array:
  """Draws a leaf as rows of elements; a scalar is one row of one element.

  Args:
    elements: (key, rows, columns) -> float32 [*rows.shape, columns], such as
      `prng.gaussian`.
    key: uint32, shape [2].
    shape: shape of the leaf.
    rows: which rows of axis 0 to draw; None for all.

  Returns:
    float32, of shape `shape`, or [*rows, *shape[1:]].
  """
  if rows is None:
    rows = prng.RowRange(0, shape[0] if shape else 1)
    leading = shape[:1]
  elif isinstance(rows, prng.RowRange):
    leading = (rows.size,)
  else:
    leading = rows.shape
    rows = rows.astype(jnp.uint32)
  columns = int(np.prod(shape[1:], dtype=np.int64))
  return elements(key, rows, columns).reshape(*leading, *shape[1:])


@dataclasses.dataclass(frozen=True)
class Gaussian(Direction):
  """z ~ N(0, I), drawn in float32."""

  @property
  def cache_draw(self) -> bool:
    """True: an element costs a cipher and a normal quantile."""
    return True

  def sample(
    self, key: LeafKey, shape: Shape, rows: Rows | None = None
  ) -> jax.Array:
    """Draws z; see `Direction`."""
    return sample_rows(prng.gaussian, key.direction, shape, rows)


@dataclasses.dataclass(frozen=True)
class Rademacher(Direction):
  """z uniform on {-1, +1}^d; one call of the cipher gives 64 elements."""

  @property
  def exact_in_low_precision(self) -> bool:
    """True: +1 and -1."""
    return True

  def sample(
    self, key: LeafKey, shape: Shape, rows: Rows | None = None
  ) -> jax.Array:
    """Draws z; see `Direction`."""
    return sample_rows(prng.rademacher, key.direction, shape, rows)


@dataclasses.dataclass(frozen=True)
class LowRank(Direction):
  """z = U V^T / sqrt(rank) with Gaussian U and V: a LoRA drawn from a key.

  U [in, rank] is drawn from the key of the direction, V [out, rank] from that
  of the subspace, so directions that share a subspace key share the column
  space of V (LOZO, arXiv 2410.07698). Non-matrix leaves (an axis of layers not
  counted) get Gaussian directions.

  Attributes:
    rank: number of columns of U and V.
  """

  rank: int = 4

  @property
  def elementwise(self) -> bool:
    """True for a small rank: an element depends on 2 * rank numbers."""
    return self.rank <= 8

  def _scale(self) -> np.float32:
    return np.float32(self.rank**-0.5)

  def _factors(
    self, key: LeafKey, shape: Shape, rows: Rows | None = None
  ) -> tuple[jax.Array, jax.Array]:
    u = sample_rows(
      prng.gaussian_materialized, key.direction, (shape[0], self.rank), rows
    )
    v = sample_rows(
      prng.gaussian_materialized, key.subspace, (shape[1], self.rank)
    )
    # Rounded to fixed point, so coarse that a sum of `rank` products is exact
    # in float32: z has the same bits in whatever order a program adds them.
    largest = self.rank * prng.GAUSSIAN_MAX**2
    step = np.float32(2.0 ** -((24 - int(np.ceil(np.log2(largest)))) // 2))
    return jnp.round(u / step) * step, jnp.round(v / step) * step

  def sample(
    self, key: LeafKey, shape: Shape, rows: Rows | None = None
  ) -> jax.Array:
    """Draws z; see `Direction`."""
    if len(shape) != 2:
      return sample_rows(prng.gaussian, key.direction, shape, rows)
    u, v = self._factors(key, shape, rows)
    # Outer products, which XLA fuses with the use of z; it would write a matrix
    # product to memory whole.
    columns = v.T.reshape(self.rank, *(1,) * (u.ndim - 1), -1)
    terms = [u[..., r, None] * columns[r] for r in range(self.rank)]
    return functools.reduce(jnp.add, terms) * self._scale()

  def factors(self, key: LeafKey, shape: Shape) -> tuple[jax.Array, jax.Array]:
    """Returns left [in, rank] and right [rank, out], whose product is z.

    Args:
      key: key of a matrix.
      shape: (in, out).
    """
    u, v = self._factors(key, shape)
    return u, v.T * self._scale()

  def matmul(
    self, x: jax.Array, key: LeafKey, shape: Shape, *, transposed: bool = False
  ) -> jax.Array | None:
    """Returns (x U) V^T or (x V) U^T if that is cheaper than forming z."""
    rows = x.size // x.shape[-1]
    # The product passes over the rows of x twice, U V^T over all of z.
    if rows * sum(shape) >= np.prod(shape, dtype=np.int64):
      return None
    u, v = self._factors(key, shape)
    first, second = (v, u) if transposed else (u, v)
    first = first * self._scale()
    return (x @ first.astype(x.dtype)) @ second.T.astype(x.dtype)

  def weighted_sum(
    self, keys: LeafKey, weights: jax.Array, shape: Shape
  ) -> jax.Array | None:
    """Returns the sum as one product of rank Q * rank."""
    if len(shape) != 2:
      return None
    u, v = jax.vmap(lambda key: self._factors(key, shape))(keys)
    weighted = u * weights[:, None, None]
    # Scaled last, as in `sample`: one direction of weight 1 gives its own z.
    z = jnp.einsum("qir,qor->io", weighted, v, precision="highest")
    return z * self._scale()


@dataclasses.dataclass(frozen=True)
class PerExample(Direction):
  """z = Z o (r s^T): random signs r, s on a matrix Z that directions share.

  r [in] and s [out] are drawn from the key of the direction, Z [in, out] from
  that of the subspace. All examples of a batch share Z, so that a direction for
  each costs one more matrix product than none: x (Z o r s^T) = ((x o r) Z) o s.
  The weighted sum is Z o (R^T diag(c) S). Flipout (arXiv 1803.04386); GRZO
  (arXiv 2606.02857).

  Attributes:
    shared: the kind of Z.
  """

  shared: Direction = Rademacher()

  @property
  def elementwise(self) -> bool:
    """As for the shared kind."""
    return self.shared.elementwise

  def _shared(
    self, subspace_key: jax.Array, shape: Shape, rows: Rows | None = None
  ) -> jax.Array:
    # Two keys, so that the two factors of a low-rank Z differ.
    other = prng.fold_in(subspace_key, np.uint32(0), np.uint32(4))
    return self.shared.sample(LeafKey(subspace_key, other), shape, rows)

  def _signs(
    self, direction_key: jax.Array, shape: Shape, rows: Rows | None = None
  ) -> tuple[jax.Array, jax.Array]:
    """Returns r [rows] and s [columns]."""
    left = sample_rows(prng.rademacher, direction_key, shape[:1], rows)
    columns = int(np.prod(shape[1:], dtype=np.int64))
    # A separate key, so that s does not repeat the signs of r; a vector has no
    # s.
    other = prng.fold_in(direction_key, np.uint32(0), np.uint32(3))
    right = sample_rows(prng.rademacher, other, (columns,))
    return left, right if len(shape) > 1 else jnp.ones_like(right)

  def sample(
    self, key: LeafKey, shape: Shape, rows: Rows | None = None
  ) -> jax.Array:
    """Draws z; see `Direction`."""
    z = self._shared(key.subspace, shape, rows)
    left, right = self._signs(key.direction, shape, rows)
    signs = left[..., None] * right.reshape((1,) * left.ndim + (-1,))
    return z * signs.reshape(z.shape)

  def matmul(
    self, x: jax.Array, key: LeafKey, shape: Shape, *, transposed: bool = False
  ) -> jax.Array:
    """Returns ((x o r) Z) o s, or ((x o s) Z^T) o r."""
    first, second = self._signs(key.direction, shape)
    z = self._shared(key.subspace, shape).astype(x.dtype)
    if transposed:
      first, second, z = second, first, z.T
    y = (x * jnp.broadcast_to(first.astype(x.dtype), x.shape)) @ z
    return y * jnp.broadcast_to(second.astype(x.dtype), y.shape)

  def weighted_sum(
    self, keys: LeafKey, weights: jax.Array, shape: Shape
  ) -> jax.Array:
    """Returns Z o (R^T diag(weights) S), for keys of one subspace."""
    left, right = jax.vmap(
      lambda direction_key: self._signs(direction_key, shape)
    )(keys.direction)
    left = left.reshape(weights.shape[0], -1)  # a scalar has no rows
    signs = jnp.einsum("qi,qo->io", left * weights[:, None], right)
    return self._shared(keys.subspace[0], shape) * signs.reshape(shape)


@dataclasses.dataclass(frozen=True)
class Sparse(Direction):
  """Directions that move small weights only (S-MeZO, arXiv 2402.15751).

  The mask |w| <= threshold * rms(row) is computed from the weights, row by row
  along the last axis, and never stored. Vectors are not masked.

  Attributes:
    dense: the kind that is masked.
    threshold: size of the largest weight that moves, relative to the root mean
      square of its row; at 0.67, about half of Gaussian weights move.
  """

  dense: Direction = Rademacher()
  threshold: float = 0.67

  @property
  def cache_draw(self) -> bool:
    """As for the dense kind."""
    return self.dense.cache_draw

  @property
  def exact_in_low_precision(self) -> bool:
    """As for the dense kind."""
    return self.dense.exact_in_low_precision

  @property
  def elementwise(self) -> bool:
    """False: the mask depends on a whole row of weights."""
    return False

  def sample(
    self, key: LeafKey, shape: Shape, rows: Rows | None = None
  ) -> jax.Array:
    """Draws z, not yet masked; see `Direction`."""
    return self.dense.sample(key, shape, rows)

  def mask(self, z: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns z where the weight is small, 0 elsewhere."""
    if weight.ndim < 2:
      return z
    square = jnp.square(weight.astype(jnp.float32))
    mean = jnp.mean(square, axis=-1, keepdims=True)
    return jnp.where(square <= self.threshold**2 * mean, z, 0.0)
