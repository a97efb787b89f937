"""Checks of a config; those of several fields that must fit together.

Every error names the field, what was found and what was expected.
"""

import re
from collections.abc import Mapping
from typing import Any

import ml_collections

from zofo_jax import errors
from zofo_jax.config import defaults, methods, validate_reward

_Fields = Mapping[str, Any]  # dotted names and values

# The update rules of theta that write in place, and that a ledger can replay.
IN_PLACE = ("sgd", "conservative")
# The estimators that evaluate one point on the line of a direction.
ONE_POINT = ("forward", "exact")
# Inputs of a run besides its config, as `ckpt.may_change` names it.
INPUTS = ("rows", "tokenizer", "model_config", "weights")
OBJECTIVES = ("loss", "accuracy", "macro_f1", "token_f1", "reward")


def check(config: ml_collections.ConfigDict) -> None:
  """Checks every field, and fields against each other.

  Raises:
    errors.UserError: names the field, what was found and what was expected.
  """
  fields = defaults.flat(config)
  for field in defaults.FIELDS.values():
    field.validate(fields[field.name])
  _check_zo(fields)
  _check_method(fields)
  _check_guided(fields)
  _check_quantize(fields)
  _check_offload(fields)
  _check_write_every(fields)
  _check_own_task(fields)
  _check_stream(fields)
  _check_adapter(fields)
  _check_generate(fields)
  _check_ckpt(fields)
  validate_reward.check(fields)
  _check_pattern(fields, "lora.targets")
  _check_pattern(fields, "reward.pattern")
  if not fields["model.name"]:
    raise errors.UserError(
      "config.model.name: expected a hub id or a local folder; found nothing."
    )


def _check_pattern(fields: _Fields, name: str) -> None:
  """Checks that a field is a regular expression."""
  try:
    re.compile(fields[name])
  except re.error as error:
    raise errors.UserError(
      f"config.{name}: expected a regular expression; found "
      f"'{fields[name]}' ({error})."
    ) from error


def _check_method(fields: _Fields) -> None:
  """Checks for fields that the method would ignore."""
  method = fields["method"]
  zeroth_order = methods.METHODS[method].zeroth_order
  if (
    zeroth_order
    and method != "bilevel"
    and fields["zo.direction"] == "per_example"
  ):
    raise errors.UserError(
      "config.zo.direction: 'per_example' goes with method 'bilevel'; expected "
      f"another with '{method}'."
    )
  of_adapter = zeroth_order and not methods.METHODS[method].updates_base
  if of_adapter and (fields["zo.select"] or fields["zo.layers"]):
    raise errors.UserError(
      "config.zo.select: names weights of theta, as zo.layers does; expected "
      f"neither with method '{method}', which moves an adapter."
    )
  if (
    of_adapter
    and fields["zo.direction"] == "low_rank"
    and fields["adapter.kind"] == "prefix"
    and not fields["prefix.projection"]
  ):
    raise errors.UserError(
      "config.zo.direction: 'low_rank' needs matrices, and a prefix has none; "
      "expected another direction, or prefix.projection above 0."
    )
  total = fields["train.num_steps"]
  if "_then_" in method and fields["train.num_first_steps"] >= total:
    raise errors.UserError(
      f"config.train.num_first_steps: expected fewer than train.num_steps, "
      f"{total}, with method '{method}'; found "
      f"{fields['train.num_first_steps']}."
    )
  if fields["keep"] == "s" and (
    method != "bilevel" or fields["command"] in ("metatrain", "adapt")
  ):
    raise errors.UserError(
      "config.keep: only method 'bilevel' on one task can keep 's'; expected "
      f"'p' with method '{method}' and command '{fields['command']}'."
    )
  if fields["command"] not in ("metatrain", "adapt"):
    return
  for name in ("data.prompt", "data.format", "data.metric"):
    if fields[name]:
      raise errors.UserError(
        f"config.{name}: belongs to one task; expected none with many tasks."
      )
  if fields["command"] == "adapt":
    return
  if method not in methods.OVER_TASKS:
    raise errors.UserError(
      f"config.method: expected one of {', '.join(methods.OVER_TASKS)} over "
      f"many tasks; found '{method}'."
    )
  if method != "bilevel" and fields["meta.on_host"]:
    raise errors.UserError(
      "config.meta.on_host: only method 'bilevel' has adapters of each task; "
      f"expected False with '{method}'."
    )


def _check_guided(fields: _Fields) -> None:
  """Checks that a guided step has a LoRA to follow."""
  if fields["zo.direction"] != "guided":
    return
  method, kind = fields["method"], fields["adapter.kind"]
  if method != "bilevel":
    raise errors.UserError(
      "config.zo.direction: 'guided' follows the adapter s; expected method "
      f"'bilevel', or another direction; found '{method}'."
    )
  if kind != "lora":
    raise errors.UserError(
      "config.zo.direction: 'guided' needs an adapter that folds into the "
      f"weights; expected adapter.kind 'lora'; found '{kind}'."
    )
  if not fields["guided.random"] and (
    fields["zo.select"] or fields["zo.layers"]
  ):
    raise errors.UserError(
      "config.zo.select: with zo.direction 'guided', lora.targets name the "
      "weights that move; expected neither zo.select nor zo.layers, or a "
      "guided.random whose steps they select."
    )
  if fields["guided.batch_size"] and fields["guided.lengths"] == "all":
    raise errors.UserError(
      "config.guided.batch_size: guided.lengths 'all' evaluates nothing; "
      f"expected 0; found {fields['guided.batch_size']}."
    )
  lengths, history = fields["guided.lengths"], fields["guided.history"]
  if history > 1 and lengths != "descend":
    raise errors.UserError(
      f"config.guided.history: guided.lengths '{lengths}' has no lengths of "
      f"earlier displacements; expected 1, or 'descend'; found {history}."
    )
  if history > 1 and fields["command"] in ("metatrain", "adapt"):
    raise errors.UserError(
      "config.guided.history: over many tasks, displacements are those of "
      f"other tasks in every iteration; expected 1; found {history}."
    )


def _check_quantize(fields: _Fields) -> None:
  """Checks that nothing is to move integers."""
  kind, method = fields["model.quantize"], methods.METHODS[fields["method"]]
  if not kind:
    return
  if method.updates_base and not method.zeroth_order:
    raise errors.UserError(
      f"config.model.quantize: method '{fields['method']}' needs gradients of "
      "all weights, and integers have none; expected '' or another method, "
      f"such as 'bilevel', 'mezo' or 'peft'; found '{kind}'."
    )
  per_example = "per_example" in (
    fields["zo.direction"],
    fields["guided.random"],
  )
  if method.updates_base and per_example and kind != "int8":
    raise errors.UserError(
      "config.model.quantize: with zo.direction 'per_example' every row would "
      f"have dequantized weights of its own; expected 'int8'; found '{kind}'."
    )
  if method.updates_base and fields["zo.optimizer"] not in IN_PLACE:
    raise errors.UserError(
      f"config.model.quantize: zo.optimizer '{fields['zo.optimizer']}' needs "
      "gradients of all weights, and integers have none; expected '', or "
      f"zo.optimizer {' or '.join(map(repr, IN_PLACE))}; found '{kind}'."
    )


def _check_offload(fields: _Fields) -> None:
  """Checks that nothing of the size of all weights is to be on a device."""
  method = methods.METHODS[fields["method"]]
  if not fields["model.offload"] or not method.updates_base:
    return
  if not method.zeroth_order:
    raise errors.UserError(
      f"config.model.offload: method '{fields['method']}' needs gradients of "
      "all weights on the device; expected '' or another method, such as "
      "'bilevel', 'mezo' or 'peft'; found 'host'."
    )
  if fields["zo.optimizer"] not in IN_PLACE:
    raise errors.UserError(
      f"config.model.offload: zo.optimizer '{fields['zo.optimizer']}' needs "
      "trees of the size of all weights on the device; expected '', or "
      f"zo.optimizer {' or '.join(map(repr, IN_PLACE))}; found 'host'."
    )


def _check_write_every(fields: _Fields) -> None:
  """Checks that updates may be deferred: that nothing else reads theta."""
  number, method = fields["zo.write_every"], fields["method"]
  if number == 1:
    return
  direction = fields["zo.direction"]
  reason = ""
  if not fields["model.offload"]:
    reason = "weights on the device are written in every step"
  elif method not in ("bilevel", "mezo"):
    reason = f"method '{method}' is neither 'bilevel' nor 'mezo'"
  elif direction in ("guided", "per_example"):
    reason = f"zo.direction '{direction}' writes the weights in every step"
  elif methods.uses_reward(method, fields["zo.objective"]):
    reason = "rewards are those of answers by the weights of every step"
  if reason:
    raise errors.UserError(
      f"config.zo.write_every: {reason}; expected 1; found {number}."
    )


def _check_own_task(fields: _Fields) -> None:
  """Checks that the parts of a new task come with its prompt."""
  if fields["data.pack"] and "prompt" in str(fields["adapter.kind"]).split("+"):
    raise errors.UserError(
      "config.data.pack: the virtual tokens of adapter.kind 'prompt' begin a "
      "row, not each of its documents; expected another adapter, or False."
    )
  if fields["data.prompt"] and fields["data.format"]:
    raise errors.UserError(
      "config.data.format: rows of a format need no prompt; expected none with "
      f"data.prompt; found '{fields['data.format']}'."
    )
  if not fields["data.label"] and (
    fields["data.shots"] or fields["command"] != "train"
  ):
    raise errors.UserError(
      "config.data.label: expected a column, which data.shots and commands "
      "other than 'train' read; found ''."
    )
  given = {
    name: fields[f"data.{name}"]
    for name in ("options", "labels", "label")
    if fields[f"data.{name}"] and fields[f"data.{name}"] != "label"
  }
  if given and not fields["data.prompt"]:
    name, value = next(iter(given.items()))
    raise errors.UserError(
      f"config.data.{name}: belongs to a task of one's own, which "
      f"config.data.prompt begins; found {value!r} without it."
    )


def _check_stream(fields: _Fields) -> None:
  """Checks that a set of the hub is not to be read whole."""
  if not fields["data.stream"]:
    return
  place = fields["data.dir"]
  if place and not place.startswith("hub:"):
    raise errors.UserError(
      f"config.data.stream: rows are drawn from a set of the hub while it is "
      f"downloaded, and data.dir is '{place}'; expected False, or "
      "hub:OWNER/NAME."
    )
  if fields["data.shots"] or fields["data.order"] == "content":
    name = "shots" if fields["data.shots"] else "order"
    raise errors.UserError(
      f"config.data.stream: data.{name} needs every row; expected False; "
      "found True."
    )


def _check_zo_parts(fields: _Fields) -> None:
  """Checks the objective of theta and the selection of its weights."""
  objective = fields["zo.objective"]
  if ":" not in objective and objective not in OBJECTIVES:
    raise errors.UserError(
      f"config.zo.objective: expected one of {', '.join(OBJECTIVES)} or "
      f"MODULE:SCORE; found '{objective}'."
      f"{errors.nearest(objective, OBJECTIVES)}"
    )
  if objective != "loss" and fields["zo.estimator"] == "exact":
    raise errors.UserError(
      f"config.zo.objective: '{objective}' has no derivative for zo.estimator "
      "'exact'; expected 'loss', or the estimator 'central' or 'forward'."
    )
  if objective == "macro_f1" and fields["zo.direction"] == "per_example":
    raise errors.UserError(
      "config.zo.objective: 'macro_f1' is of a whole batch, and zo.direction "
      "'per_example' evaluates its rows one by one; expected another objective "
      "or direction."
    )
  if objective == "macro_f1" and fields["command"] == "metatrain":
    raise errors.UserError(
      "config.zo.objective: 'macro_f1' is of the labels of one task; expected "
      "'loss' or 'accuracy' with command 'metatrain'."
    )
  _check_pattern(fields, "zo.select")
  if fields["zo.optimizer"] == "adamw" and (
    fields["zo.select"] or fields["zo.layers"]
  ):
    raise errors.UserError(
      "config.zo.optimizer: 'adamw' decays every weight, those that "
      "zo.select or zo.layers keep as well; expected another."
    )


def _check_zo(fields: _Fields) -> None:
  """Checks for choices of the zeroth-order step that exclude each other."""
  _check_zo_parts(fields)
  one_value = (
    fields["zo.estimator"] in ONE_POINT and fields["zo.num_directions"] == 1
  )
  if fields["zo.scaling"] == "std" and one_value:
    raise errors.UserError(
      "config.zo.scaling: 'std' needs several values; expected zo.estimator "
      f"'central' or more zo.num_directions; found "
      f"'{fields['zo.estimator']}' and 1."
    )
  if fields["zo.optimizer"] == "conservative" and (
    fields["zo.num_directions"] > 1 or fields["zo.direction"] == "per_example"
  ):
    raise errors.UserError(
      "config.zo.optimizer: 'conservative' takes one direction a step; found "
      f"{fields['zo.num_directions']} of kind '{fields['zo.direction']}'."
    )
  if (
    fields["zo.direction"] == "per_example" and fields["zo.num_directions"] > 1
  ):
    raise errors.UserError(
      "config.zo.num_directions: 'per_example' takes one an example; expected "
      f"1; found {fields['zo.num_directions']}."
    )
  if fields["zo.optimizer"] == "conservative" and (
    fields["zo.clip"] or fields["zo.scaling"] != "none"
  ):
    raise errors.UserError(
      "config.zo.optimizer: 'conservative' scales no coefficients; expected "
      f"zo.scaling 'none' and zo.clip 0; found '{fields['zo.scaling']}' and "
      f"{fields['zo.clip']}."
    )
  if fields["zo.weight_decay"] and fields["zo.optimizer"] != "sgd":
    raise errors.UserError(
      "config.zo.weight_decay: only zo.optimizer 'sgd' takes it; found "
      f"{fields['zo.weight_decay']} with '{fields['zo.optimizer']}'."
    )


def _check_ckpt(fields: _Fields) -> None:
  """Checks that a ledger can rebuild theta, and names of fields."""
  optimizer, method = fields["zo.optimizer"], fields["method"]
  rarely = fields["ckpt.base_every_steps"]
  if rarely and not (
    methods.METHODS[method].updates_base
    and methods.METHODS[method].zeroth_order
  ):
    raise errors.UserError(
      f"config.ckpt.base_every_steps: expected 0 with method '{method}', whose "
      f"theta the ledger says nothing of; found {rarely}."
    )
  if rarely and fields["zo.direction"] == "guided":
    raise errors.UserError(
      "config.ckpt.base_every_steps: a guided step moves theta along factors, "
      "which the ledger does not hold; expected 0 with zo.direction 'guided'; "
      f"found {rarely}."
    )
  if rarely and optimizer not in IN_PLACE:
    raise errors.UserError(
      "config.ckpt.base_every_steps: only zo.optimizer "
      f"{' or '.join(IN_PLACE)} can be taken again from the ledger; expected 0 "
      f"with '{optimizer}'; found {rarely}."
    )
  for name in fields["ckpt.may_change"]:
    if name not in fields and name not in INPUTS:
      raise errors.UserError(
        f"config.ckpt.may_change: there is no field '{name}'."
        f"{errors.nearest(str(name), [*fields, *INPUTS])}"
      )


def _check_adapter(fields: _Fields) -> None:
  """Checks the kinds of adapters, and for fields that they would ignore."""
  adapters, kinds = defaults.ADAPTERS, str(fields["adapter.kind"]).split("+")
  for kind in kinds:
    if kind not in adapters or kinds.count(kind) > 1:
      raise errors.UserError(
        f"config.adapter.kind: expected one or more of {', '.join(adapters)}, "
        f"each once, joined by '+'; found '{fields['adapter.kind']}'."
        + ("" if kind in adapters else errors.nearest(kind, adapters))
      )
  if fields["lora.dropout"] >= 1:
    raise errors.UserError(
      f"config.lora.dropout: expected less than 1; found "
      f"{fields['lora.dropout']}."
    )
  if fields["prefix.projection"] and fields["prefix.init"] != "random":
    raise errors.UserError(
      "config.prefix.projection: a computed prefix cannot start from tokens; "
      f"expected prefix.init 'random'; found '{fields['prefix.init']}'."
    )
  if bool(fields["prompt.text"].strip()) != (fields["prompt.init"] == "text"):
    raise errors.UserError(
      "config.prompt.text: expected words with prompt.init 'text', and only "
      f"then; found '{fields['prompt.text']}' with '{fields['prompt.init']}'."
    )


def _check_generate(fields: _Fields) -> None:
  """Checks for ways to generate that exclude each other."""
  if fields["generate.top_p"] > 1:
    raise errors.UserError(
      "config.generate.top_p: expected more than 0 and at most 1; found "
      f"{fields['generate.top_p']}."
    )
  if fields["generate.num_beams"] > 1 and fields["generate.temperature"]:
    raise errors.UserError(
      "config.generate.num_beams: beam search draws nothing; expected "
      f"generate.temperature 0; found {fields['generate.temperature']} with "
      f"{fields['generate.num_beams']} beams."
    )
  if not fields["generate.temperature"] and (
    fields["generate.top_k"] or fields["generate.top_p"] < 1
  ):
    raise errors.UserError(
      "config.generate.temperature: top_k and top_p need more than 0; found "
      f"0 with top_k {fields['generate.top_k']} and top_p "
      f"{fields['generate.top_p']}."
    )
  if (
    fields["generate.length_penalty"] != 1 and fields["generate.num_beams"] == 1
  ):
    raise errors.UserError(
      "config.generate.length_penalty: only beam search takes it; expected 1, "
      f"or more generate.num_beams; found {fields['generate.length_penalty']}."
    )
  for text in fields["generate.stop"]:
    if not isinstance(text, str) or not text:
      raise errors.UserError(
        "config.generate.stop: expected texts that are not empty; found "
        f"{text!r}."
      )
