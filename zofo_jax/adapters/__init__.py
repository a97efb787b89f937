"""Adapters: LoRA, prefix tuning, prompt tuning, and any of them together.

An adapter is a tree that mirrors module paths and holds a `Lora` under each
adapted matrix, a `Prefix` under each attention, a `Prompt` under the
embedding; a model reads it as its collection "adapter", {} being none.
Adapters of many tasks are a leading axis under `vmap`.
"""

from zofo_jax.adapters.composite import (
  count_parameters,
  expand,
  has_dropout,
  join,
  num_positions,
  parts,
  prefix_length,
  prompt_length,
)
from zofo_jax.adapters.lora import (
  QUERY_VALUE,
  Lora,
  init_lora,
  lora_product,
  merge_lora,
)
from zofo_jax.adapters.prefix import (
  Prefix,
  ProjectedPrefix,
  init_prefix,
  prefix_of_tokens,
  prefix_shapes,
  prepend,
  project,
)
from zofo_jax.adapters.prompt import Prompt, init_prompt

__all__ = [
  "QUERY_VALUE",
  "Lora",
  "Prefix",
  "ProjectedPrefix",
  "Prompt",
  "count_parameters",
  "expand",
  "has_dropout",
  "init_lora",
  "init_prefix",
  "init_prompt",
  "join",
  "lora_product",
  "merge_lora",
  "num_positions",
  "parts",
  "prefix_length",
  "prefix_of_tokens",
  "prefix_shapes",
  "prepend",
  "project",
  "prompt_length",
]
