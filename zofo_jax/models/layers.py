"""Layers shared by all decoders.

Weights are read only through `perturbed.read`, `take` and `dot`, so any of
them may be a perturbed weight. Matrix products run in the dtype of the weights;
norms, softmax and log-probabilities in float32.

Shapes: B rows, L length, S slots (L, or those of a cache), D width, F width of
a head, H heads, K kv heads, V vocabulary, P positions of a prefix.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zofo_jax import adapters
from zofo_jax.core import perturbed

INIT = nn.initializers.normal(0.02)

# By their names in config.json.
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

# (states [B, ..., D], whether D is sharded over the model axis) -> the same
# states with a sharding constraint.
ActivationSharding = Callable[[jax.Array, bool], jax.Array]


def no_constraint(x: jax.Array, sharded: bool) -> jax.Array:
  """Returns x unchanged and leaves its sharding to the compiler."""
  del sharded
  return x


class Linear(nn.Module):
  """y = x W + b, plus the product of a LoRA adapter if there is one."""

  features: int
  use_bias: bool = True

  @nn.compact
  def __call__(self, x: jax.Array, after: jax.Array | None = None) -> jax.Array:
    """Maps [..., in] to [..., features]; `after` as for `perturbed.dot`."""
    kernel = self.param("kernel", INIT, (x.shape[-1], self.features))
    y = perturbed.dot(x, kernel, after)
    if self.use_bias:
      bias = perturbed.read(
        self.param("bias", nn.initializers.zeros, (self.features,))
      )
      y = y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)
    if self.has_variable("adapter", "lora"):
      lora: adapters.Lora = self.get_variable("adapter", "lora")
      use_dropout = lora.dropout and self.has_rng("dropout")
      key = self.make_rng("dropout") if use_dropout else None
      y = y + adapters.lora_product(x, lora, key).astype(y.dtype)
    return y


class Bias(nn.Module):
  """A vector [V], of a tied head."""

  size: int

  @nn.compact
  def __call__(self) -> Any:
    """Returns the stored vector, perturbed or not."""
    return self.param("bias", nn.initializers.zeros, (self.size,))


class Embed(nn.Module):
  """An embedding table [V, D], which may also be the output embedding.

  Attributes:
    rows: V.
    features: D.
    scale: factor of embeddings that are looked up, rounded to their dtype.
  """

  rows: int
  features: int
  scale: float = 1.0

  def setup(self) -> None:
    """Declares the parameter."""
    self.embedding = self.param("embedding", INIT, (self.rows, self.features))

  def __call__(self, ids: jax.Array) -> jax.Array:
    """Returns the embeddings [..., D] of ids [...]."""
    x = perturbed.take(self.embedding, ids)
    return x if self.scale == 1.0 else x * jnp.asarray(self.scale, x.dtype)

  def table(self) -> Any:
    """Returns the stored table, perturbed or not."""
    return self.embedding

  def prompt(self) -> adapters.Prompt | None:
    """Returns the adapter's virtual tokens, if it has any."""
    return self.get_variable("adapter", "prompt", None)


def _affine(x: jax.Array, weight: Any) -> jax.Array:
  """Broadcasts a weight [D] to x in float32."""
  weight = perturbed.read(weight).astype(jnp.float32)
  return jnp.broadcast_to(weight, x.shape)


class RmsNorm(nn.Module):
  """x / rms(x) * (offset + scale)."""

  epsilon: float
  offset: float = 0.0

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises the last axis."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(
      jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon
    )
    init = nn.initializers.constant(1.0 - self.offset)
    scale = _affine(y, self.param("scale", init, (x.shape[-1],)))
    if self.offset:
      scale = self.offset + scale
    return (y * scale).astype(x.dtype)


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


# By what a weight does: multiplies (Llama), is added to 1 (Gemma), multiplies
# and shifts, or is absent.
NORMS: dict[str, Callable[..., nn.Module]] = {
  "rms": RmsNorm,
  "rms_plus_one": functools.partial(RmsNorm, offset=1.0),
  "layer": LayerNorm,
  "layer_plain": functools.partial(LayerNorm, affine=False),
}


def token_positions(mask_BxL: jax.Array) -> jax.Array:
  """Numbers real tokens from 0, wherever the padding is; int32 [B, L].

  Args:
    mask_BxL: bool, real tokens; or int32, the number of each token's document,
      0 for padding. Each document's tokens are numbered from 0.
  """
  count = jnp.cumsum((mask_BxL > 0).astype(jnp.int32), axis=1)
  if jnp.issubdtype(mask_BxL.dtype, jnp.integer):
    before_BxL = jnp.pad(mask_BxL, ((0, 0), (1, 0)))[:, :-1]
    starts_BxL = (mask_BxL > 0) & (mask_BxL != before_BxL)
    count -= jax.lax.cummax(jnp.where(starts_BxL, count - 1, 0), axis=1)
  return jnp.maximum(count - 1, 0)


def attention_mask(
  mask_BxS: jax.Array, slots_L: jax.Array, causal: bool = True
) -> jax.Array:
  """Returns the attention mask, bool [B, 1, L, S].

  A token attends to real tokens of its document, up to itself if `causal`.
  Every token attends to itself, padding included, because softmax is undefined
  without any allowed slot.

  Args:
    mask_BxS: bool, slots that hold a real token; or int32, as for
      `token_positions`.
    slots_L: int32, slots of the queries.
    causal: whether later tokens are hidden.
  """
  slots_S = jnp.arange(mask_BxS.shape[1])
  diagonal_LxS = slots_S[None, :] == slots_L[:, None]
  allowed_Bx1xLxS = mask_BxS[:, None, None, :] > 0
  if jnp.issubdtype(mask_BxS.dtype, jnp.integer):
    own_BxL = jnp.take(mask_BxS, slots_L, axis=1)
    allowed_Bx1xLxS &= mask_BxS[:, None, None, :] == own_BxL[:, None, :, None]
  if causal:
    causal_LxS = slots_S[None, :] <= slots_L[:, None]
    allowed_Bx1xLxS = allowed_Bx1xLxS & causal_LxS[None, None]
  return allowed_Bx1xLxS | diagonal_LxS[None, None]


def with_prefix(
  attention: nn.Module,
  key_BxSxKxF: jax.Array,
  value_BxSxKxF: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Prepends an adapter's prefix, if there is one, to keys and values.

  Call it directly before `attend`. If the collection "context" is mutable, keys
  and values are also stored there, to initialise a prefix from tokens.

  Args:
    attention: the module whose collection "adapter" may hold a "prefix".
    key_BxSxKxF: keys as passed to `attend`.
    value_BxSxKxF: values.

  Returns:
    Keys and values of P + S slots with a prefix of P positions, of S slots
    without.
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
    return key_BxSxKxF, value_BxSxKxF
  return adapters.prepend(prefix, key_BxSxKxF, value_BxSxKxF)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
  """Bounds values smoothly to (-cap, cap); None for no bound."""
  return x if cap is None else cap * jnp.tanh(x / cap)


def attend(
  query_BxLxHxF: jax.Array,
  key_BxSxKxF: jax.Array,
  value_BxSxKxF: jax.Array,
  allowed_Bx1xLxS: jax.Array,
  scale: float | None = None,
  cap: float | None = None,
) -> jax.Array:
  """Softmax attention, softmax in float32; [B, L, H*F].

  Args:
    query_BxLxHxF: queries.
    key_BxSxKxF: keys; H is a multiple of K and each serves H/K queries.
    value_BxSxKxF: values.
    allowed_Bx1xLxS: bool, attention mask.
    scale: factor of the scores; None for 1/sqrt(F).
    cap: soft bound of the scores; None for none.

  Returns:
    The concatenated outputs of the heads, in the dtype of the queries.
  """
  if cap is None:
    out = jax.nn.dot_product_attention(
      query_BxLxHxF,
      key_BxSxKxF,
      value_BxSxKxF,
      mask=allowed_Bx1xLxS,
      scale=scale,
      implementation="xla",
    )
    return out.reshape(*out.shape[:2], -1)
  rows, length, heads, width = query_BxLxHxF.shape
  num_kv = key_BxSxKxF.shape[2]
  grouped = query_BxLxHxF.reshape(rows, length, num_kv, heads // num_kv, width)
  scores = jnp.einsum(
    "blkgf,bskf->bkgls",
    grouped,
    key_BxSxKxF,
    preferred_element_type=jnp.float32,
  )
  scores = soft_cap(scores * (width**-0.5 if scale is None else scale), cap)
  least = jnp.finfo(jnp.float32).min
  scores = jnp.where(allowed_Bx1xLxS[:, :, None], scores, least)
  weights = jax.nn.softmax(scores, axis=-1).astype(value_BxSxKxF.dtype)
  out = jnp.einsum("bkgls,bskf->blkgf", weights, value_BxSxKxF)
  return out.reshape(rows, length, -1)
