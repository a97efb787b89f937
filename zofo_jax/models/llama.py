"""Llama and its relatives: gated MLP, rotary positions, RMS norms.

SmolLM2 and 3, TinyLlama, Llama-2 and 3, Mistral, Qwen2, 2.5 and 3, OLMo 2,
Granite, Phi-3 and 4.
"""

import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from zofo_jax import errors
from zofo_jax.models import rope as rope_lib
from zofo_jax.models import transformer
from zofo_jax.models.hf import config as config_lib

Model = transformer.Transformer
SHARDINGS = transformer.SHARDINGS

_NO_WINDOW = 2**30
_LAYER_TYPES = ("full_attention", "sliding_attention")


class _Kind(NamedTuple):
  """What a model type reads and has.

  Attributes:
    fields: of config.json, in addition to those of all types.
    features: fields of `transformer.Config`.
    defaults: values of absent fields that differ from Llama's.
  """

  fields: str = ""
  features: Mapping[str, Any] = {}
  defaults: Mapping[str, Any] = {}


# The fields of config.json that all types read.
_FIELDS = """
  head_dim hidden_act hidden_size intermediate_size max_position_embeddings
  num_attention_heads num_hidden_layers num_key_value_heads
  original_max_position_embeddings partial_rotary_factor rms_norm_eps
  rope_parameters rope_scaling rope_theta tie_word_embeddings vocab_size
"""
_WINDOWS = "layer_types max_window_layers sliding_window use_sliding_window"
_KINDS = {
  "llama": _Kind("attention_bias mlp_bias"),
  "mistral": _Kind("sliding_window"),
  "qwen2": _Kind(_WINDOWS, {"qkv_bias": True}),
  "qwen3": _Kind(
    f"attention_bias {_WINDOWS}", {"qk_norm": "head"}, {"head_dim": 128}
  ),
  "olmo2": _Kind(
    "attention_bias",
    {"qk_norm": "all", "norm_places": "output"},
    {"rms_norm_eps": 1e-5},
  ),
  "smollm3": _Kind(
    f"attention_bias mlp_bias no_rope_layers no_rope_layer_interval {_WINDOWS}",
    {},
    {"tie_word_embeddings": True, "rope_theta": 2e6},
  ),
  "granite": _Kind(
    "attention_bias mlp_bias attention_multiplier embedding_multiplier "
    "logits_scaling residual_multiplier"
  ),
  # The last two are in files of Phi-4, and read by no version of transformers.
  "phi3": _Kind(
    "sliding_window full_attn_mod interpolate_factor",
    {"fused_qkv": "blocks", "fused_mlp": True},
    {
      "rms_norm_eps": 1e-5,
      "original_max_position_embeddings": 4096,
      "sliding_window": None,
    },
  ),
}
# Types whose files may lack num_key_value_heads: as many as heads.
_MULTI_HEAD = ("llama", "olmo2", "granite", "phi3")


def layer_types(
  config: Mapping[str, Any], num_layers: int
) -> tuple[bool, ...] | None:
  """Reads which layers have attention windows; None if the file does not say.

  Raises:
    UserError: the list has another length or unknown types.
  """
  kinds = config.get("layer_types")
  if kinds is None:
    return None
  if not isinstance(kinds, list) or len(kinds) != num_layers:
    raise errors.UserError(
      f"config.json has layer_types = {reprlib.repr(kinds)}; expected one "
      f"for each of {num_layers} layers."
    )
  for kind in kinds:
    config_lib.check_kind(kind, _LAYER_TYPES, "config.json has layer_types")
  return tuple(kind == "sliding_attention" for kind in kinds)


def windows_of(
  sliding: tuple[bool, ...], window: int | None
) -> tuple[int, ...] | None:
  """Returns the sizes of all layers' windows; None if no layer has one."""
  if window is None or not any(sliding):
    return None
  return tuple(window if s else _NO_WINDOW for s in sliding)


def _windows(
  config: Mapping[str, Any], family: str, num_layers: int
) -> tuple[int, ...] | None:
  """Reads the attention windows of all layers."""
  window: int | None = 4096
  if "sliding_window" in config:
    window = None
    if config["sliding_window"] is not None:
      window = config_lib.integer(config, "sliding_window")
  if family in ("mistral", "phi3"):
    return windows_of((True,) * num_layers, window)
  if not config_lib.flag(config, "use_sliding_window"):
    window = None
  sliding = layer_types(config, num_layers)
  if sliding is None:
    if family == "smollm3":
      with_rope = _rope_layers(config, num_layers)
      sliding = tuple(window is not None and not r for r in with_rope)
    else:
      first = config_lib.number(config, "max_window_layers", 28)
      sliding = tuple(
        window is not None and i >= first for i in range(num_layers)
      )
  if any(sliding) and window is None:
    raise errors.UserError(
      "config.json has layer_types of sliding_attention without "
      "use_sliding_window and sliding_window."
    )
  return windows_of(sliding, window)


def _rope_layers(
  config: Mapping[str, Any], num_layers: int
) -> tuple[bool, ...]:
  """Reads which layers of SmolLM3 have rotary positions."""
  layers = config.get("no_rope_layers")
  if layers is None:
    interval = 4
    if config.get("no_rope_layer_interval") is not None:
      interval = config_lib.integer(config, "no_rope_layer_interval")
    return tuple((i + 1) % interval != 0 for i in range(num_layers))
  if (
    not isinstance(layers, list)
    or len(layers) < num_layers
    or any(type(layer) not in (int, bool) for layer in layers)
  ):
    raise errors.UserError(
      f"config.json has no_rope_layers = {reprlib.repr(layers)}; expected 1 "
      f"or 0 for each of {num_layers} layers: 0 for one without RoPE."
    )
  return tuple(map(bool, layers[:num_layers]))


def config_from_hf(config: Mapping[str, Any]) -> transformer.Config:
  """Reads a config.json of a type in `_KINDS`; see `models`."""
  family = config.get("model_type", "llama")
  kind = _KINDS[family]
  config_lib.check_decoder(config, f"{_FIELDS} {kind.fields}".split())
  config = {**kind.defaults, **config}
  num_layers = config_lib.integer(config, "num_hidden_layers")
  sizes = config_lib.attention_sizes(config, kv_optional=family in _MULTI_HEAD)
  max_length = config_lib.integer(config, "max_position_embeddings")
  rope = rope_lib.from_hf(
    _longrope(config) if family == "phi3" else config,
    max_length,
    sizes["head_dim"],
    1.0 if family == "phi3" else None,
  )
  attention_bias = config_lib.flag(config, "attention_bias")
  features: dict[str, Any] = {
    "qkv_bias": attention_bias,
    "out_bias": attention_bias,
    "mlp_bias": config_lib.flag(config, "mlp_bias"),
    **kind.features,
  }
  if "sliding_window" in kind.fields:
    features["windows"] = _windows(config, family, num_layers)
  if family == "smollm3":
    without = tuple(not rope for rope in _rope_layers(config, num_layers))
    if any(without):
      features |= {"other_rope": rope_lib.NONE, "other_rope_layers": without}
  if family == "granite":
    number = config_lib.number
    features |= {
      "input_scale": number(config, "embedding_multiplier", 1.0),
      "residual_scale": number(config, "residual_multiplier", 1.0),
      "attention_scale": number(config, "attention_multiplier", 1.0),
      "logit_scale": 1.0 / config_lib.positive(config, "logits_scaling", 1.0),
    }
  return transformer.Config(
    vocab_size=config_lib.integer(config, "vocab_size"),
    mlp_size=config_lib.integer(config, "intermediate_size"),
    num_layers=num_layers,
    max_length=max_length,
    norm_epsilon=config_lib.number(config, "rms_norm_eps", 1e-6),
    activation=config_lib.activation(config, "hidden_act", "silu"),
    tied_head=config_lib.flag(config, "tie_word_embeddings"),
    rope=rope,
    **sizes,
    **features,
  )


def _longrope(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns Phi-3's fields with the present name of its kind of RoPE."""
  config = dict(config)
  for name in ("rope_scaling", "rope_parameters"):
    scaling = config.get(name)
    if isinstance(scaling, Mapping):
      kind = scaling.get("rope_type", scaling.get("type", "default"))
      kind = "longrope" if kind in ("su", "yarn") else kind
      config[name] = {**scaling, "rope_type": kind}
  return config


_BLOCK = "model.layers.{layer}."
MODULES = {
  "embed": "model.embed_tokens",
  "head": "lm_head",
  "norm": "model.norm",
  "layers/attention_norm": _BLOCK + "input_layernorm",
  "layers/mlp_norm": _BLOCK + "post_attention_layernorm",
  "layers/attention/query": _BLOCK + "self_attn.q_proj",
  "layers/attention/key": _BLOCK + "self_attn.k_proj",
  "layers/attention/value": _BLOCK + "self_attn.v_proj",
  "layers/attention/qkv": _BLOCK + "self_attn.qkv_proj",
  "layers/attention/query_norm": _BLOCK + "self_attn.q_norm",
  "layers/attention/key_norm": _BLOCK + "self_attn.k_norm",
  "layers/attention/out": _BLOCK + "self_attn.o_proj",
  "layers/mlp/gate": _BLOCK + "mlp.gate_proj",
  "layers/mlp/up": _BLOCK + "mlp.up_proj",
  "layers/mlp/gate_up": _BLOCK + "mlp.gate_up_proj",
  "layers/mlp/down": _BLOCK + "mlp.down_proj",
}
# The norms of layers whose norms are not those of Llama.
_NORMS = {
  "output": {
    "layers/attention_norm": _BLOCK + "post_attention_layernorm",
    "layers/mlp_norm": _BLOCK + "post_feedforward_layernorm",
  },
  "both": {
    "layers/attention_out_norm": _BLOCK + "post_attention_layernorm",
    "layers/mlp_norm": _BLOCK + "pre_feedforward_layernorm",
    "layers/mlp_out_norm": _BLOCK + "post_feedforward_layernorm",
  },
}


def hf_parameters(config: transformer.Config) -> dict[str, tuple[str, bool]]:
  """Maps parameter paths to tensors; see `transformer.hf_parameters`."""
  norms = _NORMS.get(config.norm_places, {})
  return transformer.hf_parameters(config, {**MODULES, **norms})
