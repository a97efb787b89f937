"""GPT-NeoX and Pythia (Biderman et al., 2023): parallel, partly rotary."""

from collections.abc import Mapping
from typing import Any

from zofo_jax.models import rope as rope_lib
from zofo_jax.models import transformer
from zofo_jax.models.hf import config as config_lib

Model = transformer.Transformer
SHARDINGS = transformer.SHARDINGS

_FIELDS = """
  attention_bias hidden_act hidden_size intermediate_size layer_norm_eps
  max_position_embeddings num_attention_heads num_hidden_layers
  partial_rotary_factor rope_parameters rope_scaling rope_theta rotary_emb_base
  rotary_pct tie_word_embeddings use_parallel_residual vocab_size
"""


def config_from_hf(config: Mapping[str, Any]) -> transformer.Config:
  """Reads a config.json of model_type gpt_neox; see `models`."""
  config_lib.check_decoder(config, _FIELDS.split())
  sizes = config_lib.attention_sizes(config, kv=None)
  max_length = config_lib.integer(config, "max_position_embeddings")
  rope_fields = dict(config)
  if config.get("rotary_emb_base") is not None:
    rope_fields["rope_theta"] = config["rotary_emb_base"]
  rope = rope_lib.from_hf(
    rope_fields,
    max_length,
    sizes["head_dim"],
    config_lib.number(config, "rotary_pct", 0.25),
  )
  attention_bias = config_lib.flag(config, "attention_bias", True)
  return transformer.Config(
    vocab_size=config_lib.integer(config, "vocab_size"),
    mlp_size=config_lib.integer(config, "intermediate_size"),
    num_layers=config_lib.integer(config, "num_hidden_layers"),
    max_length=max_length,
    norm="layer",
    norm_epsilon=config_lib.number(config, "layer_norm_eps", 1e-5),
    activation=config_lib.activation(config, "hidden_act", "gelu"),
    tied_head=config_lib.flag(config, "tie_word_embeddings"),
    rope=rope,
    parallel=config_lib.flag(config, "use_parallel_residual", True),
    qkv_bias=attention_bias,
    out_bias=attention_bias,
    mlp_bias=True,
    fused_qkv="groups",
    gated=False,
    **sizes,
  )


_BLOCK = "gpt_neox.layers.{layer}."
_MODULES = {
  "embed": "gpt_neox.embed_in",
  "head": "embed_out",
  "norm": "gpt_neox.final_layer_norm",
  "layers/attention_norm": _BLOCK + "input_layernorm",
  "layers/mlp_norm": _BLOCK + "post_attention_layernorm",
  "layers/attention/qkv": _BLOCK + "attention.query_key_value",
  "layers/attention/out": _BLOCK + "attention.dense",
  "layers/mlp/up": _BLOCK + "mlp.dense_h_to_4h",
  "layers/mlp/down": _BLOCK + "mlp.dense_4h_to_h",
}


def hf_parameters(config: transformer.Config) -> dict[str, tuple[str, bool]]:
  """Maps parameter paths to tensors; see `transformer.hf_parameters`."""
  return transformer.hf_parameters(config, _MODULES)
