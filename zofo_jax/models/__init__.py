"""Language models as Flax modules, selected by Hugging Face's model_type.

A family is a Python module; those of this package share
`transformer.Transformer`:

- `Model`: the Flax module, made of a configuration.
- `config_from_hf(config)`: the configuration that a config.json, as a dict
  written by any version of transformers, describes. Raises a `UserError` if a
  field is missing or unknown, or has a value that is not supported.
- `hf_parameters(config)`: Hugging Face's tensors by our paths; see
  `transformer.hf_parameters`.
- `SHARDINGS`: shardings of weights by path; see `zofo_jax.sharding.rules`.
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
  "xlm-roberta": bert,
}


# Model types that are known and not supported, with the nearest family if there
# is one, by what distinguishes them from it.
_EXPERTS = "has mixtures of experts in place of MLPs"
_IMAGES = "reads images as well"
_UNLIKE: dict[str, dict[str, str]] = {
  _EXPERTS: {
    "dbrx": "llama",
    "deepseek_v2": "llama",
    "deepseek_v3": "llama",
    "ernie4_5_moe": "llama",
    "glm4_moe": "llama",
    "gpt_oss": "llama",
    "granitemoe": "granite",
    "jetmoe": "llama",
    "mixtral": "mistral",
    "olmoe": "olmo2",
    "phimoe": "phi3",
    "qwen2_moe": "qwen2",
    "qwen3_moe": "qwen3",
    "qwen3_next": "qwen3",
  },
  _IMAGES: {
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3_text",
    "idefics3": "llama",
    "internvl": "qwen2",
    "llama4": "llama",
    "llava": "llama",
    "llava_next": "mistral",
    "mistral3": "mistral",
    "mllama": "llama",
    "paligemma": "gemma",
    "phi4_multimodal": "phi3",
    "pixtral": "mistral",
    "qwen2_5_vl": "qwen2",
    "qwen2_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "smolvlm": "llama",
  },
  "has ALiBi, a bias of attention scores, in place of positions": {
    "bloom": "gpt2",
    "mpt": "gpt2",
  },
  "attends by relative positions": {
    "deberta": "bert",
    "deberta-v2": "bert",
    "mpnet": "bert",
    "xlnet": "bert",
  },
  "is a state-space model": dict.fromkeys(
    ("bamba", "falcon_h1", "falcon_mamba", "jamba", "mamba", "mamba2"), ""
  ),
  "is an encoder-decoder": dict.fromkeys(
    ("bart", "mbart", "mt5", "pegasus", "t5", "t5gemma", "umt5"), ""
  ),
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
  supported = f"; supported are {', '.join(FAMILIES)}."
  nearest, difference = _compare(config, model_type)
  if difference:
    like = f"is like {nearest} but " if nearest else ""
    return f"{text}, which {like}{difference}{supported}"
  if not nearest:
    return text + supported
  text += f"{supported} Did you mean '{nearest}'?"
  try:
    FAMILIES[nearest].config_from_hf({**config, "model_type": nearest})
  except errors.UserError as error:
    text += f" Read as {nearest}: {error}"
  return text


def _compare(config: Mapping[str, Any], model_type: str) -> tuple[str, str]:
  """Returns the nearest family, and what is known to differ; "" for none."""
  for difference, types in _UNLIKE.items():
    if model_type in types:
      return types[model_type], difference
  inner = config.get("text_config")
  text_type = inner.get("model_type") if isinstance(inner, Mapping) else None
  close = difflib.get_close_matches(str(text_type or model_type), FAMILIES, n=1)
  nearest = close[0] if close else ""
  if "vision_config" in config:
    return nearest, _IMAGES
  if any("experts" in name and value for name, value in config.items()):
    return nearest, _EXPERTS
  return nearest, ""
