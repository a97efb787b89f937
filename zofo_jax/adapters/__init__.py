"""Adapters: LoRA, prefix tuning, prompt tuning, and combinations of them.

An adapter is a nested dict that mirrors module paths, with a `Lora` under each
adapted matrix, a `Prefix` under each attention and a `Prompt` under the
embedding; {} is no adapter. Models read it as their variable collection
"adapter". Adapters of several tasks are stacked on a leading axis and used
under `vmap`.
"""

from zofo_jax.adapters.composite import (
  expand,
  has_dropout,
  join,
  parts,
  prefix_length,
  prompt_length,
)
from zofo_jax.adapters.lora import (
  QUERY_VALUE,
  Lora,
  fold_lora,
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
  "expand",
  "fold_lora",
  "has_dropout",
  "init_lora",
  "init_prefix",
  "init_prompt",
  "join",
  "lora_product",
  "merge_lora",
  "parts",
  "prefix_length",
  "prefix_of_tokens",
  "prefix_shapes",
  "prepend",
  "project",
  "prompt_length",
]
