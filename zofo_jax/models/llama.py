"""The Llama family: SmolLM2, TinyLlama, Llama-2/3, Mistral, Qwen2 and 2.5.

Pre-norm decoders with rotary positions, grouped-query attention and a gated
MLP. Layers are stacked on axis 0 under "layers" and scanned. Only the two
functions at the end know field and tensor names of Hugging Face checkpoints.
"""

import dataclasses
import reprlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from zofo_jax import errors
from zofo_jax.models import decoder, kv_cache, layers
from zofo_jax.models import rope as rope_lib
from zofo_jax.models.hf import config as config_lib

_NO_WINDOW = 2**30
_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """Hyperparameters of a Llama model.

  Attributes:
    vocab_size: V.
    hidden_size: D.
    mlp_size: hidden width of the gated MLP.
    num_layers: number of layers.
    num_heads: H.
    num_kv_heads: K, a divisor of H.
    head_dim: F, even; H * F need not be D.
    max_length: context length.
    norm_epsilon: added to the mean square.
    activation: a name in layers.ACTIVATIONS.
    tied_head: whether input and output embeddings are tied.
    qkv_bias: whether query, key and value have biases.
    out_bias: whether attention's output has a bias.
    mlp_bias: whether the MLP has biases.
    rope: rotary positions.
    windows: for each layer, the size of its attention window, the token itself
      included; None without windows.
  """

  vocab_size: int
  hidden_size: int
  mlp_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  max_length: int = 2048
  norm_epsilon: float = 1e-6
  activation: str = "silu"
  tied_head: bool = False
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  rope: rope_lib.Rope = dataclasses.field(default_factory=rope_lib.Rope)
  windows: tuple[int, ...] | None = None


class Attention(nn.Module):
  """Self-attention with rotary positions and grouped kv heads."""

  config: LlamaConfig
  constrain: layers.ActivationSharding

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    allowed_Bx1xLxS: jax.Array,
    rotations: tuple[jax.Array, jax.Array],
    cache: kv_cache.Cache | None,
  ) -> tuple[jax.Array, kv_cache.Cache | None]:
    """Applies self-attention to [B, L, D]."""
    c = self.config

    def heads(
      name: str, count: int, after: jax.Array | None = None
    ) -> jax.Array:
      y = layers.Linear(count * c.head_dim, c.qkv_bias, name=name)(x, after)
      y = self.constrain(y, True)
      return y.reshape(*x.shape[:2], count, c.head_dim)

    query = heads("query", c.num_heads)
    key = heads("key", c.num_kv_heads, query)
    value = heads("value", c.num_kv_heads, key)
    query = rope_lib.rotate(query, *rotations)
    key = rope_lib.rotate(key, *rotations)
    key, value, cache = kv_cache.append(cache, key, value)
    context = layers.with_prefix(self, key, value, allowed_Bx1xLxS)
    out = layers.attend(query, *context)
    return layers.Linear(c.hidden_size, c.out_bias, name="out")(out), cache


class Mlp(nn.Module):
  """down(act(gate(x)) * up(x))."""

  config: LlamaConfig
  constrain: layers.ActivationSharding

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [..., D] to [..., D]."""
    c = self.config
    gate = layers.Linear(c.mlp_size, c.mlp_bias, name="gate")(x)
    up = layers.Linear(c.mlp_size, c.mlp_bias, name="up")(x, gate)
    hidden = self.constrain(layers.ACTIVATIONS[c.activation](gate) * up, True)
    return layers.Linear(c.hidden_size, c.mlp_bias, name="down")(hidden)


class Block(nn.Module):
  """One pre-norm layer; the body of the scan."""

  config: LlamaConfig
  constrain: layers.ActivationSharding

  @nn.compact
  def __call__(
    self,
    carry: tuple[jax.Array, kv_cache.Cache | None],
    allowed_Bx1xLxS: jax.Array,
    rotations: tuple[jax.Array, jax.Array],
    distance_BxLxS: jax.Array | None,
    window: jax.Array | None,
  ) -> tuple[tuple[jax.Array, kv_cache.Cache | None], None]:
    """Runs one layer; `window` [] is the size of the attention window."""
    c = self.config
    x, cache = carry
    x = self.constrain(x, False)
    if window is not None and distance_BxLxS is not None:
      allowed_Bx1xLxS = allowed_Bx1xLxS & (distance_BxLxS < window)[:, None]
    norm = layers.RmsNorm(c.norm_epsilon, name="attention_norm")
    attention_out, cache = Attention(c, self.constrain, name="attention")(
      norm(x), allowed_Bx1xLxS, rotations, cache
    )
    x = x + attention_out
    norm = layers.RmsNorm(c.norm_epsilon, name="mlp_norm")
    x = x + Mlp(c, self.constrain, name="mlp")(norm(x))
    return (x, cache), None


class Llama(decoder.Decoder):
  """A Llama decoder with its head.

  Attributes:
    config: hyperparameters.
    remat: whether the backward pass recomputes the inside of each layer.
    constrain: sharding constraint of hidden states.
  """

  config: LlamaConfig
  remat: bool = False
  constrain: layers.ActivationSharding = layers.no_constraint

  def setup(self) -> None:
    """Declares the submodules."""
    c = self.config
    self.embed = layers.Embed(c.vocab_size, c.hidden_size)
    window_axis = nn.broadcast if c.windows is None else 0
    self.layers = decoder.stack_layers(
      Block,
      c.num_layers,
      self.remat,
      (nn.broadcast, nn.broadcast, nn.broadcast, window_axis),
    )(c, self.constrain)
    self.norm = layers.RmsNorm(c.norm_epsilon)
    if not c.tied_head:
      self.head = layers.Embed(c.vocab_size, c.hidden_size)

  @property
  def prefix_acts_as_tokens(self) -> bool:
    """Returns whether a prefix made of tokens is equivalent to these tokens.

    It is not with attention windows, which never hide a prefix, nor with
    dynamic NTK, which would rotate keys by angles that depend on the length of
    the row.
    """
    return self.config.windows is None and self.config.rope.kind != "dynamic"

  def _body(
    self,
    x_BxLxE: jax.Array,
    mask_BxL: jax.Array,
    cache: kv_cache.Cache | None = None,
  ) -> tuple[jax.Array, kv_cache.Cache | None]:
    """Runs everything before the last norm; [B, L, D]."""
    c = self.config
    mask_BxS, slots_L, cache = kv_cache.reserve_slots(mask_BxL, cache)
    allowed_Bx1xLxS = layers.attention_mask(mask_BxS, slots_L)
    positions_BxS = self._positions(mask_BxS)
    positions_BxL = jnp.take(positions_BxS, slots_L, axis=1)
    rotations = rope_lib.rotations(c.rope, c.head_dim, positions_BxL)
    distance_BxLxS, windows = None, None
    if c.windows is not None:
      distance_BxLxS = positions_BxL[:, :, None] - positions_BxS[:, None, :]
      windows = jnp.array(c.windows, jnp.int32)
    (x, cache), _ = self.layers(
      (x_BxLxE, cache),
      *(allowed_Bx1xLxS, rotations, distance_BxLxS, windows),
    )
    return x, kv_cache.reset_layer(cache)

  def _cache_shape(self) -> tuple[int, int, int]:
    """Returns the number of layers, of kv heads, and the width of a head."""
    c = self.config
    return c.num_layers, c.num_kv_heads, c.head_dim

  def _finish(self, x: jax.Array) -> jax.Array:
    """Maps the layers' output to the head's input."""
    return self.norm(x)


Model = Llama

# Shardings of weights by path; see `zofo_jax.sharding.rules`.
SHARDINGS = (
  (r"attention/(query|key|value)/kernel$", P(None, "fsdp", "model")),
  (r"mlp/(gate|up)/kernel$", P(None, "fsdp", "model")),
  (r"(attention/out|mlp/down)/kernel$", P(None, "model", "fsdp")),
  (r"(attention/(query|key|value)|mlp/(gate|up))/bias$", P(None, "model")),
  (r"(attention/out|mlp/down)/bias$", P()),
  # Columns, not rows: devices look tokens up without exchanging rows, and the
  # size of the vocabulary need not be divisible.
  (r"(embed|head)/embedding$", P(None, ("fsdp", "model"))),
  (r"norm/scale$", P()),
)


# The fields of config.json that `config_from_hf` reads: of all model types, and
# of each.
_FIELDS = frozenset(
  """
  head_dim hidden_act hidden_size intermediate_size max_position_embeddings
  num_attention_heads num_hidden_layers num_key_value_heads
  original_max_position_embeddings partial_rotary_factor rms_norm_eps
  rope_parameters rope_scaling rope_theta tie_word_embeddings vocab_size
  """.split()
)
_MORE_FIELDS = {
  "llama": ("attention_bias", "mlp_bias"),
  "mistral": ("sliding_window",),
  "qwen2": (
    "layer_types",
    "max_window_layers",
    "sliding_window",
    "use_sliding_window",
  ),
}


def _windows(
  config: Mapping[str, Any], family: str, num_layers: int
) -> tuple[int, ...] | None:
  """Reads the attention windows of all layers."""
  window: int | None = 4096
  if "sliding_window" in config:
    window = None
    if config["sliding_window"] is not None:
      window = config_lib.integer(config, "sliding_window")
  if family == "mistral":
    return None if window is None else (window,) * num_layers
  if not config_lib.flag(config, "use_sliding_window"):
    window = None
  kinds = config.get("layer_types")
  if kinds is None:
    first = config_lib.number(config, "max_window_layers", 28)
    sliding = [window is not None and i >= first for i in range(num_layers)]
  else:
    if not isinstance(kinds, list) or len(kinds) != num_layers:
      raise errors.UserError(
        f"config.json has layer_types = {reprlib.repr(kinds)}; expected one "
        f"for each of {num_layers} layers."
      )
    for kind in kinds:
      config_lib.check_kind(kind, _LAYER_TYPES, "config.json has layer_types")
    sliding = [kind == "sliding_attention" for kind in kinds]
  if not any(sliding):
    return None
  if window is None:
    raise errors.UserError(
      "config.json has layer_types of sliding_attention without "
      "use_sliding_window and sliding_window."
    )
  return tuple(window if s else _NO_WINDOW for s in sliding)


def config_from_hf(config: Mapping[str, Any]) -> LlamaConfig:
  """Reads a config.json of model_type llama, mistral or qwen2.

  Args:
    config: the file as a dict, written by any version of transformers.

  Returns:
    The configuration.

  Raises:
    UserError: a field is missing, or its value is not supported.
  """
  family = config.get("model_type", "llama")
  config_lib.check_decoder(config, _FIELDS.union(_MORE_FIELDS[family]))
  num_heads = config_lib.integer(config, "num_attention_heads")
  hidden_size = config_lib.integer(config, "hidden_size")
  num_layers = config_lib.integer(config, "num_hidden_layers")
  num_kv_heads = num_heads
  if family != "llama" or config.get("num_key_value_heads") is not None:
    num_kv_heads = config_lib.integer(config, "num_key_value_heads")
  if num_heads % num_kv_heads:
    raise errors.UserError(
      f"config.json has num_attention_heads = {num_heads}, which "
      f"num_key_value_heads = {num_kv_heads} does not divide."
    )
  head_dim, remainder = divmod(hidden_size, num_heads)
  if config.get("head_dim") is not None:
    head_dim, remainder = config_lib.integer(config, "head_dim"), 0
  if head_dim % 2 or remainder:
    raise errors.UserError(
      f"config.json has hidden_size = {hidden_size} and num_attention_heads "
      f"= {num_heads}; expected heads of an even width."
    )
  max_length = config_lib.integer(config, "max_position_embeddings")
  rope = rope_lib.from_hf(config, max_length)
  if rope.kind == "dynamic" and head_dim < 4:
    raise errors.UserError(
      f"config.json has heads of width {head_dim}; rotary positions of type "
      "'dynamic' expect at least 4."
    )
  attention_bias = config_lib.flag(config, "attention_bias")
  return LlamaConfig(
    vocab_size=config_lib.integer(config, "vocab_size"),
    hidden_size=hidden_size,
    mlp_size=config_lib.integer(config, "intermediate_size"),
    num_layers=num_layers,
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
    max_length=max_length,
    norm_epsilon=config_lib.number(config, "rms_norm_eps", 1e-6),
    activation=config_lib.activation(config, "hidden_act", "silu"),
    tied_head=config_lib.flag(config, "tie_word_embeddings"),
    qkv_bias=attention_bias or family == "qwen2",
    out_bias=attention_bias,
    mlp_bias=config_lib.flag(config, "mlp_bias"),
    rope=rope,
    windows=None if family == "llama" else _windows(config, family, num_layers),
  )


def hf_parameters(config: LlamaConfig) -> dict[str, tuple[str, bool]]:
  """Maps parameter paths to tensors of a Hugging Face checkpoint.

  Args:
    config: the model's hyperparameters.

  Returns:
    {path: (name, transposed)}. `{layer}` in a name stands for the layers of a
    stacked weight; transposed tensors are stored as [out, in].
  """
  block = "model.layers.{layer}."
  names = {
    "embed/embedding": ("model.embed_tokens.weight", False),
    "layers/attention_norm/scale": (block + "input_layernorm.weight", False),
    "layers/mlp_norm/scale": (
      block + "post_attention_layernorm.weight",
      False,
    ),
    "norm/scale": ("model.norm.weight", False),
  }
  if not config.tied_head:
    names["head/embedding"] = ("lm_head.weight", False)
  matrices = (
    ("attention/query", "self_attn.q_proj", config.qkv_bias),
    ("attention/key", "self_attn.k_proj", config.qkv_bias),
    ("attention/value", "self_attn.v_proj", config.qkv_bias),
    ("attention/out", "self_attn.o_proj", config.out_bias),
    ("mlp/gate", "mlp.gate_proj", config.mlp_bias),
    ("mlp/up", "mlp.up_proj", config.mlp_bias),
    ("mlp/down", "mlp.down_proj", config.mlp_bias),
  )
  for path, name, has_bias in matrices:
    names[f"layers/{path}/kernel"] = (block + name + ".weight", True)
    if has_bias:
      names[f"layers/{path}/bias"] = (block + name + ".bias", False)
  return names
