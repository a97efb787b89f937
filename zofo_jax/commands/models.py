"""Lists the models: families by model_type, their sizes, and what they have.

  zofo models
  zofo models Qwen/Qwen3-0.6B

With a published model or a folder with config.json, describes this one.
"""

import math
from collections.abc import Sequence
from typing import Any

from zofo_jax.commands import arguments as arguments_lib
from zofo_jax.config import paths


def families() -> dict[str, list[str]]:
  """Returns the published models that can be planned, by model_type."""
  from zofo_jax import models
  from zofo_jax.models.hf import published

  sizes: dict[str, list[str]] = {name: [] for name in models.FAMILIES}
  for name, config in published.CONFIGS.items():
    sizes[config["model_type"]].append(name)
  return sizes


def _masked() -> list[str]:
  """Returns the model types of masked language models."""
  from zofo_jax import models

  return [name for name, f in models.FAMILIES.items() if f is models.bert]


def describe(name: str) -> list[str]:
  """Returns lines on one model.

  Args:
    name: a published model, or a folder with config.json.

  Raises:
    UserError: there is no such model, or it is not supported.
  """
  from zofo_jax.builders import model as model_lib
  from zofo_jax.models.hf import peft, weights
  from zofo_jax.sharding import mesh

  whole = mesh.abstract(dict.fromkeys(mesh.AXES, 1), 1)
  model = model_lib.published_model(
    name, dtype="float32", remat=False, mesh=whole
  )
  config, family = model.module.config, model.family
  count = sum(map(math.prod, weights.shapes(family, config).values()))
  names = peft.module_names(family, config)
  features = ", ".join(_features(config))
  return [
    f"{name}  ({count / 1e6:,.0f} million weights)",
    f"  {config.num_layers} layers of width {config.hidden_size}, "
    f"{config.num_heads} heads of width {config.head_dim}, "
    f"{config.num_kv_heads} of keys and values",
    f"  vocabulary {config.vocab_size}, context {config.max_length}",
    f"  {features}",
    "  modules for lora.targets, and PEFT's names:",
    *(f"    {path}  {hf_name}" for path, hf_name in names.items()),
  ]


def _features(shape: Any) -> list[str]:
  """Returns what distinguishes a model, in words."""
  rope = shape.rope
  positions = "rotary" if rope else "learned"
  if rope and rope.fraction != 1.0:
    positions = f"rotary ({rope.fraction:g} of each head)"
  features = [f"{positions} positions"]
  if not shape.causal:
    features.append("fills masks, does not generate")
  if rope and rope.kind != "default":
    features.append(f"RoPE scaled by {rope.kind}")
  if shape.other_rope_layers:
    count = sum(shape.other_rope_layers)
    without = shape.other_rope.kind == "none"
    how = "without positions" if without else "with a RoPE of their own"
    features.append(f"{count} layers {how}")
  if shape.windows:
    count = sum(window <= shape.max_length for window in shape.windows)
    features.append(f"{count} layers with a window of {min(shape.windows)}")
  if shape.qk_norm:
    features.append("norms of queries and keys")
  if shape.parallel:
    features.append("attention and MLP in parallel")
  if shape.attention_cap or shape.logit_cap:
    features.append("soft caps")
  features.append("tied head" if shape.tied_head else "head of its own")
  return features


def main(arguments: Sequence[str]) -> None:
  """Runs the command."""
  parser = arguments_lib.make_parser("models", __doc__)
  parser.add_argument(
    "name",
    nargs="?",
    metavar="MODEL",
    help="a published model, or a folder with config.json",
  )
  options = parser.parse(arguments)
  if options.name:
    name = options.name
    print("\n".join(describe(name if "/" in name else paths.expand(name))))
    return
  for model_type, names in families().items():
    print(model_type)
    for name in names:
      print(f"  {name}")
  print(
    "\nAll of them: LoRA, prefix and prompt, sharding, zofo plan, zofo export."
    f"\nAll but those that fill masks ({', '.join(_masked())}): generation."
    "\nOther sizes of a family work as well."
  )
