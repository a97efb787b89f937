"""Decoders as Flax modules, selected by Hugging Face's model_type.

A family is a Python module with `Model`, `config_from_hf`, `hf_parameters` and
`SHARDINGS`.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import flax.linen as nn

from zofo_jax.models import layers, llama, opt
from zofo_jax.models.hf import config as config_lib

FAMILIES: dict[str, ModuleType] = {
  "opt": opt,
  "llama": llama,
  "mistral": llama,
  "qwen2": llama,
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
  config_lib.check_kind(model_type, FAMILIES, "config.json has model_type")
  family = FAMILIES[model_type]
  return family.Model(
    family.config_from_hf(config), remat=remat, constrain=constrain
  ), family
