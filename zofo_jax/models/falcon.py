"""Falcon (Almazrouei et al., 2023): attention and MLP in parallel."""

from collections.abc import Mapping
from typing import Any

from zofo_jax import errors
from zofo_jax.models import rope as rope_lib
from zofo_jax.models import transformer
from zofo_jax.models.hf import config as config_lib

Model = transformer.Transformer
SHARDINGS = transformer.SHARDINGS

_FIELDS = """
  activation bias ffn_hidden_size hidden_size layer_norm_epsilon
  max_position_embeddings multi_query new_decoder_architecture
  num_attention_heads num_hidden_layers num_kv_heads num_ln_in_parallel_attn
  parallel_attn rope_parameters rope_scaling rope_theta tie_word_embeddings
  vocab_size
"""


def config_from_hf(config: Mapping[str, Any]) -> transformer.Config:
  """Reads a config.json of model_type falcon; see `models`."""
  if config_lib.flag(config, "alibi"):
    raise errors.UserError(
      "config.json has alibi = True; Falcon is supported with rotary positions "
      "only, not with ALiBi."
    )
  config_lib.check_decoder(config, _FIELDS.split())
  new = config_lib.flag(config, "new_decoder_architecture")
  grouped = new and config.get("num_kv_heads") is not None
  sizes = config_lib.attention_sizes(
    config, kv="num_kv_heads" if grouped else None
  )
  if not new and config_lib.flag(config, "multi_query", True):
    sizes["num_kv_heads"] = 1
  max_length = config_lib.integer(
    {"max_position_embeddings": 2048, **config}, "max_position_embeddings"
  )
  mlp_size = 4 * sizes["hidden_size"]
  if config.get("ffn_hidden_size") is not None:
    mlp_size = config_lib.integer(config, "ffn_hidden_size")
  num_norms = config_lib.number(config, "num_ln_in_parallel_attn", 2.0)
  bias = config_lib.flag(config, "bias")
  return transformer.Config(
    vocab_size=config_lib.integer(config, "vocab_size"),
    mlp_size=mlp_size,
    num_layers=config_lib.integer(config, "num_hidden_layers"),
    max_length=max_length,
    norm="layer",
    norm_epsilon=config_lib.number(config, "layer_norm_epsilon", 1e-5),
    activation=config_lib.activation(config, "activation", "gelu"),
    tied_head=config_lib.flag(config, "tie_word_embeddings", True),
    rope=rope_lib.from_hf(config, max_length, sizes["head_dim"]),
    parallel=new or config_lib.flag(config, "parallel_attn", True),
    one_norm=not new or num_norms != 2,
    qkv_bias=bias,
    out_bias=bias,
    mlp_bias=bias,
    fused_qkv="groups",
    gated=False,
    **sizes,
  )


_BLOCK = "transformer.h.{layer}."
_MODULES = {
  "embed": "transformer.word_embeddings",
  "head": "lm_head",
  "norm": "transformer.ln_f",
  "layers/attention_norm": _BLOCK + "input_layernorm",
  "layers/mlp_norm": _BLOCK + "post_attention_layernorm",
  "layers/attention/qkv": _BLOCK + "self_attention.query_key_value",
  "layers/attention/out": _BLOCK + "self_attention.dense",
  "layers/mlp/up": _BLOCK + "mlp.dense_h_to_4h",
  "layers/mlp/down": _BLOCK + "mlp.dense_4h_to_h",
}
_TWO_NORMS = {
  "layers/attention_norm": _BLOCK + "ln_attn",
  "layers/mlp_norm": _BLOCK + "ln_mlp",
}


def hf_parameters(config: transformer.Config) -> dict[str, tuple[str, bool]]:
  """Maps parameter paths to tensors; see `transformer.hf_parameters`."""
  two_norms = config.parallel and not config.one_norm
  norms = _TWO_NORMS if two_norms else {}
  return transformer.hf_parameters(config, {**_MODULES, **norms})
