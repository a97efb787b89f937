"""The OPT family (Zhang et al., 2022), 125m to 66b.

Decoders with learned positions and ReLU. The 350m model normalises after each
residual sum and projects between a narrower embedding and the layers.
"""

from collections.abc import Mapping
from typing import Any

from zofo_jax.models import transformer
from zofo_jax.models.hf import config as config_lib

Model = transformer.Transformer
SHARDINGS = transformer.SHARDINGS

# Positions start at row 2 of OPT's position table; padding reads row 1.
_OFFSET = 2

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


def config_from_hf(config: Mapping[str, Any]) -> transformer.Config:
  """Reads a config.json of model_type opt; see `models`."""
  config_lib.check_decoder(config, _FIELDS)
  sizes = config_lib.attention_sizes(config, kv=None)
  embed_size = sizes["hidden_size"]
  if config.get("word_embed_proj_dim") is not None:
    embed_size = config_lib.integer(config, "word_embed_proj_dim")
  norm_before = config_lib.flag(config, "do_layer_norm_before", True)
  # Checkpoints fine-tuned before transformers 4.20.1 lack the last norm.
  no_final_norm = config_lib.flag(config, "_remove_final_layer_norm")
  affine = config_lib.flag(config, "layer_norm_elementwise_affine", True)
  use_bias = config_lib.flag(config, "enable_bias", True)
  return transformer.Config(
    vocab_size=config_lib.integer(config, "vocab_size"),
    mlp_size=config_lib.integer(config, "ffn_dim"),
    num_layers=config_lib.integer(config, "num_hidden_layers"),
    max_length=config_lib.integer(config, "max_position_embeddings"),
    embed_size=embed_size,
    norm="layer" if affine else "layer_plain",
    norm_epsilon=1e-5,
    norm_places="input" if norm_before else "sum",
    final_norm=norm_before and not no_final_norm,
    activation=config_lib.activation(config, "activation_function", "relu"),
    tied_head=config_lib.flag(config, "tie_word_embeddings", True),
    rope=None,
    position_offset=_OFFSET,
    qkv_bias=use_bias,
    out_bias=use_bias,
    mlp_bias=use_bias,
    gated=False,
    **sizes,
  )


_ROOT = "model.decoder."
_BLOCK = _ROOT + "layers.{layer}."
_MODULES = {
  "embed": _ROOT + "embed_tokens",
  "position_embed": _ROOT + "embed_positions",
  "project_in": _ROOT + "project_in",
  "project_out": _ROOT + "project_out",
  "head": "lm_head",
  "norm": _ROOT + "final_layer_norm",
  "layers/attention_norm": _BLOCK + "self_attn_layer_norm",
  "layers/mlp_norm": _BLOCK + "final_layer_norm",
  "layers/attention/query": _BLOCK + "self_attn.q_proj",
  "layers/attention/key": _BLOCK + "self_attn.k_proj",
  "layers/attention/value": _BLOCK + "self_attn.v_proj",
  "layers/attention/out": _BLOCK + "self_attn.out_proj",
  "layers/mlp/up": _BLOCK + "fc1",
  "layers/mlp/down": _BLOCK + "fc2",
}


def hf_parameters(config: transformer.Config) -> dict[str, tuple[str, bool]]:
  """Maps parameter paths to tensors; see `transformer.hf_parameters`."""
  return transformer.hf_parameters(config, _MODULES)
