"""Blocks that every decoder here is made of, and its head.

Weights are read only through `perturbed.value`, `take` and `dot`, so any of
them may be a perturbed weight. Products run in the dtype of the weights;
norms, softmax and log-probabilities in float32.

Shapes: B rows, L length, S slots (L, or those of a cache), D width, F a head's
width, H heads, K kv heads (or, in the head, targets), V vocabulary, P
supervised positions, N layers.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zofo_jax import adapters, errors, perturbed
from zofo_jax.models import caches

INIT = nn.initializers.normal(0.02)

# By the names that config.json uses.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "relu": nn.relu,
  "silu": nn.silu,
  "swish": nn.silu,
  "gelu": lambda x: nn.gelu(x, approximate=False),
  "gelu_new": nn.gelu,
  "gelu_fast": nn.gelu,
  "gelu_pytorch_tanh": nn.gelu,
  "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}


class Linear(nn.Module):
  """y = x W + b, plus the product of a LoRA adapter where there is one."""

  features: int
  use_bias: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [..., in] to [..., features]."""
    kernel = self.param("kernel", INIT, (x.shape[-1], self.features))
    y = perturbed.dot(x, kernel)
    if self.use_bias:
      bias = perturbed.value(
        self.param("bias", nn.initializers.zeros, (self.features,))
      )
      y = y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)
    if self.has_variable("adapter", "lora"):
      lora: adapters.Lora = self.get_variable("adapter", "lora")
      drops = lora.dropout and self.has_rng("dropout")
      key = self.make_rng("dropout") if drops else None
      y = y + adapters.lora_product(x, lora, key).astype(y.dtype)
    return y


class Embed(nn.Module):
  """Rows of a table [V, D]; the table also serves as a head."""

  rows: int
  features: int

  def setup(self) -> None:
    """Declares the table."""
    self.embedding = self.param("embedding", INIT, (self.rows, self.features))

  def __call__(self, ids: jax.Array) -> jax.Array:
    """Looks ids [...] up; [..., D]."""
    return perturbed.take(self.embedding, ids)

  def table(self) -> Any:
    """Returns the table as it is stored, perturbed or not."""
    return self.embedding

  def prompt(self) -> adapters.Prompt | None:
    """Returns the adapter's virtual tokens, if it has any."""
    return self.get_variable("adapter", "prompt", None)


def _affine(x: jax.Array, weight: Any) -> jax.Array:
  """Broadcasts a weight [D] to x in float32."""
  weight = perturbed.value(weight).astype(jnp.float32)
  return jnp.broadcast_to(weight, x.shape)


class RmsNorm(nn.Module):
  """x / rms(x) * scale."""

  epsilon: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises the last axis."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(
      jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon
    )
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    return (y * _affine(y, scale)).astype(x.dtype)


class LayerNorm(nn.Module):
  """(x - mean) / std, then scale and bias unless `affine` is False."""

  epsilon: float = 1e-5
  affine: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises the last axis."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(
      jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon
    )
    if self.affine:
      scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
      bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
      y = y * _affine(y, scale) + _affine(y, bias)
    return y.astype(x.dtype)


def token_positions(mask_BxL: jax.Array) -> jax.Array:
  """Numbers real tokens from 0, wherever the padding is; int32 [B, L]."""
  count = jnp.cumsum(mask_BxL.astype(jnp.int32), axis=1)
  return jnp.maximum(count - 1, 0)


def attention_mask(mask_BxS: jax.Array, slots_L: jax.Array) -> jax.Array:
  """Tells which tokens see which: real ones not after them; [B, 1, L, S].

  Every token sees itself, padding included, so that no softmax runs over
  nothing.

  Args:
    mask_BxS: bool, slots that hold a real token.
    slots_L: int32, the slots of the tokens that look.
  """
  slots_S = jnp.arange(mask_BxS.shape[1])
  causal_LxS = slots_S[None, :] <= slots_L[:, None]
  itself_LxS = slots_S[None, :] == slots_L[:, None]
  seen_Bx1xLxS = mask_BxS[:, None, None, :] & causal_LxS[None, None]
  return seen_Bx1xLxS | itself_LxS[None, None]


def with_prefix(
  attention: nn.Module,
  key_BxSxKxF: jax.Array,
  value_BxSxKxF: jax.Array,
  allowed_Bx1xLxS: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Puts an adapter's prefix in front of all keys and values that there are.

  To be called last before `attend`. Keys and values are also left in the
  collection "context", where it is mutable, to start a prefix from.

  Args:
    attention: the module whose collection "adapter" may hold a "prefix".
    key_BxSxKxF: keys as `attend` takes them.
    value_BxSxKxF: values.
    allowed_Bx1xLxS: bool, [.., query, key]: which tokens see which.

  Returns:
    The three, of P + S keys where there is a prefix of P.
  """
  if not attention.is_initializing():
    attention.sow(
      "context",
      "prefix",
      adapters.Prefix(key_BxSxKxF, value_BxSxKxF),
      init_fn=lambda: None,
      reduce_fn=lambda _, new: new,
    )
  prefix: adapters.Prefix | None = attention.get_variable(
    "adapter", "prefix", None
  )
  if prefix is None:
    return key_BxSxKxF, value_BxSxKxF, allowed_Bx1xLxS
  return adapters.prepend(prefix, key_BxSxKxF, value_BxSxKxF, allowed_Bx1xLxS)


def attend(
  query_BxLxHxF: jax.Array,
  key_BxSxKxF: jax.Array,
  value_BxSxKxF: jax.Array,
  allowed_Bx1xLxS: jax.Array,
) -> jax.Array:
  """Softmax attention, scaled by 1/sqrt(F), softmax in float32; [B, L, H*F].

  Args:
    query_BxLxHxF: queries.
    key_BxSxKxF: keys; H is a multiple of K and each serves H/K queries.
    value_BxSxKxF: values.
    allowed_Bx1xLxS: bool, [.., query, key]: which tokens see which.

  Returns:
    The heads' outputs side by side, in the dtype of the queries.
  """
  out = jax.nn.dot_product_attention(
    query_BxLxHxF,
    key_BxSxKxF,
    value_BxSxKxF,
    mask=allowed_Bx1xLxS,
    implementation="xla",
  )
  return out.reshape(*out.shape[:2], -1)


def stack_layers(
  block: type[nn.Module], length: int, remat: bool, in_axes: Any
) -> Any:
  """Scans a block over layers stacked on axis 0 of weights and adapters.

  Args:
    block: a module whose call maps (carry, *inputs) to (carry, None).
    length: number of layers.
    remat: whether the backward pass recomputes all of a layer's inside, its
      products too.
    in_axes: for each of `inputs`, nn.broadcast or the axis that is scanned.

  Returns:
    A module class with the constructor of `block`.
  """
  # The backward pass of an adapter keeps the products, which are dear, and
  # takes all that is cheap again: half the memory, and no slower.
  keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  block = nn.remat(block, prevent_cse=False, policy=None if remat else keep)
  scanned = nn.scan(
    block,
    variable_axes={"params": 0, "adapter": 0, "context": 0},
    split_rngs={"params": True, "dropout": True},
    in_axes=in_axes,
    length=length,
  )
  # A prefix that is computed is so once, not in every layer.
  return nn.map_variables(scanned, "adapter", adapters.expand)


def gather_positions(x_BxLxD: jax.Array, positions_BxP: jax.Array) -> jax.Array:
  """Picks the hidden states at the given positions; [B, P, D]."""
  return jnp.take_along_axis(x_BxLxD, positions_BxP[..., None], axis=1)


def target_log_probs(
  hidden_BxPxD: jax.Array,
  embedding: Any,
  target_slot_BxK: jax.Array,
  target_token_BxK: jax.Array,
) -> jax.Array:
  """Log-probability of each target at its position, over the vocabulary.

  Args:
    hidden_BxPxD: hidden states that predict, after the last norm.
    embedding: [V, D], tied or the head's own, perturbed or not.
    target_slot_BxK: int32, which of the P positions predicts the target.
    target_token_BxK: int32, token to be predicted.

  Returns:
    float32 [B, K].
  """
  normalizer_BxP = perturbed.log_normalizer(hidden_BxPxD, embedding)
  hidden_BxKxD = gather_positions(hidden_BxPxD, target_slot_BxK)
  rows_BxKxD = perturbed.take(embedding, target_token_BxK)
  picked_BxK = jnp.sum(
    hidden_BxKxD.astype(jnp.float32) * rows_BxKxD.astype(jnp.float32), axis=-1
  )
  normalizer_BxK = jnp.take_along_axis(normalizer_BxP, target_slot_BxK, axis=1)
  return picked_BxK - normalizer_BxK


class Decoder(nn.Module):
  """What a decoder answers, from its layers and its head.

  A family's module declares `config` (with `tied_head`), `embed` and, if it is
  not tied, `head`, and defines `_body`, `_finish` and `_cache_shape`.
  """

  def _inputs(
    self, tokens_BxL: jax.Array, mask_BxL: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Embeds tokens, behind the adapter's virtual ones if it has any.

    Args:
      tokens_BxL: int32.
      mask_BxL: real tokens.

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

  def _positions(self, mask_BxS: jax.Array) -> jax.Array:
    """Numbers the slots' tokens, int32 [B, S]; a prefix counts as well."""
    before = adapters.prefix_length(self.variables.get("adapter", {}))
    return token_positions(mask_BxS) + before

  def _body(
    self,
    x_BxLxE: jax.Array,
    mask_BxL: jax.Array,
    cache: caches.Cache | None = None,
  ) -> tuple[jax.Array, caches.Cache | None]:
    """Runs the layers over tokens that follow those of the cache; [B, L, D]."""
    raise NotImplementedError

  def _cache_shape(self) -> tuple[int, int, int]:
    """Returns the number of layers and kv heads, and a head's width."""
    raise NotImplementedError

  def _finish(self, x: jax.Array) -> jax.Array:
    """Turns the layers' output into what the head reads."""
    raise NotImplementedError

  def _head_table(self) -> Any:
    """Returns the table [V, D] of the head."""
    return self.embed.table() if self.config.tied_head else self.head.table()

  def _states(self, tokens_BxL: jax.Array, mask_BxL: jax.Array) -> jax.Array:
    """Runs the layers, without what they say of virtual tokens; [B, L, D]."""
    x, _ = self._body(*self._inputs(tokens_BxL, mask_BxL))
    return x[:, x.shape[1] - tokens_BxL.shape[1] :]

  def __call__(
    self,
    tokens: jax.Array,
    mask: jax.Array,
    positions: jax.Array,
    target_slot: jax.Array,
    target_token: jax.Array,
  ) -> jax.Array:
    """Scores the targets of each row.

    Args:
      tokens: [B, L] int32.
      mask: [B, L] bool, real tokens; padding may be on either side.
      positions: [B, P] int32, where hidden states predict the next token.
      target_slot: [B, K] int32, which of the P positions predicts.
      target_token: [B, K] int32, token to be predicted.

    Returns:
      Log-probabilities of the targets, [B, K] float32.
    """
    x = gather_positions(self._states(tokens, mask), positions)
    return target_log_probs(
      self._finish(x), self._head_table(), target_slot, target_token
    )

  def hidden(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns what the head reads at every token, [B, L, D]."""
    return self._finish(self._states(tokens, mask))

  def logits(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the scores of every next token, [B, L, V] float32."""
    return perturbed.dot_transposed(
      self.hidden(tokens, mask), self._head_table()
    )

  def prefill(
    self, tokens: jax.Array, mask: jax.Array, num_more: int
  ) -> tuple[jax.Array, caches.Cache]:
    """Reads prompts, so that `decode` can go on from them.

    Args:
      tokens: [B, L] int32.
      mask: [B, L] bool, real tokens; padding may be on either side.
      num_more: how many tokens can follow.

    Returns:
      Scores of the token after each prompt, [B, V] float32, and the cache.
    """
    inputs, mask = self._inputs(tokens, mask)
    rows, length = mask.shape
    empty = caches.empty(
      self._cache_shape(), rows, length + num_more, inputs.dtype
    )
    x, cache = self._body(inputs, mask, empty)
    assert cache is not None  # one came in
    last_B = length - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return self._next(gather_positions(x, last_B[:, None])), cache

  def decode(
    self, tokens: jax.Array, cache: caches.Cache
  ) -> tuple[jax.Array, caches.Cache]:
    """Reads one more token a row.

    Args:
      tokens: [B] int32.
      cache: from `prefill` or the last `decode`; must have a slot left.

    Returns:
      Scores of the token after it, [B, V] float32, and the cache.
    """
    x = self.embed(tokens[:, None])
    x, after = self._body(x, jnp.ones(x.shape[:2], bool), cache)
    assert after is not None  # one came in
    return self._next(x), after

  def _next(self, x_Bx1xD: jax.Array) -> jax.Array:
    """Scores the next token of each row, [B, V] float32."""
    logits = perturbed.dot_transposed(self._finish(x_Bx1xD), self._head_table())
    return logits[:, 0]


def hf_field(config: Mapping[str, Any], name: str) -> Any:
  """Reads a field that config.json must have."""
  if config.get(name) is None:
    raise errors.UserError(f"config.json has no field '{name}'.")
  return config[name]


def hf_activation(config: Mapping[str, Any], name: str, default: str) -> str:
  """Reads the name of an activation function and checks it."""
  activation = config.get(name, default)
  if activation not in ACTIVATIONS:
    raise errors.UserError(
      f"config.json has {name} '{activation}'; supported are "
      f"{', '.join(ACTIVATIONS)}.{errors.nearest(str(activation), ACTIVATIONS)}"
    )
  return activation


def hf_check(config: Mapping[str, Any], name: str, expected: Any) -> None:
  """Stops at a field whose value needs something not implemented."""
  if name in config and config[name] not in (None, expected):
    raise errors.UserError(
      f"config.json has {name} = {config[name]!r}; only {expected!r} is "
      "supported."
    )
