"""The transformer of all families; `Config` is the table of its features.

Layers are stacked on axis 0 under "layers" and scanned. A family of models is a
`Config` read from config.json, and Hugging Face's names of the modules; see
`models/llama.py`.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from zofo_jax import adapters
from zofo_jax.models import decoder, kv_cache, layers
from zofo_jax.models import rope as rope_lib
from zofo_jax.models.block import Block, PerLayer
from zofo_jax.models.block import Config as Config


class Transformer(decoder.Decoder):
  """A decoder with its head.

  Attributes:
    config: hyperparameters.
    remat: whether the backward pass recomputes the inside of each layer.
    constrain: sharding constraint of hidden states.
  """

  config: Config
  remat: bool = False
  constrain: layers.ActivationSharding = layers.no_constraint

  def setup(self) -> None:
    """Declares the submodules."""
    c = self.config
    width = c.embed_size or c.hidden_size
    self.embed = layers.Embed(c.vocab_size, width, c.embed_scale)
    if c.position_offset is not None:
      self.position_embed = layers.Embed(
        c.max_length + c.position_offset, c.hidden_size
      )
    if c.projects_embedding:
      self.project_in = layers.Linear(c.hidden_size, use_bias=False)
      self.project_out = layers.Linear(width, use_bias=False)
    if c.token_types:
      self.type_embed = layers.Embed(c.token_types, c.hidden_size)
    if c.embed_norm:
      self.embed_norm = c.make_norm()
    shared = nn.broadcast
    self.layers = decoder.stack_layers(
      Block,
      c.num_layers,
      self.remat,
      (shared, shared, shared, 0 if self._per_layer() else shared),
    )(c, self.constrain)
    if c.final_norm:
      self.norm = c.make_norm()
    if c.head_activation:
      self.head_transform = layers.Linear(c.hidden_size)
      self.head_norm = c.make_norm()
      self.head_bias = layers.Bias(c.vocab_size)
    if not c.tied_head:
      self.head = layers.Embed(c.vocab_size, width)

  @property
  def prefix_acts_as_tokens(self) -> bool:
    """Returns whether a prefix made of tokens is equivalent to these tokens.

    It is not where these tokens would see later ones, nor where keys are
    rotated by angles that depend on the length of the row.
    """
    c = self.config
    ropes = (rope for rope in (c.rope, c.other_rope) if rope)
    fixed = not any(r.depends_on_length for r in ropes)
    return c.causal and fixed

  def _per_layer(self) -> PerLayer:
    """Returns what differs between layers, [layers] each."""
    c = self.config
    per_layer = {}
    if c.windows is not None:
      per_layer["window"] = jnp.array(c.windows, jnp.int32)
    if c.other_rope is not None:
      per_layer["other_rope"] = jnp.array(c.other_rope_layers, jnp.int32)
    return per_layer

  def _rotations(
    self, positions_BxL: jax.Array
  ) -> tuple[jax.Array, jax.Array] | None:
    """Computes cos and sin; with two kinds of them, on a new first axis."""
    c = self.config
    if c.rope is None:
      return None
    first = rope_lib.rotations(c.rope, c.head_dim, positions_BxL)
    if c.other_rope is None:
      return first
    other = rope_lib.rotations(c.other_rope, c.head_dim, positions_BxL)
    cosine, sine = (jnp.stack(pair) for pair in zip(first, other, strict=True))
    return cosine, sine

  def _body(
    self,
    x_BxLxE: jax.Array,
    mask_BxL: jax.Array,
    cache: kv_cache.Cache | None = None,
  ) -> tuple[jax.Array, kv_cache.Cache | None]:
    """Runs everything before the last norm; [B, L, D]."""
    c = self.config
    mask_BxS, slots_L, cache = kv_cache.reserve_slots(mask_BxL, cache)
    prefix = adapters.prefix_length(self.variables.get("adapter", {}))
    positions_BxS = layers.token_positions(mask_BxS) + prefix
    positions_BxL = jnp.take(positions_BxS, slots_L, axis=1)
    x = x_BxLxE
    if c.input_scale != 1.0:
      x = x * jnp.asarray(c.input_scale, x.dtype)
    if c.projects_embedding:
      x = self.project_in(x)
    if c.position_offset is not None:
      rows = positions_BxL + c.position_offset
      padding = max(c.position_offset - 1, 0)
      x = x + self.position_embed(jnp.where(mask_BxL > 0, rows, padding))
    if c.token_types:
      x = x + self.type_embed(jnp.zeros_like(positions_BxL))
    if c.embed_norm:
      x = self.embed_norm(x)
    allowed_Bx1xLxS = layers.attention_mask(mask_BxS, slots_L, c.causal)
    if prefix:
      # It takes the first slots, as it does positions, and is visible to all.
      front = ((0, 0), (0, 0), (0, 0), (prefix, 0))
      allowed_Bx1xLxS = jnp.pad(allowed_Bx1xLxS, front, constant_values=True)
    distance_BxLxS = None
    if c.windows is not None:
      first_BxP = jnp.broadcast_to(jnp.arange(prefix), (len(x), prefix))
      positions_BxS = jnp.concatenate([first_BxP, positions_BxS], axis=1)
      distance_BxLxS = positions_BxL[:, :, None] - positions_BxS[:, None, :]
    (x, cache), _ = self.layers(
      (x, cache),
      allowed_Bx1xLxS,
      self._rotations(positions_BxL),
      distance_BxLxS,
      self._per_layer(),
    )
    return x, kv_cache.reset_layer(cache)

  def output(self) -> decoder.Output:
    """Returns what follows the product with the output embedding."""
    c = self.config
    bias = self.head_bias() if c.head_activation else None
    return decoder.Output(bias, c.logit_cap)

  def _cache_shape(self) -> tuple[int, int, int]:
    """Returns the number of layers, of kv heads, and the width of a head."""
    c = self.config
    return c.num_layers, c.num_kv_heads, c.head_dim

  def _finish(self, x: jax.Array) -> jax.Array:
    """Maps the layers' output to the head's input."""
    c = self.config
    if c.final_norm:
      x = self.norm(x)
    if c.projects_embedding:
      x = self.project_out(x)
    if c.head_activation:
      x = layers.ACTIVATIONS[c.head_activation](self.head_transform(x))
      x = self.head_norm(x)
    return (
      x if c.logit_scale == 1.0 else x * jnp.asarray(c.logit_scale, x.dtype)
    )


# Shardings of weights by path; see `zofo_jax.sharding.rules`.
SHARDINGS = (
  (r"attention/(query|key|value|qkv)/kernel$", P(None, "fsdp", "model")),
  (r"mlp/(gate|up|gate_up)/kernel$", P(None, "fsdp", "model")),
  (r"(attention/out|mlp/down)/kernel$", P(None, "model", "fsdp")),
  (
    r"(attention/(query|key|value|qkv)|mlp/(gate|up|gate_up))/bias$",
    P(None, "model"),
  ),
  (r"(attention/out|mlp/down)/bias$", P()),
  (r"project_in/kernel$", P("fsdp", "model")),
  (r"project_out/kernel$", P("model", "fsdp")),
  # Columns, not rows: devices look tokens up without exchanging rows, and the
  # size of the vocabulary need not be divisible.
  (
    r"(^|/)(embed|position_embed|type_embed|head)/embedding$",
    P(None, ("fsdp", "model")),
  ),
  (r"head_transform/kernel$", P("fsdp", "model")),
  (r"norm/(scale|bias)$", P()),
  (r"head_(transform|bias)/bias$", P()),
)


def hf_parameters(
  config: Config, modules: Mapping[str, str], transposed: bool = True
) -> dict[str, tuple[str, bool]]:
  """Maps parameter paths to tensors of a Hugging Face checkpoint.

  Args:
    config: the model's hyperparameters.
    modules: Hugging Face's names of the modules of all models of the family,
      by ours; `{layer}` stands for the layers of a stacked module.
    transposed: whether matrices are stored as [out, in].

  Returns:
    {path: (name, transposed)}.
  """
  names = {}
  for path in decoder.parameter_shapes(Transformer(config)):
    module, _, leaf = path.rpartition("/")
    name = f"{modules[module]}.{'bias' if leaf == 'bias' else 'weight'}"
    names[path] = name, transposed and leaf == "kernel"
  return names
