"""Weights theta + scale * z that exist only where they are used.

`perturb` pairs each weight with the key of its z in a `Perturbed` node and
draws nothing. The node is a pytree: `lax.scan` over stacked layers slices it,
`vmap` over scales or examples batches it. A model reads its weights through
`read`, `take`, `read_rows`, `dot` and `dot_transposed`, and a perturbed one exists
a layer at a time, if at all.

Keys: direction -> leaf path -> layer (of stacked leaves) -> element.
"""

import dataclasses
import functools
import re
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zofo_jax.core import directions, prng

STACKED = r"(^|/)layers/"
# Rows that exist at a time of a table that is perturbed or written whole.
ROWS_PER_BLOCK = 4096


class Key(NamedTuple):
  """Key of a direction of a whole tree: typed threefry PRNG keys, shape [].

  Attributes:
    direction: of this direction alone.
    subspace: of what it shares with other directions; see `directions.LeafKey`.
  """

  direction: jax.Array
  subspace: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Perturbed:
  """A weight to be read as value + scale * z.

  Attributes:
    value: the stored weight, shape [...] or, stacked, [layers, ...].
    key: key of z.
    scale: signed step along z, float32, shape [] or [layers].
    direction: the kind of z.
  """

  value: jax.Array
  key: directions.LeafKey
  scale: jax.Array
  direction: directions.Direction = dataclasses.field(metadata={"static": True})

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the stored weight."""
    return self.value.shape

  def add(self, z: jax.Array, stored: jax.Array) -> jax.Array:
    """Returns stored weights plus scale times what of z they move along."""
    z = self.direction.mask(z, stored)
    shifted = stored.astype(jnp.float32) + self.scale * z
    return shifted.astype(stored.dtype)


def _draw(weight: Perturbed, rows: directions.Rows | None = None) -> jax.Array:
  """Draws z, once for all signs that read it if that is dear."""

  def draw(key):
    return weight.direction.sample(key, weight.shape, rows)

  def draw_apart(key):
    # Always so, which XLA does not see: what a branch returns is in memory, and
    # not computed anew in every use that it would be merged with.
    return jax.lax.cond(
      (key.direction[0] | 1) > 0,
      draw,
      lambda key: jnp.zeros_like(draw(key)),
      key,
    )

  if not weight.direction.cache_draw:
    return draw(weight.key)
  return jax.lax.platform_dependent(weight.key, cpu=draw_apart, default=draw)


def is_perturbed(weight: Any) -> bool:
  """Tells a `Perturbed` node from an array."""
  return isinstance(weight, Perturbed)


def read(weight: Any) -> jax.Array:
  """Reads a whole weight: the array itself, or value + scale * z."""
  if not is_perturbed(weight):
    return weight
  if weight.scale.ndim:  # stacked, and not sliced by a scan
    return jax.vmap(read)(weight)
  return weight.add(_draw(weight), weight.value)


def take(weight: Any, rows: jax.Array) -> jax.Array:
  """Reads rows of axis 0 (an embedding look-up), z for those rows alone."""
  if not is_perturbed(weight):
    return jnp.take(weight, rows, axis=0)
  z = _draw(weight, rows)
  return weight.add(z, jnp.take(weight.value, rows, axis=0))


def read_rows(weight: Any, start: jax.typing.ArrayLike, size: int) -> jax.Array:
  """Reads `size` consecutive rows of axis 0 from `start`, a multiple of 64."""
  if not is_perturbed(weight):
    return jax.lax.dynamic_slice_in_dim(weight, start, size)
  stored = jax.lax.dynamic_slice_in_dim(weight.value, start, size)
  return weight.add(_draw(weight, prng.RowRange(start, size)), stored)


def _materialize_after(
  weight: Perturbed, before: Any, narrow: bool = False
) -> jax.Array:
  """Reads a whole weight when something is there, and not earlier.

  XLA would form all of a layer's matrices at once. On CPU it does not, and is
  quicker unhindered. If `narrow`, both parts of the sum, which serve all signs,
  are kept as narrow as they are; XLA:TPU would keep them in float32.
  """
  key, _ = jax.lax.optimization_barrier((weight.key, before))
  weight = dataclasses.replace(weight, key=key)
  if not narrow:
    return read(weight)
  stored, z = weight.value, _draw(weight)
  if weight.direction.exact_in_low_precision:
    z = z.astype(stored.dtype)
  stored, z = jax.lax.optimization_barrier((stored, z))
  return weight.add(z.astype(jnp.float32), stored)


def dot(x: jax.Array, weight: Any, after: jax.Array | None = None) -> jax.Array:
  """Multiplies x [..., in] by a weight [in, out].

  Args:
    x: [..., in].
    weight: [in, out], perturbed or not.
    after: what is there before a perturbed weight is formed, beside x.
  """
  if not is_perturbed(weight):
    return x @ weight
  product = weight.direction.matmul(x, weight.key, weight.shape)
  if product is None:
    return x @ jax.lax.platform_dependent(
      *(weight, jax.lax.stop_gradient((x, after))),
      cpu=lambda weight, _: read(weight),
      tpu=functools.partial(_materialize_after, narrow=True),
      default=_materialize_after,
    )
  # In float32: a scale rounded to bfloat16 is another step than is divided by.
  shift = weight.scale * product.astype(jnp.float32)
  return ((x @ weight.value).astype(jnp.float32) + shift).astype(x.dtype)


def dot_transposed(x: jax.Array, weight: Any) -> jax.Array:
  """Multiplies x [..., D] by a table [V, D], transposed; float32 [..., V]."""

  def times(rows):
    return jnp.einsum(
      "...d,vd->...v", x, rows, preferred_element_type=jnp.float32
    )

  if not is_perturbed(weight):
    return times(weight)
  product = weight.direction.matmul(
    x, weight.key, weight.shape, transposed=True
  )
  if product is None:
    return times(read(weight))
  return times(weight.value) + weight.scale * product.astype(jnp.float32)


def log_normalizer(x: jax.Array, weight: Any) -> jax.Array:
  """Returns log sum_v exp(x w_v) over the rows of a table; float32 [...].

  A perturbed table, which would exist whole once for every sign, is walked in
  blocks of rows, unless its direction has a product without z.
  """
  size = weight.shape[0]
  if not is_perturbed(weight) or (
    weight.direction.matmul(x, weight.key, weight.shape, transposed=True)
    is not None
  ):
    return jax.nn.logsumexp(dot_transposed(x, weight), axis=-1)

  def add_block(total, start, rows):
    logits = dot_transposed(x, read_rows(weight, start, rows))
    return jnp.logaddexp(total, jax.nn.logsumexp(logits, axis=-1))

  whole, rest = divmod(size, ROWS_PER_BLOCK)
  total = jnp.full(x.shape[:-1], -jnp.inf)
  if whole:  # A loop of no turns is still traced.
    total = jax.lax.fori_loop(
      0,
      whole,
      lambda i, total: add_block(total, i * ROWS_PER_BLOCK, ROWS_PER_BLOCK),
      total,
    )
  return add_block(total, whole * ROWS_PER_BLOCK, rest) if rest else total


def materialize(tree: Any) -> Any:
  """Replaces every `Perturbed` node by its value, whole."""
  return jax.tree.map(read, tree, is_leaf=is_perturbed)


def path_name(path: tuple[Any, ...]) -> str:
  """Writes a key path as `layers/attention/query/kernel`."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def leaf_keys(key: Key, tree: Any, stacked: str = STACKED) -> Any:
  """Gives every leaf the key of its direction.

  Args:
    key: key of the direction. Folded, not consumed.
    tree: any pytree of arrays.
    stacked: pattern of the paths whose axis 0 counts layers.

  Returns:
    A tree like `tree` of `directions.LeafKey`.

  Raises:
    ValueError: a key is not threefry. Other generators give different numbers
      under vmap and in a loop, so z could not be drawn again.
  """
  data = [jax.random.key_data(part) for part in key]
  for words in data:
    if words.shape != (2,):
      raise ValueError(
        "directions need one threefry key (jax.random.key(seed)); got key data "
        f"of shape {words.shape}"
      )

  paths, structure = jax.tree_util.tree_flatten_with_path(tree)
  names = [path_name(path) for path, _ in paths]
  crcs = np.array([zlib.crc32(n.encode()) for n in names], np.uint32)
  depths = [
    leaf.shape[0] if re.search(stacked, name) else 0
    for name, (_, leaf) in zip(names, paths, strict=True)
  ]
  layers = np.arange(max(depths, default=0), dtype=np.uint32)[None]

  def part_keys(words, part):
    """Folds paths and layers in, for all leaves at once: quick to compile."""
    whole = prng.fold_in(words, crcs, np.uint32(part))
    sliced = prng.fold_in(whole[:, None], layers, np.uint32(1))
    return [
      sliced[i, :depth] if depth else whole[i] for i, depth in enumerate(depths)
    ]

  # The two parts count apart, so that equal keys give unequal numbers.
  direction_key, subspace_key = (
    part_keys(words, part) for part, words in zip((0, 2), data, strict=True)
  )
  return jax.tree.unflatten(
    structure, map(directions.LeafKey, direction_key, subspace_key)
  )
