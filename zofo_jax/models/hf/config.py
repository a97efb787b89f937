"""Reads config.json by what is known of its fields.

A field is read by the family of the model, or listed here as one that does not
change a model's outputs. Any other field must be unset; `check_fields` refuses
it by name otherwise. The same rule is used for PEFT's adapter_config.json.
"""

import json
import math
import pathlib
import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from zofo_jax import errors
from zofo_jax.models import layers

FILE = "config.json"

# Fields that do not change a decoder's outputs, by the reason.
_HARMLESS = {
  "names, versions, and the dtype of the file": """
    _commit_hash _model_name_or_path _name_or_path architectures auto_map dtype
    is_llama_config keys_to_ignore_at_inference model_type name_or_path
    processor_class tokenizer_class torch_dtype transformers.js_config
    transformers_version unsloth_fixed unsloth_training_staged
    unsloth_version""",
  "initial weights": "_fast_init init_std initializer_range",
  "dropout, which the backbone does not use": """
    activation_dropout attention_dropout attention_probs_dropout_prob attn_pdrop
    classifier_dropout dropout embd_pdrop embedding_dropout hidden_dropout
    hidden_dropout_prob layerdrop resid_pdrop residual_dropout""",
  "token ids and defaults of generated text, which has its own config": """
    bad_words_ids begin_suppress_tokens bos_token_id decoder_start_token_id
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    eos_token_id exponential_decay_length_penalty forced_bos_token_id
    forced_eos_token_id length_penalty max_length max_new_tokens min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_scores pad_token_id prefix remove_invalid_values repetition_penalty
    return_dict_in_generate sep_token_id suppress_tokens temperature top_k top_p
    typical_p unk_token_id""",
  "how PyTorch computes the same function": """
    _attn_implementation _attn_implementation_autoset
    _attn_implementation_internal _flash_attn_2_enabled attn_implementation
    cache_implementation chunk_size_feed_forward gradient_checkpointing
    pretraining_tp tf_legacy_loss torchscript use_bfloat16 use_cache""",
  "what is returned beside the logits": """
    output_attentions output_hidden_states output_past return_dict
    use_return_dict""",
  "heads of other tasks": """
    finetuning_task id2label is_decoder label2id num_labels problem_type
    task_specific_params""",
  "the context length, in old files in addition to max_position_embeddings": """
    max_seq_len max_sequence_length model_max_length seq_length""",
}
HARMLESS = frozenset(" ".join(_HARMLESS.values()).split())

# No model is larger; a larger number would only exhaust the memory.
_MAX_SIZE = 2**24


def read(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON file that holds one object.

  Raises:
    UserError: there is no such file, or it holds something else.
  """
  try:
    fields = json.loads(path.read_text("utf-8-sig"))
  except (OSError, ValueError, RecursionError) as error:
    reason = errors.first_line(error)
    raise errors.UserError(f"{path}: not a JSON file ({reason}).") from error
  if not isinstance(fields, dict):
    raise errors.UserError(
      f"{path} holds a {type(fields).__name__}; expected one JSON object."
    )
  return fields


def check_fields(
  fields: Mapping[str, Any],
  names: Collection[str],
  file: str | pathlib.Path,
  unset: Sequence[Any] = ("", [], {}),
) -> None:
  """Raises a `UserError` if a field that is not known is set.

  Args:
    fields: of the file.
    names: of fields that are read, or do not matter.
    file: its name, for the message.
    unset: values, in addition to null and false, that stand for an unset field.
  """
  for name, value in fields.items():
    is_unset = value is None or value is False or value in unset
    if name not in names and not is_unset:
      raise errors.UserError(
        f"{file} has {name} = {reprlib.repr(value)}, which is not supported; "
        "a field on which no output depends can be removed from the file."
      )


def check_kind(value: Any, names: Iterable[str], subject: str) -> None:
  """Raises a `UserError` if a value is not one of several names.

  Args:
    value: of the field.
    names: the valid values.
    subject: file and field, for the message: "config.json has model_type".
  """
  names = list(names)
  if not isinstance(value, str) or value not in names:
    raise errors.UserError(
      f"{subject} '{value}'; supported are {', '.join(names)}."
      f"{errors.nearest(str(value), names)}"
    )


def integer(
  config: Mapping[str, Any], name: str, file: str | pathlib.Path = FILE
) -> int:
  """Reads a required field that holds a positive integer."""
  value = config.get(name)
  if value is None:
    raise errors.UserError(f"{file} has no field '{name}'.")
  if type(value) is not int or not 1 <= value <= _MAX_SIZE:
    raise errors.UserError(
      f"{file} has {name} = {reprlib.repr(value)}; expected an integer from 1 "
      f"to {_MAX_SIZE}."
    )
  return value


def number(
  config: Mapping[str, Any],
  name: str,
  default: float,
  file: str | pathlib.Path = FILE,
) -> float:
  """Reads a field that holds a finite number; null stands for the default."""
  value = config.get(name)
  if value is None:
    return default
  if type(value) not in (int, float) or not math.isfinite(value):
    raise errors.UserError(
      f"{file} has {name} = {reprlib.repr(value)}; expected a number."
    )
  return float(value)


def positive(config: Mapping[str, Any], name: str, default: float) -> float:
  """Reads a field that holds a number above 0; null stands for the default."""
  value = number(config, name, default)
  if value <= 0:
    raise errors.UserError(
      f"{FILE} has {name} = {value}; expected a number above 0."
    )
  return value


def flag(
  config: Mapping[str, Any],
  name: str,
  default: bool = False,
  file: str | pathlib.Path = FILE,
) -> bool:
  """Reads a field that holds true or false; null is false."""
  value = config.get(name, default)
  if value is not None and not isinstance(value, bool):
    raise errors.UserError(
      f"{file} has {name} = {reprlib.repr(value)}; expected true or false."
    )
  return bool(value)


def activation(config: Mapping[str, Any], name: str, default: str) -> str:
  """Reads and checks the name of an activation function."""
  value = config.get(name, default)
  check_kind(value, layers.ACTIVATIONS, f"{FILE} has {name}")
  return value


def attention_sizes(
  config: Mapping[str, Any],
  *,
  hidden: str = "hidden_size",
  heads: str = "num_attention_heads",
  kv: str | None = "num_key_value_heads",
  kv_optional: bool = False,
) -> dict[str, Any]:
  """Reads and checks the sizes of attention.

  Args:
    config: the file as a dict, with `head_dim` if heads are not as wide as
      their number makes them.
    hidden: name of the field of the width of the layers.
    heads: name of the field of the number of heads.
    kv: name of the field of the number of kv heads; None for as many as heads.
    kv_optional: whether that field may be absent, which means the same.

  Returns:
    hidden_size, num_heads, num_kv_heads and head_dim.

  Raises:
    UserError: a field is missing, or sizes do not divide each other.
  """
  hidden_size, num_heads = integer(config, hidden), integer(config, heads)
  num_kv_heads = num_heads
  if kv and not (kv_optional and config.get(kv) is None):
    num_kv_heads = integer(config, kv)
  if num_heads % num_kv_heads:
    raise errors.UserError(
      f"{FILE} has {heads} = {num_heads}, which {kv} = {num_kv_heads} does not "
      "divide."
    )
  head_dim, remainder = divmod(hidden_size, num_heads)
  if config.get("head_dim") is not None:
    head_dim, remainder = integer(config, "head_dim"), 0
  if remainder:
    raise errors.UserError(
      f"{FILE} has {hidden} = {hidden_size}, which {heads} = {num_heads} does "
      "not divide."
    )
  return {
    "hidden_size": hidden_size,
    "num_heads": num_heads,
    "num_kv_heads": num_kv_heads,
    "head_dim": head_dim,
  }


def check_decoder(config: Mapping[str, Any], fields: Collection[str]) -> None:
  """Raises a `UserError` if config.json has fields that are not known.

  Args:
    config: the file as a dict.
    fields: names of the fields that this family reads.
  """
  check_fields(config, HARMLESS.union(fields, ("is_causal",)), FILE)
  # Unlike other fields, this one is true unless it is given.
  if config.get("is_causal", True) is not True:
    raise errors.UserError(
      f"{FILE} has is_causal = {config['is_causal']!r}; only true is supported."
    )
