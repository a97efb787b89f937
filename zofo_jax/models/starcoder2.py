"""StarCoder2 (Lozhkov et al., 2024): layer norms, a plain MLP, windows."""

from collections.abc import Mapping
from typing import Any

from zofo_jax.models import llama, transformer
from zofo_jax.models import rope as rope_lib
from zofo_jax.models.hf import config as config_lib

Model = transformer.Transformer
SHARDINGS = transformer.SHARDINGS

# The last line is in published files, and read by no version of transformers.
_FIELDS = """
  hidden_act hidden_size intermediate_size max_position_embeddings norm_epsilon
  num_attention_heads num_hidden_layers num_key_value_heads rope_parameters
  rope_scaling rope_theta sliding_window tie_word_embeddings use_bias vocab_size

  activation_function layer_norm_epsilon mlp_type norm_type
"""


def config_from_hf(config: Mapping[str, Any]) -> transformer.Config:
  """Reads a config.json of model_type starcoder2; see `models`."""
  config_lib.check_decoder(config, _FIELDS.split())
  sizes = config_lib.attention_sizes(config)
  num_layers = config_lib.integer(config, "num_hidden_layers")
  max_length = config_lib.integer(config, "max_position_embeddings")
  window = None
  if config.get("sliding_window") is not None:
    window = config_lib.integer(config, "sliding_window")
  bias = config_lib.flag(config, "use_bias", True)
  return transformer.Config(
    vocab_size=config_lib.integer(config, "vocab_size"),
    mlp_size=config_lib.integer(config, "intermediate_size"),
    num_layers=num_layers,
    max_length=max_length,
    norm="layer",
    norm_epsilon=config_lib.number(config, "norm_epsilon", 1e-5),
    activation=config_lib.activation(config, "hidden_act", "gelu_pytorch_tanh"),
    tied_head=config_lib.flag(config, "tie_word_embeddings", True),
    rope=rope_lib.from_hf(config, max_length, sizes["head_dim"]),
    windows=llama.windows_of((True,) * num_layers, window),
    qkv_bias=bias,
    out_bias=bias,
    mlp_bias=bias,
    gated=False,
    **sizes,
  )


_BLOCK = "model.layers.{layer}."
_MODULES = llama.MODULES | {
  "layers/mlp/up": _BLOCK + "mlp.c_fc",
  "layers/mlp/down": _BLOCK + "mlp.c_proj",
}


def hf_parameters(config: transformer.Config) -> dict[str, tuple[str, bool]]:
  """Maps parameter paths to tensors; see `transformer.hf_parameters`."""
  return transformer.hf_parameters(config, _MODULES)
