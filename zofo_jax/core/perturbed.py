"""Weights theta + scale * z that exist only where they are used.

`Sampler.perturb` pairs each weight with the key of its z in a `Perturbed` node
and draws nothing. The node is a pytree: `lax.scan` over stacked layers slices
it, `vmap` over scales or examples batches it. It is an array to any model,
which then reads perturbed weights a layer at a time. Models that call `take`,
`read_rows`, `dot`, `dot_transposed` and `log_normalizer` draw even less.

Keys: direction -> leaf path -> layer (of stacked leaves) -> element.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zofo_jax.core import directions, keys, offload, prng, xla
from zofo_jax.core.array_like import ArrayLike
from zofo_jax.core.quantized import Quantized

# Number of rows that exist at a time of a table that is perturbed or updated.
ROWS_PER_BLOCK = 4096


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Perturbed(ArrayLike):
  """A weight to be read as value + scale * z.

  It is an array to whatever reads it: `jnp` functions, operators, indexing and
  methods form value + scale * z where they stand, so that a model that knows
  nothing of it reads perturbed weights a layer at a time. `dot`, `w @ x` and
  the other functions of this module also use products that need no z.

  It is also a pytree: `lax.scan`, `vmap`, `jit` and `jax.tree.map` see its
  arrays, so a function that is mapped over the leaves of a parameter tree has
  to say `is_leaf=is_perturbed`.

  Attributes:
    value: the stored weight, shape [...] or, stacked, [layers, ...]; an array,
      or a `Quantized` or `offload.Deferred` node.
    key: key of z, a `keys.LeafKey`; of a kind that is given, what it is.
    scale: signed step along z, float32, shape [] or [layers].
    direction: the kind of z.
  """

  value: jax.Array
  key: Any
  scale: jax.Array
  direction: directions.Direction = dataclasses.field(metadata={"static": True})

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the stored weight."""
    return self.value.shape

  @property
  def dtype(self) -> Any:
    """Dtype of the stored weight, and of the perturbed one."""
    return self.value.dtype

  def __jax_array__(self) -> jax.Array:
    """Returns the perturbed weight."""
    return read(self)

  def __getitem__(self, index: Any) -> Any:
    """Indexes the perturbed weight; a layer of a stack is not read yet."""
    if self.scale.ndim and isinstance(index, (int, np.integer)):
      return jax.tree.map(lambda leaf: leaf[index], self)
    return read(self)[index]

  def __matmul__(self, x: Any) -> jax.Array:
    """Returns w x; for a vector x, without z where the direction allows it."""
    if self.ndim == 2 and jnp.ndim(x) == 1:
      dtype = jnp.result_type(self.dtype, x)
      return dot_transposed(jnp.asarray(x, dtype), self).astype(dtype)
    return read(self) @ x

  def __rmatmul__(self, x: Any) -> jax.Array:
    """Returns x w; x is not a jax array, which would read w first."""
    return dot(jnp.asarray(x), self)

  def add(self, z: jax.Array, stored: jax.Array) -> jax.Array:
    """Returns stored + scale * mask(z), rounded once, to the stored dtype."""
    z = self.direction.mask(z, stored)
    shifted = stored.astype(jnp.float32) + self.scale * z
    return shifted.astype(stored.dtype)


def _draw(weight: Perturbed, rows: directions.Rows | None = None) -> jax.Array:
  """Draws z.

  If that is expensive, z is kept in memory so that +eps and -eps share it.
  """

  def draw(key):
    return weight.direction.sample(key, weight.shape, rows)

  if not weight.direction.cache_draw:
    return draw(weight.key)
  return xla.by_platform(
    weight.key,
    cpu=lambda key: xla.in_a_branch(draw, key, key.direction[0]),
    default=draw,
  )


def is_perturbed(weight: Any) -> bool:
  """Returns whether a weight is a `Perturbed` node, not an array."""
  return isinstance(weight, Perturbed)


def read(weight: Any) -> jax.Array:
  """Returns a whole weight, on the device: the array that a node stands for."""
  if isinstance(weight, (Quantized, offload.Deferred)):
    return weight.__jax_array__()
  if not is_perturbed(weight):
    return offload.fetch(weight)
  if weight.scale.ndim:  # stacked layers, not sliced by a scan
    return jax.vmap(read)(weight)
  return weight.add(_draw(weight), read(weight.value))


def take(weight: Any, rows: jax.Array) -> jax.Array:
  """Returns rows of axis 0 (an embedding look-up), drawing z for these only.

  Args:
    weight: [V, ...], perturbed, quantized or neither.
    rows: indices, int, any shape.
  """
  if isinstance(weight, Quantized) and weight.rows_have_scales:
    values = jnp.take(offload.fetch(weight.values), rows, axis=0)
    return weight.dequantize(values, take(weight.scales, rows))
  if not is_perturbed(weight):
    return jnp.take(read(weight), rows, axis=0)
  z = _draw(weight, rows)
  return weight.add(z, take(weight.value, rows))


def read_rows(weight: Any, start: jax.typing.ArrayLike, size: int) -> jax.Array:
  """Returns `size` rows of axis 0 from `start`, a multiple of 64."""
  if isinstance(weight, Quantized) and weight.rows_have_scales:
    values = jax.lax.dynamic_slice_in_dim(
      offload.fetch(weight.values), start, size
    )
    return weight.dequantize(values, read_rows(weight.scales, start, size))
  if not is_perturbed(weight):
    return jax.lax.dynamic_slice_in_dim(read(weight), start, size)
  stored = read_rows(weight.value, start, size)
  return weight.add(_draw(weight, prng.RowRange(start, size)), stored)


def _materialize_after(
  weight: Perturbed, before: Any, keep_dtype: bool = False
) -> jax.Array:
  """Materialises a weight only after `before` has been computed.

  If `keep_dtype`, the stored weight and z, which serve both signs, are kept in
  the weight's dtype; XLA:TPU would keep them in float32.
  """
  weight = dataclasses.replace(weight, key=xla.depends_on(weight.key, before))
  if not keep_dtype:
    return read(weight)
  stored, z = read(weight.value), _draw(weight)
  if weight.direction.exact_in_low_precision:
    z = z.astype(stored.dtype)
  stored, z = xla.no_fusion((stored, z))
  return weight.add(z.astype(jnp.float32), stored)


def dot(
  x: jax.Array, weight: Any, depends_on: jax.Array | None = None
) -> jax.Array:
  """Returns x w, without z where the direction allows it.

  Args:
    x: [..., in].
    weight: [in, out], perturbed, quantized or neither.
    depends_on: a value that must be computed, as x must, before the weight is
      materialised: an ordering hint for XLA.
  """
  if isinstance(weight, Quantized):
    return weight.matmul(x)
  if not is_perturbed(weight):
    return x @ read(weight)
  x = weight.direction.before_products(x, weight.key)
  product = weight.direction.matmul(x, weight.key, weight.shape)
  if product is None:
    return x @ xla.by_platform(
      weight,
      jax.lax.stop_gradient((x, depends_on)),
      cpu=lambda weight, _: read(weight),
      tpu=functools.partial(_materialize_after, keep_dtype=True),
      default=_materialize_after,
    )
  # In float32: the difference is divided by eps, not by its bfloat16 rounding.
  shift = weight.scale * product.astype(jnp.float32)
  return (dot(x, weight.value).astype(jnp.float32) + shift).astype(x.dtype)


def dot_transposed(x: jax.Array, weight: Any) -> jax.Array:
  """Returns x w^T for a table w [V, D]; float32 [..., V].

  Args:
    x: [..., D].
    weight: [V, D], perturbed, quantized or neither.
  """

  def times(rows):
    return jnp.einsum(
      "...d,vd->...v", x, rows, preferred_element_type=jnp.float32
    )

  if not is_perturbed(weight):
    return times(read(weight))
  product = weight.direction.matmul(
    x, weight.key, weight.shape, transposed=True
  )
  if product is None:
    return times(read(weight))
  stored = dot_transposed(x, weight.value)
  return stored + weight.scale * product.astype(jnp.float32)


def log_normalizer(
  x: jax.Array,
  weight: Any,
  finish: Callable[[jax.Array, jax.typing.ArrayLike], jax.Array] = (
    lambda products, start: products
  ),
) -> jax.Array:
  """Returns log sum_v exp(finish(x w_v)) over a table's rows; float32 [...].

  A perturbed table is read in blocks of rows, since it would exist whole for
  both signs, unless its direction has a product without z. A quantized one is,
  too, in the backward pass as well.

  Args:
    x: [..., D].
    weight: [V, D], perturbed, quantized or neither.
    finish: (products [..., N] of N rows, the first of these rows) -> logits.
  """
  size = weight.shape[0]
  stored = weight.value if is_perturbed(weight) else weight
  quantized = isinstance(stored, Quantized)
  if not quantized and (
    not is_perturbed(weight)
    or weight.direction.matmul(x, weight.key, weight.shape, transposed=True)
    is not None
  ):
    return jax.nn.logsumexp(finish(dot_transposed(x, weight), 0), axis=-1)

  def add_block(total, start, rows):
    products = dot_transposed(x, read_rows(weight, start, rows))
    logits = finish(products, start)
    return jnp.logaddexp(total, jax.nn.logsumexp(logits, axis=-1))

  if quantized:
    add_block = jax.checkpoint(add_block, static_argnums=2)
  num_blocks, remainder = divmod(size, ROWS_PER_BLOCK)
  total = jnp.full(x.shape[:-1], -jnp.inf)
  if num_blocks:  # a loop without iterations is still traced
    total = jax.lax.fori_loop(
      0,
      num_blocks,
      lambda i, total: add_block(total, i * ROWS_PER_BLOCK, ROWS_PER_BLOCK),
      total,
    )
  if not remainder:
    return total

  def add_last(total):
    return add_block(total, num_blocks * ROWS_PER_BLOCK, remainder)

  if not num_blocks or not is_perturbed(weight):
    return add_last(total)
  # The last rows depend on nothing, and would be read before the layers run.
  return xla.by_platform(
    total,
    cpu=lambda total: xla.in_a_branch(add_last, total, weight.key.direction[0]),
    default=add_last,
  )


def materialize(tree: Any) -> Any:
  """Replaces every `Perturbed` node by the perturbed weight."""
  return jax.tree.map(read, tree, is_leaf=is_perturbed)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Opaque(ArrayLike):
  """A stand-in for a `Perturbed` node whose parts no arithmetic accepts.

  Attributes:
    parts: of the shapes of a node's value and scale, of a PRNG key's dtype.
    weight_dtype: dtype of the weight.
  """

  parts: tuple[Any, Any]
  weight_dtype: Any = dataclasses.field(metadata={"static": True})

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the weight."""
    return self.parts[0].shape

  @property
  def dtype(self) -> Any:
    """Dtype of the weight."""
    return self.weight_dtype

  def __jax_array__(self) -> jax.Array:
    return jnp.zeros(self.shape, self.dtype)


def reads_arrays_only(fn: Callable[[Any], Any], tree: Any) -> bool:
  """Returns whether fn reads the `Perturbed` nodes of a tree as arrays only.

  A function that maps over the leaves of its parameters (a norm of them, a cast
  of them all) would take a node's value, key and scale for parameters. fn is
  traced, never run, with stand-ins for the nodes: once with parts on which
  arithmetic is an error, and once with parts of the right dtypes, to see
  whether the result depends on them.

  Args:
    fn: a function of a tree like `tree`.
    tree: pytree with `Perturbed` nodes, of arrays or of their shapes.
  """
  key_dtype = jax.eval_shape(keys.seed_key, 0).dtype

  def stand_ins(value_dtype, scale_dtype):
    def replace(node):
      if not is_perturbed(node):
        return node
      value = jax.ShapeDtypeStruct(node.value.shape, value_dtype or node.dtype)
      scale = jax.ShapeDtypeStruct(node.scale.shape, scale_dtype)
      return _Opaque((value, scale), node.dtype)

    return jax.tree.map(replace, tree, is_leaf=is_perturbed)

  try:
    # Arithmetic on PRNG keys is an error; slicing and batching are not.
    jax.eval_shape(fn, stand_ins(key_dtype, key_dtype))
    return not _depends_on_parts(fn, stand_ins(None, jnp.float32))
  except Exception:  # whatever the model's own code raises
    return False


def _depends_on_parts(fn: Callable[[Any], Any], tree: Any) -> bool:
  """Returns whether the tangents of fn along stand-ins' parts are nonzero."""
  nonzero = []

  @jax.custom_jvp
  def observe(x):
    return x

  def observe_jvp(primals, tangents):
    is_zero = isinstance(tangents[0], jax.custom_derivatives.SymbolicZero)
    nonzero.append(not is_zero)
    return primals[0], jnp.zeros(primals[0].shape, primals[0].dtype)

  observe.defjvp(observe_jvp, symbolic_zeros=True)
  is_stand_in = lambda node: isinstance(node, _Opaque)
  leaves, structure = jax.tree.flatten(tree, is_leaf=is_stand_in)
  parts = [node.parts for node in leaves if is_stand_in(node)]

  def observed(parts):
    remaining = iter(parts)
    nodes = [
      dataclasses.replace(node, parts=next(remaining))
      if is_stand_in(node)
      else node
      for node in leaves
    ]
    out = jax.tree.leaves(fn(jax.tree.unflatten(structure, nodes)))
    return [observe(x) for x in out if jnp.issubdtype(x.dtype, jnp.floating)]

  jax.eval_shape(lambda parts: jax.jvp(observed, (parts,), (parts,)), parts)
  return any(nonzero)
