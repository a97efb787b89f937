"""The OPT family (Zhang et al., 2022), 125m to 66b.

Decoders with learned positions and ReLU. The 350m model normalises after each
residual sum and projects between a narrower embedding and the layers. Layers
are stacked on axis 0 under "layers" and scanned. Only the two functions at the
end know field and tensor names of Hugging Face checkpoints.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from zofo_jax import errors
from zofo_jax.models import decoder, kv_cache, layers
from zofo_jax.models.hf import config as config_lib

# Positions start at row 2 of OPT's position table; padding reads row 1.
_OFFSET = 2


@dataclasses.dataclass(frozen=True)
class OptConfig:
  """Hyperparameters of an OPT model.

  Attributes:
    vocab_size: V.
    hidden_size: D.
    mlp_size: hidden width of the MLP.
    num_layers: number of layers.
    num_heads: H, a divisor of D.
    embed_size: width of the embedding; projected if it is not D.
    max_length: number of positions.
    activation: a name in layers.ACTIVATIONS.
    norm_before: whether norms precede attention and MLP; if not (350m), they
      follow the residual sums.
    final_norm: whether a norm follows the last layer.
    norm_affine: whether norms have scale and bias.
    use_bias: whether the layers' matrices have biases.
    tied_head: whether input and output embeddings are tied.
  """

  vocab_size: int
  hidden_size: int
  mlp_size: int
  num_layers: int
  num_heads: int
  embed_size: int
  max_length: int = 2048
  activation: str = "relu"
  norm_before: bool = True
  final_norm: bool = True
  norm_affine: bool = True
  use_bias: bool = True
  tied_head: bool = True


class Attention(nn.Module):
  """Self-attention."""

  config: OptConfig
  constrain: layers.ActivationSharding

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    allowed_Bx1xLxS: jax.Array,
    cache: kv_cache.Cache | None,
  ) -> tuple[jax.Array, kv_cache.Cache | None]:
    """Applies self-attention to [B, L, D]."""
    c = self.config

    def heads(name: str, after: jax.Array | None = None) -> jax.Array:
      y = layers.Linear(c.hidden_size, c.use_bias, name=name)(x, after)
      y = self.constrain(y, True)
      return y.reshape(*x.shape[:2], c.num_heads, -1)

    query = heads("query")
    key = heads("key", query)
    value = heads("value", key)
    key, value, cache = kv_cache.append(cache, key, value)
    context = layers.with_prefix(self, key, value, allowed_Bx1xLxS)
    out = layers.attend(query, *context)
    return layers.Linear(c.hidden_size, c.use_bias, name="out")(out), cache


class Mlp(nn.Module):
  """down(act(up(x)))."""

  config: OptConfig
  constrain: layers.ActivationSharding

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [..., D] to [..., D]."""
    c = self.config
    hidden = layers.Linear(c.mlp_size, c.use_bias, name="up")(x)
    hidden = self.constrain(layers.ACTIVATIONS[c.activation](hidden), True)
    return layers.Linear(c.hidden_size, c.use_bias, name="down")(hidden)


class Block(nn.Module):
  """One layer; the body of the scan."""

  config: OptConfig
  constrain: layers.ActivationSharding

  @nn.compact
  def __call__(
    self,
    carry: tuple[jax.Array, kv_cache.Cache | None],
    allowed_Bx1xLxS: jax.Array,
  ) -> tuple[tuple[jax.Array, kv_cache.Cache | None], None]:
    """Runs one layer."""
    c = self.config
    x, cache = carry
    x = self.constrain(x, False)
    attention_norm = layers.LayerNorm(
      affine=c.norm_affine, name="attention_norm"
    )
    mlp_norm = layers.LayerNorm(affine=c.norm_affine, name="mlp_norm")
    attention = Attention(c, self.constrain, name="attention")
    mlp = Mlp(c, self.constrain, name="mlp")
    if c.norm_before:
      attention_out, cache = attention(
        attention_norm(x), allowed_Bx1xLxS, cache
      )
      x = x + attention_out
      return (x + mlp(mlp_norm(x)), cache), None
    attention_out, cache = attention(x, allowed_Bx1xLxS, cache)
    x = attention_norm(x + attention_out)
    return (mlp_norm(x + mlp(x)), cache), None


class Opt(decoder.Decoder):
  """An OPT decoder with its head.

  Attributes:
    config: hyperparameters.
    remat: whether the backward pass recomputes the inside of each layer.
    constrain: sharding constraint of hidden states.
  """

  config: OptConfig
  remat: bool = False
  constrain: layers.ActivationSharding = layers.no_constraint

  def setup(self) -> None:
    """Declares the submodules."""
    c = self.config
    self.embed = layers.Embed(c.vocab_size, c.embed_size)
    self.position_embed = layers.Embed(c.max_length + _OFFSET, c.hidden_size)
    if c.embed_size != c.hidden_size:
      self.project_in = layers.Linear(c.hidden_size, use_bias=False)
      self.project_out = layers.Linear(c.embed_size, use_bias=False)
    self.layers = decoder.stack_layers(
      Block, c.num_layers, self.remat, (nn.broadcast,)
    )(c, self.constrain)
    if c.final_norm:
      self.norm = layers.LayerNorm(affine=c.norm_affine)
    if not c.tied_head:
      self.head = layers.Embed(c.vocab_size, c.embed_size)

  def _body(
    self,
    x_BxLxE: jax.Array,
    mask_BxL: jax.Array,
    cache: kv_cache.Cache | None = None,
  ) -> tuple[jax.Array, kv_cache.Cache | None]:
    """Runs the layers; [B, L, D]."""
    mask_BxS, slots_L, cache = kv_cache.reserve_slots(mask_BxL, cache)
    rows = jnp.take(self._positions(mask_BxS), slots_L, axis=1) + _OFFSET
    rows = jnp.where(mask_BxL, rows, _OFFSET - 1)
    x = x_BxLxE
    if self.config.embed_size != self.config.hidden_size:
      x = self.project_in(x)
    x = x + self.position_embed(rows)
    allowed_Bx1xLxS = layers.attention_mask(mask_BxS, slots_L)
    (x, cache), _ = self.layers((x, cache), allowed_Bx1xLxS)
    return x, kv_cache.reset_layer(cache)

  def _cache_shape(self) -> tuple[int, int, int]:
    """Returns the number of layers, of kv heads, and the width of a head."""
    c = self.config
    return c.num_layers, c.num_heads, c.hidden_size // c.num_heads

  def _finish(self, x: jax.Array) -> jax.Array:
    """Maps the layers' output to the head's input."""
    if self.config.final_norm:
      x = self.norm(x)
    if self.config.embed_size != self.config.hidden_size:
      x = self.project_out(x)
    return x


Model = Opt

# Shardings of weights by path; see `zofo_jax.sharding.rules`.
SHARDINGS = (
  (r"attention/(query|key|value)/kernel$", P(None, "fsdp", "model")),
  (r"mlp/up/kernel$", P(None, "fsdp", "model")),
  (r"(attention/out|mlp/down)/kernel$", P(None, "model", "fsdp")),
  (r"(attention/(query|key|value)|mlp/up)/bias$", P(None, "model")),
  (r"(attention/out|mlp/down)/bias$", P()),
  (r"project_in/kernel$", P("fsdp", "model")),
  (r"project_out/kernel$", P("model", "fsdp")),
  (r"(embed|head)/embedding$", P(None, ("fsdp", "model"))),
  (r"norm/(scale|bias)$", P()),
)


# The fields of config.json that `config_from_hf` reads. OPT's position
# embeddings are always learned, as `learned_embeddings` says in some files.
_FIELDS = frozenset(
  """
  _remove_final_layer_norm activation_function do_layer_norm_before enable_bias
  ffn_dim hidden_size layer_norm_elementwise_affine learned_embeddings
  max_position_embeddings num_attention_heads num_hidden_layers
  tie_word_embeddings vocab_size word_embed_proj_dim
  """.split()
)


def config_from_hf(config: Mapping[str, Any]) -> OptConfig:
  """Reads a config.json of model_type opt.

  Args:
    config: the file as a dict, written by any version of transformers.

  Returns:
    The configuration.

  Raises:
    UserError: a field is missing, or its value is not supported.
  """
  config_lib.check_decoder(config, _FIELDS)
  hidden_size = config_lib.integer(config, "hidden_size")
  num_heads = config_lib.integer(config, "num_attention_heads")
  if hidden_size % num_heads:
    raise errors.UserError(
      f"config.json has hidden_size = {hidden_size}, which "
      f"num_attention_heads = {num_heads} does not divide."
    )
  embed_size = hidden_size
  if config.get("word_embed_proj_dim") is not None:
    embed_size = config_lib.integer(config, "word_embed_proj_dim")
  norm_before = config_lib.flag(config, "do_layer_norm_before", True)
  # Checkpoints fine-tuned before transformers 4.20.1 lack the last norm.
  no_final_norm = config_lib.flag(config, "_remove_final_layer_norm")
  return OptConfig(
    vocab_size=config_lib.integer(config, "vocab_size"),
    hidden_size=hidden_size,
    mlp_size=config_lib.integer(config, "ffn_dim"),
    num_layers=config_lib.integer(config, "num_hidden_layers"),
    num_heads=num_heads,
    embed_size=embed_size,
    max_length=config_lib.integer(config, "max_position_embeddings"),
    activation=config_lib.activation(config, "activation_function", "relu"),
    norm_before=norm_before,
    final_norm=norm_before and not no_final_norm,
    norm_affine=config_lib.flag(config, "layer_norm_elementwise_affine", True),
    use_bias=config_lib.flag(config, "enable_bias", True),
    tied_head=config_lib.flag(config, "tie_word_embeddings", True),
  )


def hf_parameters(config: OptConfig) -> dict[str, tuple[str, bool]]:
  """Maps parameter paths to tensors of a Hugging Face checkpoint.

  Args:
    config: the model's hyperparameters.

  Returns:
    {path: (name, transposed)}. `{layer}` in a name stands for the layers of a
    stacked weight; transposed tensors are stored as [out, in].
  """
  root = "model.decoder."
  block = root + "layers.{layer}."
  names = {
    "embed/embedding": (root + "embed_tokens.weight", False),
    "position_embed/embedding": (root + "embed_positions.weight", False),
  }
  if config.embed_size != config.hidden_size:
    names["project_in/kernel"] = (root + "project_in.weight", True)
    names["project_out/kernel"] = (root + "project_out.weight", True)
  if not config.tied_head:
    names["head/embedding"] = ("lm_head.weight", False)
  norms = {
    "layers/attention_norm": block + "self_attn_layer_norm",
    "layers/mlp_norm": block + "final_layer_norm",
  }
  if config.final_norm:
    norms["norm"] = root + "final_layer_norm"
  if config.norm_affine:
    for path, name in norms.items():
      names[f"{path}/scale"] = (name + ".weight", False)
      names[f"{path}/bias"] = (name + ".bias", False)
  matrices = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.out_proj",
    "mlp/up": "fc1",
    "mlp/down": "fc2",
  }
  for path, name in matrices.items():
    names[f"layers/{path}/kernel"] = (block + name + ".weight", True)
    if config.use_bias:
      names[f"layers/{path}/bias"] = (block + name + ".bias", False)
  return names
