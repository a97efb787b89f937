"""Masked language models: BERT, RoBERTa and XLM-RoBERTa.

Tokens see each other in both directions, and a mask is filled. All tokens are
of the first type, as in a text of one segment.
"""

from collections.abc import Mapping
from typing import Any

from zofo_jax import errors
from zofo_jax.models import transformer
from zofo_jax.models.hf import config as config_lib

Model = transformer.Transformer
SHARDINGS = transformer.SHARDINGS

_FIELDS = """
  hidden_act hidden_size intermediate_size layer_norm_eps
  max_position_embeddings num_attention_heads num_hidden_layers
  position_embedding_type tie_word_embeddings type_vocab_size vocab_size
"""
# In some files of BERT, of the head of another task.
_POOLER = """
  pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers
  pooler_size_per_head pooler_type directionality
"""


def config_from_hf(config: Mapping[str, Any]) -> transformer.Config:
  """Reads a config.json of a masked language model; see `models`."""
  config_lib.check_decoder(config, (_FIELDS + _POOLER).split())
  for name, expected in (("is_decoder", False), ("tie_word_embeddings", True)):
    if config_lib.flag(config, name, expected) is not expected:
      raise errors.UserError(
        f"config.json has {name} = {not expected}; masked language models are "
        f"supported with {expected} only."
      )
  kind = config.get("position_embedding_type", "absolute")
  config_lib.check_kind(
    kind, ["absolute"], "config.json has position_embedding_type"
  )
  positions = config_lib.integer(config, "max_position_embeddings")
  offset, head_activation = 0, "gelu"
  activation = config_lib.activation(config, "hidden_act", "gelu")
  if config["model_type"] == "bert":
    head_activation = activation
  else:
    # Positions start after the row of the padding token.
    offset = int(config_lib.number(config, "pad_token_id", 1.0)) + 1
  if not 0 <= offset < positions:
    raise errors.UserError(
      f"config.json has pad_token_id = {offset - 1}, and "
      f"max_position_embeddings = {positions}; expected positions after it."
    )
  return transformer.Config(
    vocab_size=config_lib.integer(config, "vocab_size"),
    mlp_size=config_lib.integer(config, "intermediate_size"),
    num_layers=config_lib.integer(config, "num_hidden_layers"),
    max_length=positions - offset,
    norm="layer",
    norm_epsilon=config_lib.number(config, "layer_norm_eps", 1e-12),
    norm_places="sum",
    final_norm=False,
    activation=activation,
    tied_head=True,
    rope=None,
    position_offset=offset,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    gated=False,
    causal=False,
    token_types=config_lib.integer(
      {"type_vocab_size": 2, **config}, "type_vocab_size"
    ),
    embed_norm=True,
    head_activation=head_activation,
    **config_lib.attention_sizes(config, kv=None),
  )


_LAYER = "encoder.layer.{layer}."
_MODULES = {
  "embed": "embeddings.word_embeddings",
  "position_embed": "embeddings.position_embeddings",
  "type_embed": "embeddings.token_type_embeddings",
  "embed_norm": "embeddings.LayerNorm",
  "layers/attention_norm": _LAYER + "attention.output.LayerNorm",
  "layers/mlp_norm": _LAYER + "output.LayerNorm",
  "layers/attention/query": _LAYER + "attention.self.query",
  "layers/attention/key": _LAYER + "attention.self.key",
  "layers/attention/value": _LAYER + "attention.self.value",
  "layers/attention/out": _LAYER + "attention.output.dense",
  "layers/mlp/up": _LAYER + "intermediate.dense",
  "layers/mlp/down": _LAYER + "output.dense",
}
_BERT = {name: f"bert.{module}" for name, module in _MODULES.items()} | {
  "head": "cls.predictions.decoder",
  "head_bias": "cls.predictions",
  "head_transform": "cls.predictions.transform.dense",
  "head_norm": "cls.predictions.transform.LayerNorm",
}
_ROBERTA = {name: f"roberta.{module}" for name, module in _MODULES.items()} | {
  "head": "lm_head.decoder",
  "head_bias": "lm_head",
  "head_transform": "lm_head.dense",
  "head_norm": "lm_head.layer_norm",
}


def hf_parameters(config: transformer.Config) -> dict[str, tuple[str, bool]]:
  """Maps parameter paths to tensors; see `transformer.hf_parameters`."""
  modules = _ROBERTA if config.position_offset else _BERT
  return transformer.hf_parameters(config, modules)
