"""One layer of a transformer, with a table of the features of all families."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from zofo_jax.core import xla
from zofo_jax.models import kv_cache, layers
from zofo_jax.models import rope as rope_lib


@dataclasses.dataclass(frozen=True)
class Config:
  """Hyperparameters of a transformer; the defaults are Llama's.

  Attributes:
    vocab_size: V.
    hidden_size: D.
    mlp_size: hidden width of the MLP.
    num_layers: number of layers.
    num_heads: H.
    num_kv_heads: K, a divisor of H.
    head_dim: F; H * F need not be D.
    max_length: context length.
    norm_epsilon: added to the mean square or the variance.
    activation: a name in layers.ACTIVATIONS.
    tied_head: whether input and output embeddings are tied.
    qkv_bias: whether query, key and value have biases.
    out_bias: whether attention's output has a bias.
    mlp_bias: whether the MLP has biases.
    rope: rotary positions; None without.
    windows: for each layer, the size of its attention window, the token itself
      included; None without windows.
    other_rope: rotary positions of the layers in `other_rope_layers`.
    other_rope_layers: for each layer, whether it uses `other_rope`.
    position_offset: row of the table of learned positions at which positions
      start; None without learned positions.
    embed_size: width of the embedding; None for D, projected if it is not D.
    embed_scale: factor of the embeddings of tokens.
    input_scale: factor of the input of the first layer.
    norm: a name in layers.NORMS.
    norm_places: where in a layer the norms are: "input" of attention and MLP,
      their "output", "both", or the "sum" with the residual stream.
    final_norm: whether a norm follows the last layer.
    parallel: whether attention and MLP read the same input.
    one_norm: whether they also share its norm.
    residual_scale: factor of what a layer adds.
    fused_qkv: whether one matrix makes query, key and value: "blocks" of their
      columns, or "groups" of a kv head and its queries; None for three.
    qk_norm: whether query and key are normalised, by "head" or "all" heads at
      once; None for no norm.
    attention_scale: factor of the scores; None for 1/sqrt(F).
    attention_cap: soft bound of the scores; None for none.
    gated: whether the MLP is down(act(gate(x)) * up(x)), not down(act(up(x))).
    fused_mlp: whether one matrix makes gate and up.
    logit_scale: factor of the logits.
    logit_cap: soft bound of the logits; None for none.
    causal: whether tokens see no later ones; if not, the model fills masks.
    token_types: rows of a table of token types, of which all tokens have the
      first; 0 without one.
    embed_norm: whether a norm follows the embeddings.
    head_activation: activation of a layer and its norm before the head, which
      then has a bias; None without them.
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
  rope: rope_lib.Rope | None = dataclasses.field(default_factory=rope_lib.Rope)
  windows: tuple[int, ...] | None = None
  other_rope: rope_lib.Rope | None = None
  other_rope_layers: tuple[bool, ...] = ()
  position_offset: int | None = None
  embed_size: int | None = None
  embed_scale: float = 1.0
  input_scale: float = 1.0
  norm: str = "rms"
  norm_places: str = "input"
  final_norm: bool = True
  parallel: bool = False
  one_norm: bool = False
  residual_scale: float = 1.0
  fused_qkv: str | None = None
  qk_norm: str | None = None
  attention_scale: float | None = None
  attention_cap: float | None = None
  gated: bool = True
  fused_mlp: bool = False
  logit_scale: float = 1.0
  logit_cap: float | None = None
  causal: bool = True
  token_types: int = 0
  embed_norm: bool = False
  head_activation: str | None = None

  @property
  def projects_embedding(self) -> bool:
    """Returns whether the embedding is narrower or wider than the layers."""
    return self.embed_size not in (None, self.hidden_size)

  def make_norm(self, name: str | None = None) -> nn.Module:
    """Returns a norm of this model."""
    return layers.NORMS[self.norm](epsilon=self.norm_epsilon, name=name)


class Attention(nn.Module):
  """Self-attention with grouped kv heads."""

  config: Config
  constrain: layers.ActivationSharding

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    allowed_Bx1xLxS: jax.Array,
    rotations: tuple[jax.Array, jax.Array] | None,
    cache: kv_cache.Cache | None,
  ) -> tuple[jax.Array, kv_cache.Cache | None]:
    """Applies self-attention to [B, L, D]."""
    c = self.config
    query, key, value = self._fused(x) if c.fused_qkv else self._separate(x)
    if c.qk_norm == "head":
      query = c.make_norm("query_norm")(query)
      key = c.make_norm("key_norm")(key)
    if rotations is not None:
      query = rope_lib.rotate(query, *rotations)
      key = rope_lib.rotate(key, *rotations)
    key, value, cache = kv_cache.append(cache, key, value)
    key, value = layers.with_prefix(self, key, value)
    out = layers.attend(
      query, key, value, allowed_Bx1xLxS, c.attention_scale, c.attention_cap
    )
    return layers.Linear(c.hidden_size, c.out_bias, name="out")(out), cache

  def _separate(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes query [B, L, H, F], key and value [B, L, K, F]."""
    c = self.config

    def heads(
      name: str, count: int, after: jax.Array | None = None
    ) -> jax.Array:
      y = layers.Linear(count * c.head_dim, c.qkv_bias, name=name)(x, after)
      if c.qk_norm == "all" and name != "value":
        y = c.make_norm(f"{name}_norm")(y)
      y = self.constrain(y, True)
      return y.reshape(*x.shape[:2], count, c.head_dim)

    query = heads("query", c.num_heads)
    key = heads("key", c.num_kv_heads, query)
    return query, key, heads("value", c.num_kv_heads, key)

  def _fused(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes the same by one product."""
    c = self.config
    count = c.num_heads + 2 * c.num_kv_heads
    y = layers.Linear(count * c.head_dim, c.qkv_bias, name="qkv")(x)
    y = self.constrain(y, True)
    if c.fused_qkv == "blocks":
      y = y.reshape(*x.shape[:2], count, c.head_dim)
      query, key, value = jnp.split(
        y, (c.num_heads, c.num_heads + c.num_kv_heads), axis=2
      )
      return query, key, value
    y = y.reshape(*x.shape[:2], c.num_kv_heads, -1, c.head_dim)
    query = y[:, :, :, :-2].reshape(*x.shape[:2], c.num_heads, c.head_dim)
    return query, y[:, :, :, -2], y[:, :, :, -1]


class Mlp(nn.Module):
  """down(act(gate(x)) * up(x)), or down(act(up(x)))."""

  config: Config
  constrain: layers.ActivationSharding

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [..., D] to [..., D]."""
    c = self.config
    activation = layers.ACTIVATIONS[c.activation]
    if c.fused_mlp:
      both = layers.Linear(2 * c.mlp_size, c.mlp_bias, name="gate_up")(x)
      gate, up = jnp.split(self.constrain(both, True), 2, axis=-1)
      hidden = activation(gate) * up
    elif c.gated:
      gate = layers.Linear(c.mlp_size, c.mlp_bias, name="gate")(x)
      up = layers.Linear(c.mlp_size, c.mlp_bias, name="up")(x, gate)
      hidden = activation(gate) * up
    else:
      hidden = activation(layers.Linear(c.mlp_size, c.mlp_bias, name="up")(x))
    hidden = self.constrain(hidden, True)
    return layers.Linear(c.hidden_size, c.mlp_bias, name="down")(hidden)


# Arrays [layers] of what differs between layers: "window", "other_rope".
PerLayer = dict[str, jax.Array]


class Block(nn.Module):
  """One layer; the body of the scan."""

  config: Config
  constrain: layers.ActivationSharding

  @nn.compact
  def __call__(
    self,
    carry: tuple[jax.Array, kv_cache.Cache | None],
    allowed_Bx1xLxS: jax.Array,
    rotations: tuple[jax.Array, jax.Array] | None,
    distance_BxLxS: jax.Array | None,
    per_layer: PerLayer,
  ) -> tuple[tuple[jax.Array, kv_cache.Cache | None], None]:
    """Runs one layer; `per_layer` holds its own scalars."""
    c = self.config
    x, cache = carry
    x = self.constrain(x, False)
    if distance_BxLxS is not None:
      near_BxLxS = distance_BxLxS < per_layer["window"]
      allowed_Bx1xLxS = allowed_Bx1xLxS & near_BxLxS[:, None]
    if "other_rope" in per_layer:
      choice = per_layer["other_rope"]
      rotations = jax.tree.map(lambda both: both[choice], rotations)
    attention = Attention(c, self.constrain, name="attention")
    mlp = Mlp(c, self.constrain, name="mlp")

    def before(name: str, y: jax.Array) -> jax.Array:
      return c.make_norm(name)(y) if c.norm_places in ("input", "both") else y

    def add(name: str, y: jax.Array, out: jax.Array) -> jax.Array:
      if c.norm_places in ("output", "both"):
        out = c.make_norm(name)(out)
      if c.residual_scale != 1.0:
        out = out * jnp.asarray(c.residual_scale, out.dtype)
      y = y + out
      return c.make_norm(name)(y) if c.norm_places == "sum" else y

    second = "_out_norm" if c.norm_places == "both" else "_norm"
    normed = before("attention_norm", x)
    attention_out, cache = attention(normed, allowed_Bx1xLxS, rotations, cache)
    if c.parallel:
      normed = normed if c.one_norm else before("mlp_norm", x)
      normed = xla.after(normed, attention_out)  # for memory
      return (x + attention_out + mlp(normed), cache), None
    x = add(f"attention{second}", x, attention_out)
    return (add(f"mlp{second}", x, mlp(before("mlp_norm", x))), cache), None
