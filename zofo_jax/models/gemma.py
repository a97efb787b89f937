"""Gemma 1, 2 and 3, text models: scaled embeddings, soft caps, two RoPEs."""

from collections.abc import Mapping
from typing import Any

from zofo_jax import errors
from zofo_jax.models import llama, transformer
from zofo_jax.models import rope as rope_lib
from zofo_jax.models.hf import config as config_lib

Model = transformer.Transformer
SHARDINGS = transformer.SHARDINGS
hf_parameters = llama.hf_parameters

# `sliding_window_size` is in old files, and is not read, nor is `hidden_act`
# where there is a `hidden_activation`.
_FIELDS = """
  attention_bias head_dim hidden_act hidden_activation hidden_size
  intermediate_size max_position_embeddings num_attention_heads
  num_hidden_layers num_key_value_heads rms_norm_eps rope_parameters
  rope_scaling rope_theta tie_word_embeddings vocab_size
"""
_FIELDS_2 = """
  final_logit_softcapping layer_types query_pre_attn_scalar sliding_window
  sliding_window_size
"""
_MORE_FIELDS = {
  "gemma": "",
  "gemma2": _FIELDS_2 + "attn_logit_softcapping",
  "gemma3_text": _FIELDS_2
  + "_sliding_window_pattern rope_local_base_freq sliding_window_pattern",
}
_WINDOW, _PATTERN = 4096, 6


def config_from_hf(config: Mapping[str, Any]) -> transformer.Config:
  """Reads a config.json of any Gemma; see `models`."""
  family = config["model_type"]
  config_lib.check_decoder(config, (_FIELDS + _MORE_FIELDS[family]).split())
  num_layers = config_lib.integer(config, "num_hidden_layers")
  sizes = config_lib.attention_sizes({"head_dim": 256, **config})
  max_length = config_lib.integer(config, "max_position_embeddings")
  bias = config_lib.flag(config, "attention_bias")
  features: dict[str, Any] = {"qkv_bias": bias, "out_bias": bias}
  if family == "gemma":
    features["rope"] = rope_lib.from_hf(config, max_length, sizes["head_dim"])
  else:
    features |= _second(config, family, num_layers, max_length, sizes)
  return transformer.Config(
    vocab_size=config_lib.integer(config, "vocab_size"),
    mlp_size=config_lib.integer(config, "intermediate_size"),
    num_layers=num_layers,
    max_length=max_length,
    norm="rms_plus_one",
    norm_epsilon=config_lib.number(config, "rms_norm_eps", 1e-6),
    activation=_activation(config, family),
    tied_head=config_lib.flag(config, "tie_word_embeddings", True),
    embed_scale=sizes["hidden_size"] ** 0.5,
    **sizes,
    **features,
  )


def _activation(config: Mapping[str, Any], family: str) -> str:
  """Reads the activation; the first Gemma's files say gelu and mean tanh's."""
  if config.get("hidden_activation") is not None:
    return config_lib.activation(config, "hidden_activation", "")
  default = "gelu_pytorch_tanh"
  if family != "gemma" or config.get("hidden_act", "gelu") == "gelu":
    return default
  return config_lib.activation(config, "hidden_act", default)


def _second(
  config: Mapping[str, Any],
  family: str,
  num_layers: int,
  max_length: int,
  sizes: Mapping[str, int],
) -> dict[str, Any]:
  """Reads what came with the second generation."""
  third = family == "gemma3_text"
  sliding = llama.layer_types(config, num_layers)
  if sliding is None:
    every = 2
    if third:
      pattern = "sliding_window_pattern"
      name = pattern if pattern in config else f"_{pattern}"
      every = _PATTERN
      if config.get(name) is not None:
        every = config_lib.integer(config, name)
    sliding = tuple((i + 1) % every != 0 for i in range(num_layers))
  window: int | None = _WINDOW
  if "sliding_window" in config:
    window = None
    if config["sliding_window"] is not None:
      window = config_lib.integer(config, "sliding_window")
  if any(sliding) and window is None:
    raise errors.UserError(
      "config.json has layers of sliding_attention without a sliding_window."
    )
  scalar = config_lib.positive(config, "query_pre_attn_scalar", 256.0)
  features: dict[str, Any] = {
    "norm_places": "both",
    "windows": llama.windows_of(sliding, window),
    "attention_cap": None if third else _cap(config, "attn", 50.0),
    "logit_cap": _cap(config, "final", None if third else 30.0),
    "attention_scale": scalar**-0.5,
  }
  if not third:
    rope = rope_lib.from_hf(config, max_length, sizes["head_dim"])
    return features | {"rope": rope}
  whole, local = _two_ropes(config)
  return features | {
    "qk_norm": "head",
    "rope": rope_lib.from_hf(whole, max_length, sizes["head_dim"]),
    "other_rope": rope_lib.from_hf(local, max_length, sizes["head_dim"]),
    "other_rope_layers": sliding,
  }


def _cap(
  config: Mapping[str, Any], name: str, default: float | None
) -> float | None:
  """Reads a soft bound; null is none."""
  field = f"{name}_logit_softcapping"
  if config.get(field, default) is None:
    return None
  return config_lib.positive(config, field, default or 0.0)


def _two_ropes(
  config: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns the fields of Gemma 3's RoPE of full and of sliding attention."""
  both = config.get("rope_parameters") or {}
  if not isinstance(both, Mapping):
    raise errors.UserError(
      f"config.json's rope_parameters is {both!r}; expected an object."
    )
  if not set(both) <= {"full_attention", "sliding_attention"}:
    raise errors.UserError(
      f"config.json's rope_parameters has {', '.join(both)}; expected "
      "full_attention and sliding_attention."
    )
  theta = config_lib.number(config, "rope_theta", 1e6)
  local_theta = config_lib.number(config, "rope_local_base_freq", 1e4)
  return (
    {
      "rope_theta": theta,
      "rope_scaling": config.get("rope_scaling"),
      "rope_parameters": both.get("full_attention"),
    },
    {
      "rope_theta": local_theta,
      "rope_parameters": both.get("sliding_attention"),
    },
  )
