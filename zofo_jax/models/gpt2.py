"""GPT-2 (Radford et al., 2019): learned positions, one matrix for q, k, v."""

from collections.abc import Mapping
from typing import Any

from zofo_jax.models import transformer
from zofo_jax.models.hf import config as config_lib

Model = transformer.Transformer
SHARDINGS = transformer.SHARDINGS

# The second half does not change the logits: `reorder_and_upcast_attn` is how
# PyTorch computes them, `summary_*` is another task's head.
_FIELDS = """
  activation_function layer_norm_epsilon n_embd n_head n_inner n_layer
  n_positions scale_attn_weights tie_word_embeddings vocab_size

  n_ctx reorder_and_upcast_attn summary_activation summary_first_dropout
  summary_proj_to_labels summary_type summary_use_proj
"""


def config_from_hf(config: Mapping[str, Any]) -> transformer.Config:
  """Reads a config.json of model_type gpt2; see `models`."""
  config_lib.check_decoder(config, _FIELDS.split())
  sizes = config_lib.attention_sizes(
    config, hidden="n_embd", heads="n_head", kv=None
  )
  mlp_size = 4 * sizes["hidden_size"]
  if config.get("n_inner") is not None:
    mlp_size = config_lib.integer(config, "n_inner")
  scaled = config_lib.flag(config, "scale_attn_weights", True)
  return transformer.Config(
    vocab_size=config_lib.integer(config, "vocab_size"),
    mlp_size=mlp_size,
    num_layers=config_lib.integer(config, "n_layer"),
    max_length=config_lib.integer(config, "n_positions"),
    norm="layer",
    norm_epsilon=config_lib.number(config, "layer_norm_epsilon", 1e-5),
    activation=config_lib.activation(config, "activation_function", "gelu_new"),
    tied_head=config_lib.flag(config, "tie_word_embeddings", True),
    rope=None,
    position_offset=0,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    fused_qkv="blocks",
    gated=False,
    attention_scale=None if scaled else 1.0,
    **sizes,
  )


_BLOCK = "transformer.h.{layer}."
_MODULES = {
  "embed": "transformer.wte",
  "position_embed": "transformer.wpe",
  "head": "lm_head",
  "norm": "transformer.ln_f",
  "layers/attention_norm": _BLOCK + "ln_1",
  "layers/mlp_norm": _BLOCK + "ln_2",
  "layers/attention/qkv": _BLOCK + "attn.c_attn",
  "layers/attention/out": _BLOCK + "attn.c_proj",
  "layers/mlp/up": _BLOCK + "mlp.c_fc",
  "layers/mlp/down": _BLOCK + "mlp.c_proj",
}


def hf_parameters(config: transformer.Config) -> dict[str, tuple[str, bool]]:
  """Maps parameter paths to tensors; matrices are stored as [in, out]."""
  return transformer.hf_parameters(config, _MODULES, transposed=False)
