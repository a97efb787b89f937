"""The base class of decoders.

Log-probabilities of targets, logits, hidden states and, with a cache of keys
and values, next-token logits.

Shapes: B rows, L length, S slots of a cache, D width, E width of the
embedding, P supervised positions (or virtual tokens), K targets, V vocabulary.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

from zofo_jax import adapters
from zofo_jax.core import perturbed
from zofo_jax.models import kv_cache
from zofo_jax.models.layers import soft_cap

# Paths of the weights that `stack_layers` stacks: axis 0 counts layers.
STACKED = r"(^|/)layers/"
# (pattern of the paths of matrices and tables, the axis over which a product
# with them sums).
SUMMED_AXES = ((r"kernel$", -2), (r"embedding$", -1))


def stack_layers(
  block: type[nn.Module], length: int, remat: bool, in_axes: Any
) -> Any:
  """Scans a block over layers stacked on axis 0 of weights and adapters.

  Args:
    block: a module whose call maps (carry, *inputs) to (carry, None).
    length: number of layers.
    remat: whether the backward pass recomputes everything in a layer, matrix
      products included.
    in_axes: for each of `inputs`, nn.broadcast or the axis to scan over.

  Returns:
    A module class with the constructor of `block`.
  """
  # Without remat, save matrix products and recompute elementwise operations:
  # this halves the memory of the adapter's backward pass at no measured cost.
  policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  block = nn.remat(block, prevent_cse=False, policy=None if remat else policy)
  scanned = nn.scan(
    block,
    variable_axes={"params": 0, "adapter": 0, "context": 0},
    split_rngs={"params": True, "dropout": True},
    in_axes=in_axes,
    length=length,
  )
  # Computes a projected prefix once instead of in every layer.
  return nn.map_variables(scanned, "adapter", adapters.expand)


def gather_positions(x_BxLxD: jax.Array, positions_BxP: jax.Array) -> jax.Array:
  """Gathers the hidden states at the given positions, [B, P, D]."""
  return jnp.take_along_axis(x_BxLxD, positions_BxP[..., None], axis=1)


class Output(NamedTuple):
  """What follows the product with the output embedding.

  Attributes:
    bias: [V], perturbed or not; None for none.
    cap: soft bound of the logits; None for none.
  """

  bias: Any = None
  cap: float | None = None

  def logits(self, products: jax.Array, start: Any = 0) -> jax.Array:
    """Returns the logits [..., N] of N tokens from `start`."""
    if self.bias is not None:
      bias = perturbed.read(self.bias).astype(products.dtype)
      part = jax.lax.dynamic_slice_in_dim(bias, start, products.shape[-1])
      products = products + jnp.broadcast_to(part, products.shape)
    return soft_cap(products, self.cap)

  def of_tokens(self, products: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns the logits [...] of given tokens [...]."""
    if self.bias is not None:
      products = products + perturbed.take(self.bias, tokens).astype(
        products.dtype
      )
    return soft_cap(products, self.cap)


PLAIN_OUTPUT = Output()


def target_log_probs(
  hidden_BxPxD: jax.Array,
  embedding: Any,
  target_slot_BxK: jax.Array,
  target_token_BxK: jax.Array,
  output: Output = PLAIN_OUTPUT,
) -> jax.Array:
  """Computes the log-probability of each target over the vocabulary.

  Args:
    hidden_BxPxD: hidden states at supervised positions, after the last norm.
    embedding: [V, D], tied or not, perturbed or not.
    target_slot_BxK: int32, which of the P positions predicts the target.
    target_token_BxK: int32, token to be predicted.
    output: what follows the product with the embedding.

  Returns:
    float32 [B, K].
  """
  normalizer_BxP = perturbed.log_normalizer(
    hidden_BxPxD, embedding, output.logits
  )
  hidden_BxKxD = gather_positions(hidden_BxPxD, target_slot_BxK)
  rows_BxKxD = perturbed.take(embedding, target_token_BxK)
  products_BxK = jnp.sum(
    hidden_BxKxD.astype(jnp.float32) * rows_BxKxD.astype(jnp.float32), axis=-1
  )
  logits_BxK = output.of_tokens(products_BxK, target_token_BxK)
  normalizer_BxK = jnp.take_along_axis(normalizer_BxP, target_slot_BxK, axis=1)
  return logits_BxK - normalizer_BxK


@functools.lru_cache(maxsize=64)
def parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of a decoder's weights by path."""
  rows = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  tree: Any = jax.eval_shape(
    module.init, jax.random.key(0), rows, rows, rows, rows, rows
  )
  flat = flax.traverse_util.flatten_dict(tree["params"], sep="/")
  return {path: leaf.shape for path, leaf in flat.items()}


class Decoder(nn.Module):
  """A decoder with its head.

  Subclasses declare `config` (with `tied_head`), `constrain`, `embed` and,
  unless the head is tied, `head`. They define `_body`, `_finish`, `output` and
  `_cache_shape`.
  """

  @property
  def prefix_acts_as_tokens(self) -> bool:
    """Returns whether a prefix made of tokens is equivalent to these tokens."""
    return True

  def _inputs(
    self, tokens_BxL: jax.Array, mask_BxL: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Embeds tokens, after the adapter's virtual tokens if it has any.

    Args:
      tokens_BxL: int32.
      mask_BxL: bool, real tokens.

    Returns:
      Embeddings [B, P + L, E] and mask, bool [B, P + L].
    """
    x, mask = self.embed(tokens_BxL), mask_BxL.astype(bool)
    prompt = self.embed.prompt()
    if prompt is not None:
      virtual = prompt.embedding[None].astype(x.dtype)
      size = (x.shape[0], *virtual.shape[1:])
      x = jnp.concatenate([jnp.broadcast_to(virtual, size), x], axis=1)
      mask = jnp.concatenate([jnp.ones(size[:2], bool), mask], axis=1)
    return x, mask

  def _body(
    self,
    x_BxLxE: jax.Array,
    mask_BxL: jax.Array,
    cache: kv_cache.Cache | None = None,
  ) -> tuple[jax.Array, kv_cache.Cache | None]:
    """Runs the layers over tokens that follow the cached ones; [B, L, D]."""
    raise NotImplementedError

  def _cache_shape(self) -> tuple[int, int, int]:
    """Returns the number of layers, of kv heads, and the width of a head."""
    raise NotImplementedError

  def _finish(self, x: jax.Array) -> jax.Array:
    """Maps the layers' output to the head's input."""
    raise NotImplementedError

  def output(self) -> Output:
    """Returns what follows the product with the output embedding."""
    return PLAIN_OUTPUT

  def _head_table(self) -> Any:
    """Returns the output embedding [V, D]."""
    return self.embed.table() if self.config.tied_head else self.head.table()

  def _states(self, tokens_BxL: jax.Array, mask_BxL: jax.Array) -> jax.Array:
    """Runs the layers and drops virtual tokens; [B, L, D]."""
    x, mask = self._inputs(tokens_BxL, mask_BxL)
    num_virtual = x.shape[1] - tokens_BxL.shape[1]
    if jnp.issubdtype(mask_BxL.dtype, jnp.integer):
      mask = jnp.pad(mask_BxL, ((0, 0), (num_virtual, 0)), constant_values=1)
    x, _ = self._body(self.constrain(x, False), mask)
    return x[:, num_virtual:]

  def __call__(
    self,
    tokens: jax.Array,
    mask: jax.Array,
    positions: jax.Array,
    target_slot: jax.Array,
    target_token: jax.Array,
  ) -> jax.Array:
    """Computes the log-probabilities of each row's targets.

    Args:
      tokens: [B, L] int32.
      mask: [B, L] bool, real tokens; padding may be on either side. Or int32:
        the number of each token's document, from 1, and 0 for padding; tokens
        attend within their document.
      positions: [B, P] int32, positions whose next token is a target.
      target_slot: [B, K] int32, which of the P positions predicts the target.
      target_token: [B, K] int32, token to be predicted.

    Returns:
      Log-probabilities of the targets, [B, K] float32.
    """
    x = gather_positions(self._states(tokens, mask), positions)
    return target_log_probs(
      self._finish(x),
      self._head_table(),
      target_slot,
      target_token,
      self.output(),
    )

  def hidden(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the head's input at every token, [B, L, D]."""
    return self._finish(self._states(tokens, mask))

  def logits(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the next-token logits at every token, [B, L, V] float32."""
    return self.head_logits(self.hidden(tokens, mask))

  def head_logits(self, hidden: jax.Array) -> jax.Array:
    """Returns the logits [..., V] of the head's inputs, float32."""
    products = perturbed.dot_transposed(hidden, self._head_table())
    return self.output().logits(products)

  def prefill(
    self, tokens: jax.Array, mask: jax.Array, num_more: int
  ) -> tuple[jax.Array, kv_cache.Cache]:
    """Processes prompts and fills a cache for `decode`.

    Args:
      tokens: [B, L] int32.
      mask: [B, L] bool, real tokens; padding may be on either side.
      num_more: maximum number of tokens to decode afterwards.

    Returns:
      Logits of the token after each prompt, [B, V] float32, and the cache.
    """
    inputs, mask = self._inputs(tokens, mask)
    rows, length = mask.shape
    empty = kv_cache.empty(
      self._cache_shape(), rows, length + num_more, inputs.dtype
    )
    x, cache = self._body(inputs, mask, empty)
    assert cache is not None  # because one was passed
    last_B = length - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return self._next(gather_positions(x, last_B[:, None])), cache

  def decode(
    self, tokens: jax.Array, cache: kv_cache.Cache
  ) -> tuple[jax.Array, kv_cache.Cache]:
    """Processes one more token per row.

    Args:
      tokens: [B] int32.
      cache: from `prefill` or the last `decode`; must have a free slot.

    Returns:
      Logits of the next token, [B, V] float32, and the updated cache.
    """
    x = self.embed(tokens[:, None])
    x, new_cache = self._body(x, jnp.ones(x.shape[:2], bool), cache)
    assert new_cache is not None  # because one was passed
    return self._next(x), new_cache

  def _next(self, x_Bx1xD: jax.Array) -> jax.Array:
    """Returns the logits of each row's next token, [B, V] float32."""
    return self.head_logits(self._finish(x_Bx1xD))[:, 0]
