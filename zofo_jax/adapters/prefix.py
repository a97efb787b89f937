"""Prefix tuning (Li and Liang, 2021): trained keys and values in every layer.

Tokens attend to P extra positions in each layer, and their own positions start
at P; an attention window hides the extra ones as it hides tokens. Keys are
stored as attention uses them: in a model with rotary positions, already
rotated.
"""

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zofo_jax import errors
from zofo_jax.core import tree as tree_lib

INITS = ("tokens", "random")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
  """Trained keys and values of P virtual positions.

  Attributes:
    key: [P, K, F] or, stacked, [layers, P, K, F]; float32.
    value: like `key`.
  """

  key: jax.Array
  value: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ProjectedPrefix:
  """A prefix computed by a small network, which makes training more stable.

  out(tanh(hidden(embedding))), as with PEFT's prefix_projection; float32.

  Attributes:
    embedding: [P, E].
    hidden_kernel: [E, M].
    hidden_bias: [M].
    out_kernel: [M, layers, 2, K, F]; on axis 2 keys, then values.
    out_bias: [layers, 2, K, F].
  """

  embedding: jax.Array
  hidden_kernel: jax.Array
  hidden_bias: jax.Array
  out_kernel: jax.Array
  out_bias: jax.Array


def project(projected: ProjectedPrefix) -> Prefix:
  """Computes the keys and values, [layers, P, K, F]."""
  hidden = projected.embedding @ projected.hidden_kernel
  hidden = jnp.tanh(hidden + projected.hidden_bias[None])
  both = jnp.einsum("pm,mlckf->clpkf", hidden, projected.out_kernel)
  both = both + jnp.moveaxis(projected.out_bias, 1, 0)[:, :, None]
  return Prefix(both[0], both[1])


def prepend(
  prefix: Prefix,
  key_BxSxKxF: jax.Array,
  value_BxSxKxF: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Prepends one layer's prefix to its keys and values.

  Args:
    prefix: [P, K, F].
    key_BxSxKxF: keys of the tokens.
    value_BxSxKxF: values of the tokens.

  Returns:
    Keys and values of P + S slots.
  """

  def front(extra, tokens):
    extra = jnp.broadcast_to(
      extra[None].astype(tokens.dtype), (tokens.shape[0], *extra.shape)
    )
    return jnp.concatenate([extra, tokens], axis=1)

  return front(prefix.key, key_BxSxKxF), front(prefix.value, value_BxSxKxF)


def prefix_of_tokens(module: Any, base: Any, tokens: jax.Array) -> Any:
  """Returns the prefix equivalent to given tokens at the start of the context.

  Args:
    module: a decoder of `zofo_jax.models`.
    base: weights of the decoder.
    tokens: int32 [P].

  Returns:
    Adapter with a `Prefix` at each attention, float32.
  """
  rows = tokens[None]
  _, sown = module.apply(
    {"params": base},
    rows,
    jnp.ones(rows.shape, bool),
    method="hidden",
    mutable=["context"],
  )
  return jax.tree.map(lambda x: x[:, 0].astype(jnp.float32), sown["context"])


def init_prefix(
  key: jax.Array,
  module: Any,
  base: Any,
  *,
  length: int,
  init: str = "tokens",
  projection: int = 0,
) -> dict[str, Any]:
  """Initialises a prefix.

  Args:
    key: typed PRNG key. Folded, not consumed.
    module: a decoder of `zofo_jax.models`.
    base: weights of the decoder; shapes suffice for init="random".
    length: P, at least 1.
    init: "tokens", the keys and values of random tokens, as in MeZO, or
      "random", normal as in PEFT.
    projection: width M of the network that computes the prefix; 0 for none.
      Needs init="random".

  Returns:
    Nested dict with {"prefix": Prefix or ProjectedPrefix} at each attention.

  Raises:
    UserError: the length is below 1, or `init` is unknown or does not go with
      `projection`.

  Examples:
    >>> import jax
    >>> from zofo_jax import adapters
    >>> from zofo_jax.models import transformer
    >>> model = transformer.Transformer(
    ...   transformer.Config(50, 8, 16, 2, 2, 2, 4, max_length=16))
    >>> ids = jax.numpy.ones((1, 4), int)
    >>> base = model.init(jax.random.key(0), ids, ids > 0, method="hidden")
    >>> adapter = adapters.init_prefix(
    ...   jax.random.key(1), model, base["params"], length=3)
    >>> adapter["layers"]["attention"]["prefix"].key.shape
    (2, 3, 2, 4)
  """
  if length < 1:
    raise errors.UserError(
      f"The prefix's length is {length}; expected above 0."
    )
  if init not in INITS or (projection and init != "random"):
    raise errors.UserError(
      f"The prefix's init is '{init}' with projection {projection}; expected "
      f"one of {', '.join(INITS)}, and 'random' with a projection."
      f"{errors.nearest(init, INITS)}"
    )
  key = jax.random.fold_in(key, np.uint32(zlib.crc32(b"prefix")))
  if init == "tokens":
    tokens = jax.random.randint(key, (length,), 0, module.config.vocab_size)
    return prefix_of_tokens(module, base, tokens)
  shapes = prefix_shapes(module, length)
  paths, structure = jax.tree_util.tree_flatten_with_path(
    shapes, is_leaf=lambda node: isinstance(node, Prefix)
  )
  prefixes = []
  for path, node in paths:
    name = tree_lib.path_name(path)
    layer_key = jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))
    prefixes.append(_random(layer_key, node.key.shape, projection))
  return jax.tree.unflatten(structure, prefixes)


def prefix_shapes(module: Any, length: int) -> Any:
  """Returns the shapes of a decoder's prefix without computing it."""
  rows = jax.ShapeDtypeStruct((1, length), jnp.int32)

  def make(tokens):
    base = module.init(jax.random.key(0), tokens, tokens > 0, method="hidden")
    return prefix_of_tokens(module, base["params"], tokens[0])

  return jax.eval_shape(make, rows)


def _random(
  key: jax.Array, shape: tuple[int, ...], width: int
) -> Prefix | ProjectedPrefix:
  """Initialises as PEFT does: embeddings normal, matrices Kaiming uniform."""
  keys = jax.random.split(key, 5)
  if not width:
    return Prefix(*(jax.random.normal(k, shape) for k in keys[:2]))
  layers, length, heads, features = shape
  inputs = heads * features

  def uniform(key, shape, fan_in):
    bound = 1.0 / np.sqrt(fan_in)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

  return ProjectedPrefix(
    embedding=jax.random.normal(keys[0], (length, inputs)),
    hidden_kernel=uniform(keys[1], (inputs, width), inputs),
    hidden_bias=uniform(keys[2], (width,), inputs),
    out_kernel=uniform(keys[3], (width, layers, 2, heads, features), width),
    out_bias=uniform(keys[4], (layers, 2, heads, features), width),
  )
