"""Language models as Flax modules, selected by Hugging Face's model_type.

A family is a Python module with `Model`, `config_from_hf`, `hf_parameters` and
`SHARDINGS`; all families of this package share `transformer.Transformer`.
"""

import difflib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import flax.linen as nn

from zofo_jax import errors
from zofo_jax.models import (
  bert,
  falcon,
  gemma,
  gpt2,
  gpt_neox,
  layers,
  llama,
  opt,
  starcoder2,
)

FAMILIES: dict[str, ModuleType] = {
  "opt": opt,
  "gpt2": gpt2,
  "gpt_neox": gpt_neox,
  "llama": llama,
  "mistral": llama,
  "qwen2": llama,
  "qwen3": llama,
  "olmo2": llama,
  "smollm3": llama,
  "granite": llama,
  "phi3": llama,
  "gemma": gemma,
  "gemma2": gemma,
  "gemma3_text": gemma,
  "starcoder2": starcoder2,
  "falcon": falcon,
  "bert": bert,
  "roberta": bert,
}


# Model types that are known and not supported, by the reason.
_REFUSED = {
  "a mixture of experts": """
    dbrx deepseek_v2 deepseek_v3 ernie4_5_moe glm4_moe gpt_oss granitemoe
    jetmoe mixtral olmoe phimoe qwen2_moe qwen3_moe qwen3_next""",
  "a model of images too, whose text model is gemma3_text": "gemma3",
  "a model of images too": """
    gemma3n idefics3 internvl llama4 llava llava_next mistral3 mllama
    paligemma phi4_multimodal pixtral qwen2_5_vl qwen2_vl qwen3_vl smolvlm""",
  "a state-space model": "bamba falcon_h1 falcon_mamba jamba mamba mamba2",
  "an encoder-decoder": "bart mbart mt5 pegasus t5 t5gemma umt5",
}


def from_hf(
  config: Mapping[str, Any],
  *,
  remat: bool = False,
  constrain: layers.ActivationSharding = layers.no_constraint,
) -> tuple[nn.Module, ModuleType]:
  """Returns the module that a config.json describes.

  Args:
    config: the file as a dict.
    remat: whether the backward pass recomputes the inside of each layer.
    constrain: sharding constraint of hidden states.

  Returns:
    The module and its family, whose `hf_parameters(module.config)` maps
    parameters to tensors.

  Raises:
    UserError: the model type or a feature in the config is not supported.
  """
  model_type: Any = config.get("model_type")
  if not isinstance(model_type, str) or model_type not in FAMILIES:
    raise errors.UserError(_unknown(config, str(model_type)))
  family = FAMILIES[model_type]
  return family.Model(
    family.config_from_hf(config), remat=remat, constrain=constrain
  ), family


def _unknown(config: Mapping[str, Any], model_type: str) -> str:
  """Describes a model type that is not supported, and the nearest that is."""
  text = f"config.json has model_type '{model_type}'"
  for what, names in _REFUSED.items():
    if model_type in names.split():
      text += f", {what}"
  text += f"; supported are {', '.join(FAMILIES)}."
  close = difflib.get_close_matches(model_type, FAMILIES, n=1)
  if not close:
    return text
  nearest = close[0]
  text += f" Did you mean '{nearest}'?"
  try:
    FAMILIES[nearest].config_from_hf({**config, "model_type": nearest})
  except errors.UserError as error:
    text += f" Read as {nearest}: {error}"
  return text
