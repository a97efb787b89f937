"""Reads PEFT's adapter_config.json by what is known of its fields.

Fields that are neither read nor harmless must be unset, so that a feature of
PEFT that is not supported is refused by name, future ones included.
"""

import math
import pathlib
import re
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

from zofo_jax import errors
from zofo_jax.models.hf import config as config_lib

# Fields that do not change what an adapter computes, by the reason.
_HARMLESS = {
  "names, versions, and what PEFT sets itself": """
    auto_mapping base_model_name_or_path inference_mode peft_type peft_version
    revision""",
  "initial values, which those of the file replace": """
    corda_config encoder_hidden_size eva_config init_weights lora_ga_config
    loftq_config prefix_projection prompt_tuning_init prompt_tuning_init_text
    tokenizer_kwargs tokenizer_name_or_path""",
  "options of what is off": "megatron_core qalora_group_size",
}
# Fields that are read, by kind; those of `_VALUES` are read for all.
_READ = {
  "LORA": """
    alpha_pattern exclude_modules layers_pattern layers_to_transform lora_alpha
    lora_dropout r rank_pattern target_modules use_rslora""",
  "PREFIX_TUNING": """
    num_attention_heads num_layers num_transformer_submodules num_virtual_tokens
    token_dim""",
  "PROMPT_TUNING": """
    num_attention_heads num_layers num_transformer_submodules num_virtual_tokens
    token_dim""",
}
# The only values of fields whose other values are another method.
_VALUES: dict[str, tuple[Any, ...]] = {
  "bias": ("none",),
  "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
  "task_type": ("CAUSAL_LM", "FEATURE_EXTRACTION"),
}
# Initialisations that take a part out of the base model's weights.
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check(path: pathlib.Path, kind: str, fields: Mapping[str, Any]) -> None:
  """Raises a `UserError` if a field asks for what is not supported.

  Args:
    path: of the file, for messages.
    kind: its peft_type.
    fields: the file as a dict.
  """
  init = fields.get("init_lora_weights")
  if isinstance(init, str) and init.lower().startswith(_CHANGE_BASE):
    raise errors.UserError(
      f"{path} has init_lora_weights = {init!r}, which changes the weights of "
      "the base model; expected plain LoRA, to which PEFT converts it "
      "(save_pretrained with path_initial_model_for_weight_conversion)."
    )
  for name, values in _VALUES.items():
    value = fields.get(name)
    if value is not None and value not in values:
      raise errors.UserError(
        f"{path} has {name} = {reprlib.repr(value)}; supported are "
        f"{', '.join(map(repr, values))}."
      )
  names_read = [*_VALUES, *_READ[kind].split()]
  for names in _HARMLESS.values():
    names_read += names.split()
  # PEFT reads {} as the default config of a method, which turns it on.
  config_lib.check_fields(fields, names_read, path, unset=("", []))


def dropout(path: pathlib.Path, fields: Mapping[str, Any]) -> float:
  """Returns a LoRA's probability of dropping an input."""
  value = config_lib.number(fields, "lora_dropout", 0.0, path)
  if not 0.0 <= value < 1.0:
    raise errors.UserError(
      f"{path} has lora_dropout = {value}; expected at least 0 and below 1."
    )
  return value


def rank_and_scale(
  path: pathlib.Path, fields: Mapping[str, Any], name: str
) -> tuple[int, float]:
  """Returns the rank and the scale of a LoRA's module.

  Args:
    path: of the file, for messages.
    fields: the file as a dict.
    name: the module's, such as "model.layers.0.self_attn.q_proj".

  Raises:
    UserError: one of the two, or a pattern, is not valid.
  """
  values = {option: fields.get(option) for option in ("r", "lora_alpha")}
  for option, field in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
    patterns = fields.get(field) or {}
    if not isinstance(patterns, dict):
      raise errors.UserError(
        f"{path} has {field} = {reprlib.repr(patterns)}; expected an object."
      )
    for pattern, value in patterns.items():
      # The first that matches the end of the name counts.
      if _compile(path, field, rf"(.*\.)?({pattern})$").match(name):
        values[option] = value
        break
    if values[option] is None:
      raise errors.UserError(f"{path} has no '{option}'.")
  rank = config_lib.integer(values, "r", path)
  alpha = config_lib.number(values, "lora_alpha", 0.0, path)
  if not alpha:
    raise errors.UserError(
      f"{path} has lora_alpha = 0 for {name}; expected another number, since "
      "such an adapter changes nothing."
    )
  stabilized = config_lib.flag(fields, "use_rslora", False, path)
  return rank, alpha / (math.sqrt(rank) if stabilized else rank)


def targets(
  path: pathlib.Path,
  fields: Mapping[str, Any],
  modules: Collection[str],
  others: Collection[str],
) -> set[str]:
  """Returns the modules that a LoRA changes.

  Args:
    path: of the file, for messages.
    fields: the file as a dict.
    modules: names of the matrices that may have a LoRA.
    others: names of other modules, which may not.

  Raises:
    UserError: it changes none, or one that may not have a LoRA.
  """
  selected = fields.get("target_modules")
  all_linear = isinstance(selected, str) and selected.lower() == "all-linear"
  others = (
    () if all_linear else {*others, "lm_head", "embed_out"}.difference(modules)
  )
  names = {n for n in (*modules, *others) if _is_target(path, fields, n)}
  if not names:
    raise errors.UserError(
      f"{path} has target_modules = {reprlib.repr(selected)}, which select no "
      f"module; the modules are {', '.join(modules)}."
    )
  for name in sorted(names.intersection(others)):
    raise errors.UserError(
      f"{path} targets {name} (target_modules); supported are "
      f"{', '.join(sorted({m.rpartition('.')[2] for m in modules}))}."
    )
  return names


def _is_target(
  path: pathlib.Path, fields: Mapping[str, Any], name: str
) -> bool:
  """Returns whether PEFT would select a module."""
  excluded = fields.get("exclude_modules")
  if excluded and _selects(path, "exclude_modules", excluded, name):
    return False
  selected = fields.get("target_modules")
  if selected is None:  # PEFT's choices; a family has but one kind of them.
    selected = ["q_proj", "v_proj", "c_attn", "query_key_value"]
    selected += ["query", "value"]
  layers = fields.get("layers_to_transform")
  patterns = fields.get("layers_pattern")
  by_layer = layers is not None or patterns
  if by_layer and (isinstance(selected, str) or layers is None):
    raise errors.UserError(
      f"{path} has layers_to_transform = {reprlib.repr(layers)} and "
      f"layers_pattern = {reprlib.repr(patterns)}; expected target_modules to "
      "be a list of names, and layers_to_transform to be given."
    )
  if isinstance(selected, str) and selected.lower() == "all-linear":
    return True
  if not _selects(path, "target_modules", selected, name):
    return False
  return layers in (None, []) or _in_layers(path, layers, patterns, name)


def _selects(path: pathlib.Path, field: str, value: Any, name: str) -> bool:
  """Returns whether a regular expression, or one of several names, fits."""
  if isinstance(value, str):
    return _compile(path, field, value).fullmatch(name) is not None
  if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
    raise errors.UserError(
      f"{path} has {field} = {reprlib.repr(value)}; expected a list of names."
    )
  return any(f".{name}".endswith(f".{end}") for end in value)


def _in_layers(
  path: pathlib.Path, layers: Any, patterns: Any, name: str
) -> bool:
  """Returns whether a module is in one of the layers to transform."""
  layers = layers if isinstance(layers, list) else [layers]
  if any(type(layer) is not int for layer in layers):
    raise errors.UserError(
      f"{path} has layers_to_transform = {reprlib.repr(layers)}; expected "
      "integers."
    )
  patterns = patterns or [r"[^.]*"]
  for pattern in patterns if isinstance(patterns, list) else [patterns]:
    index = rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\."
    match = _compile(path, "layers_pattern", index).match(name)
    if match:
      return match["index"] is not None and int(match["index"]) in layers
  return False


def _compile(path: pathlib.Path, field: str, pattern: str) -> re.Pattern[str]:
  """Compiles a regular expression of a field."""
  try:
    return re.compile(pattern)
  except (re.error, RecursionError, OverflowError) as error:
    raise errors.UserError(
      f"{path} has {field} with {reprlib.repr(pattern)}, which is no regular "
      f"expression ({errors.first_line(error)})."
    ) from error
