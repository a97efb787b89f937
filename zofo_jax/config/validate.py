"""The checks of a config: a value that cannot be meant stops a run at once.

Each says in one sentence which field, what was found and what was expected.
"""

import re
from typing import Any

import ml_collections

from zofo_jax import errors
from zofo_jax.config import defaults, methods

OPTIMIZERS = ("sgd", "momentum", "adam", "adamw")
SCHEDULES = ("constant", "linear", "cosine")
DIRECTIONS = ("gaussian", "rademacher", "low_rank", "per_example", "sparse")
SCALINGS = ("none", "sign", "std", "running_rms")
ZO_OPTIMIZERS = (*OPTIMIZERS, "conservative")
IN_PLACE = ("sgd", "conservative")  # of them, those that write in place
ESTIMATORS = ("central", "forward", "exact")
OBJECTIVES = ("loss", "accuracy", "token_f1")
LOSSES = ("likelihood", "classification")
DTYPES = ("float32", "bfloat16")
TRACKERS = ("tensorboard", "wandb", "mlflow")
COMMANDS = ("train", "icl", "probe", "head", "metatrain", "adapt")

CHOICES = {
  "command": COMMANDS,
  "method": tuple(methods.METHODS),
  "penalty_schedule": ("constant", "linear"),
  "keep": ("p", "s"),
  "adapt.start": ("mean", "fresh"),
  "adapt.optimizer": OPTIMIZERS,
  "loss": LOSSES,
  "model.dtype": DTYPES,
  "lower.optimizer": OPTIMIZERS,
  "upper.optimizer": OPTIMIZERS,
  "zo.optimizer": ZO_OPTIMIZERS,
  "zo.scaling": SCALINGS,
  "lower.schedule": SCHEDULES,
  "upper.schedule": SCHEDULES,
  "zo.direction": DIRECTIONS,
  "zo.estimator": ESTIMATORS,
  "data.test_split": ("", "validation", "test"),
  "icl.calibration": ("none", "contextual", "domain"),
  "head.rows": ("labels", "all"),
  "data.long_rows": ("error", "truncate", "drop"),
  "prefix.init": ("tokens", "random"),
  "prompt.init": ("tokens", "random", "text"),
}

_POSITIVE = (
  "lora.rank",
  "prefix.length",
  "prompt.length",
  "lower.num_steps",
  "lower.batch_size",
  "upper.batch_size",
  "zo.num_directions",
  "zo.rank",
  "zo.frame_steps",
  "zo.threshold",
  "zo.eps",
  "data.num_lower",
  "data.num_upper",
  "data.num_test",
  "data.max_length",
  "train.num_steps",
  "train.num_first_steps",
  "train.eval_every_steps",
  "meta.num_tasks",
  "adapt.shots",
  "adapt.num_seeds",
  "adapt.num_steps",
  "adapt.batch_size",
  "icl.num_sets",
  "probe.c",
  "head.num_steps",
  "head.batch_size",
  "eval.batch_size",
  "generate.max_new_tokens",
  "generate.num_beams",
  "generate.top_p",
  "ckpt.keep",
)

_NOT_NEGATIVE = (
  "penalty",
  "lora.dropout",
  "prefix.projection",
  "lower.learning_rate",
  "upper.learning_rate",
  "zo.learning_rate",
  "zo.clip",
  "zo.weight_decay",
  "lower.clip_norm",
  "upper.clip_norm",
  "data.num_selection",
  "data.shots",
  "meta.size_power",
  "meta.weight_power",
  "adapt.learning_rate",
  "icl.num_shots",
  "head.learning_rate",
  "generate.temperature",
  "generate.top_k",
  "train.profile_steps",
  "train.max_nonfinite",
  "train.max_loss_ratio",
  "ckpt.base_every_steps",
)


def check(config: ml_collections.ConfigDict) -> None:
  """Stops on a value that cannot be meant.

  Raises:
    errors.UserError: names the field, what was found and what was expected.
  """
  fields = defaults.flat(config)
  for name, valid in CHOICES.items():
    found = fields[name]
    if found not in valid:
      raise errors.UserError(
        f"config.{name}: expected one of {', '.join(valid)}; found "
        f"'{found}'.{errors.nearest(str(found), valid)}"
      )
  for name in _POSITIVE:
    if not fields[name] > 0:
      raise errors.UserError(
        f"config.{name}: expected more than 0; found {fields[name]}."
      )
  for name in _NOT_NEGATIVE:
    if not fields[name] >= 0:
      raise errors.UserError(
        f"config.{name}: expected 0 or more; found {fields[name]}."
      )
  _check_zo(config)
  _check_method(config)
  _check_trackers(config.train.trackers)
  _check_own_task(config)
  _check_adapter(config)
  _check_generate(config.generate)
  _check_ckpt(config, fields)
  try:
    re.compile(config.lora.targets)
  except re.error as error:
    raise errors.UserError(
      "config.lora.targets: expected a regular expression; found "
      f"'{config.lora.targets}' ({error})."
    ) from error
  if not config.model.name:
    raise errors.UserError(
      "config.model.name: expected a hub id or a local folder; found nothing."
    )


def _check_trackers(names: Any) -> None:
  """Stops on dashboards that are not known."""
  for name in names:
    if name not in TRACKERS:
      raise errors.UserError(
        "config.train.trackers: expected some of "
        f"{', '.join(TRACKERS)}, as ('tensorboard',); found {name!r}."
        f"{errors.nearest(str(name), TRACKERS)}"
      )


def _check_method(config: ml_collections.ConfigDict) -> None:
  """Stops on fields that a method would ignore."""
  method = config.method
  if "mezo" in method and config.zo.direction == "per_example":
    raise errors.UserError(
      "config.zo.direction: 'per_example' goes with method 'bilevel'; expected "
      f"another with '{method}'."
    )
  if method == "mezo_peft" and (config.zo.select or config.zo.layers):
    raise errors.UserError(
      "config.zo.select: names weights of theta, as zo.layers does; expected "
      "neither with method 'mezo_peft', which moves an adapter."
    )
  total = config.train.num_steps
  if "_then_" in method and config.train.num_first_steps >= total:
    raise errors.UserError(
      f"config.train.num_first_steps: expected fewer than train.num_steps, "
      f"{total}, with method '{method}'; found {config.train.num_first_steps}."
    )
  if config.keep == "s" and (
    method != "bilevel" or config.command in ("metatrain", "adapt")
  ):
    raise errors.UserError(
      "config.keep: only method 'bilevel' on one task can keep 's'; expected "
      f"'p' with method '{method}' and command '{config.command}'."
    )
  if config.command != "metatrain":
    return
  if method not in methods.OVER_TASKS:
    raise errors.UserError(
      f"config.method: expected one of {', '.join(methods.OVER_TASKS)} over "
      f"many tasks; found '{method}'."
    )
  if method != "bilevel" and config.meta.on_host:
    raise errors.UserError(
      "config.meta.on_host: only method 'bilevel' has adapters of each task; "
      f"expected False with '{method}'."
    )
  if config.data.prompt:
    raise errors.UserError(
      "config.data.prompt: belongs to one task; expected none with many tasks."
    )


def _check_own_task(config: ml_collections.ConfigDict) -> None:
  """Stops on parts of a task of one's own that have no prompt to belong to."""
  given = {
    name: config.data[name]
    for name in ("options", "labels", "label")
    if config.data[name] and config.data[name] != "label"
  }
  if given and not config.data.prompt:
    name, value = next(iter(given.items()))
    raise errors.UserError(
      f"config.data.{name}: belongs to a task of one's own, which "
      f"config.data.prompt begins; found {value!r} without it."
    )


def _check_zo_parts(config: ml_collections.ConfigDict) -> None:
  """Stops on an objective or a choice of weights that cannot be meant."""
  objective = config.zo.objective
  if ":" not in objective and objective not in OBJECTIVES:
    raise errors.UserError(
      f"config.zo.objective: expected one of {', '.join(OBJECTIVES)} or "
      f"MODULE:SCORE; found '{objective}'."
      f"{errors.nearest(objective, OBJECTIVES)}"
    )
  if objective != "loss" and config.zo.estimator == "exact":
    raise errors.UserError(
      f"config.zo.objective: '{objective}' has no derivative for zo.estimator "
      "'exact'; expected 'loss', or the estimator 'central' or 'forward'."
    )
  try:
    re.compile(config.zo.select)
  except re.error as error:
    raise errors.UserError(
      "config.zo.select: expected a regular expression; found "
      f"'{config.zo.select}' ({error})."
    ) from error
  if config.zo.optimizer == "adamw" and (config.zo.select or config.zo.layers):
    raise errors.UserError(
      "config.zo.optimizer: 'adamw' decays every weight, those that "
      "zo.select or zo.layers keep as well; expected another."
    )


def _check_zo(config: ml_collections.ConfigDict) -> None:
  """Stops on choices that exclude each other; none is ever ignored."""
  _check_zo_parts(config)
  one_value = config.zo.estimator != "central" and config.zo.num_directions == 1
  if config.zo.scaling == "std" and one_value:
    raise errors.UserError(
      "config.zo.scaling: 'std' needs several values; expected zo.estimator "
      f"'central' or more zo.num_directions; found '{config.zo.estimator}' and "
      "1."
    )
  if config.zo.optimizer == "conservative" and (
    config.zo.num_directions > 1 or config.zo.direction == "per_example"
  ):
    raise errors.UserError(
      "config.zo.optimizer: 'conservative' takes one direction a step; found "
      f"{config.zo.num_directions} of kind '{config.zo.direction}'."
    )
  if config.zo.direction == "per_example" and config.zo.num_directions > 1:
    raise errors.UserError(
      "config.zo.num_directions: 'per_example' takes one an example; expected "
      f"1; found {config.zo.num_directions}."
    )
  if config.zo.optimizer == "conservative" and (
    config.zo.clip or config.zo.scaling != "none"
  ):
    raise errors.UserError(
      "config.zo.optimizer: 'conservative' scales no coefficients; expected "
      f"zo.scaling 'none' and zo.clip 0; found '{config.zo.scaling}' and "
      f"{config.zo.clip}."
    )
  if config.zo.weight_decay and config.zo.optimizer != "sgd":
    raise errors.UserError(
      "config.zo.weight_decay: only zo.optimizer 'sgd' takes it; found "
      f"{config.zo.weight_decay} with '{config.zo.optimizer}'."
    )


def _check_ckpt(
  config: ml_collections.ConfigDict, fields: dict[str, Any]
) -> None:
  """Stops on a theta that no ledger rebuilds, and on fields there are not."""
  optimizer, method = config.zo.optimizer, config.method
  rarely = config.ckpt.base_every_steps
  if rarely and not (
    methods.METHODS[method].updates_base
    and methods.METHODS[method].zeroth_order
  ):
    raise errors.UserError(
      f"config.ckpt.base_every_steps: expected 0 with method '{method}', whose "
      f"theta the ledger says nothing of; found {rarely}."
    )
  if rarely and optimizer not in IN_PLACE:
    raise errors.UserError(
      "config.ckpt.base_every_steps: only zo.optimizer "
      f"{' or '.join(IN_PLACE)} can be taken again from the ledger; expected 0 "
      f"with '{optimizer}'; found {rarely}."
    )
  for name in config.ckpt.may_change:
    if name not in fields:
      raise errors.UserError(
        f"config.ckpt.may_change: there is no field '{name}'."
        f"{errors.nearest(str(name), fields)}"
      )


def _check_adapter(config: ml_collections.ConfigDict) -> None:
  """Stops on adapters that there are not, and on fields they would ignore."""
  known, kinds = defaults.ADAPTERS, str(config.adapter.kind).split("+")
  for kind in kinds:
    if kind not in known or kinds.count(kind) > 1:
      raise errors.UserError(
        f"config.adapter.kind: expected one or more of {', '.join(known)}, "
        f"each once, joined by '+'; found '{config.adapter.kind}'."
        + ("" if kind in known else errors.nearest(kind, known))
      )
  if config.lora.dropout >= 1:
    raise errors.UserError(
      f"config.lora.dropout: expected less than 1; found {config.lora.dropout}."
    )
  if config.prefix.projection and config.prefix.init != "random":
    raise errors.UserError(
      "config.prefix.projection: a computed prefix cannot start from tokens; "
      f"expected prefix.init 'random'; found '{config.prefix.init}'."
    )
  if bool(config.prompt.text.strip()) != (config.prompt.init == "text"):
    raise errors.UserError(
      "config.prompt.text: expected words with prompt.init 'text', and only "
      f"then; found '{config.prompt.text}' with '{config.prompt.init}'."
    )


def _check_generate(options: ml_collections.ConfigDict) -> None:
  """Stops on ways to generate that exclude each other."""
  if options.top_p > 1:
    raise errors.UserError(
      "config.generate.top_p: expected more than 0 and at most 1; found "
      f"{options.top_p}."
    )
  if options.num_beams > 1 and options.temperature:
    raise errors.UserError(
      "config.generate.num_beams: beam search draws nothing; expected "
      f"generate.temperature 0; found {options.temperature} with "
      f"{options.num_beams} beams."
    )
  if not options.temperature and (options.top_k or options.top_p < 1):
    raise errors.UserError(
      "config.generate.temperature: top_k and top_p need more than 0; found "
      f"0 with top_k {options.top_k} and top_p {options.top_p}."
    )
  if options.length_penalty != 1 and options.num_beams == 1:
    raise errors.UserError(
      "config.generate.length_penalty: only beam search takes it; expected 1, "
      f"or more generate.num_beams; found {options.length_penalty}."
    )
  for text in options.stop:
    if not isinstance(text, str) or not text:
      raise errors.UserError(
        "config.generate.stop: expected texts that are not empty; found "
        f"{text!r}."
      )
