"""The task of a run: a registered one, or one that the config declares."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import ml_collections

from zofo_jax import errors, tasks
from zofo_jax.builders import assets
from zofo_jax.config import methods
from zofo_jax.data import sources
from zofo_jax.evaluation import metrics, objectives

_log = logging.getLogger("zofo_jax")


def load_task(config: ml_collections.ConfigDict) -> tasks.Task:
  """Returns the task that `config.data` names or declares.

  Args:
    config: the run's config; reads `data`, `loss`, `method` and
      `zo.objective`. The format of the rows, if it is known by their columns,
      is stored in `data.format`.

  Raises:
    UserError: no such task, an invalid declaration, or a loss that the task
      does not support.
  """
  data = config.data
  if data.prompt:
    task = _declared_task(
      data.task,
      prompt=data.prompt,
      options=data.options,
      label=data.label,
      labels=data.labels or None,
      metric=data.metric or None,
    )
  elif data.format or (data.task not in tasks.ALL and data.dir):
    data.format = data.format or _find_format(data.task, data.dir, data.stream)
    _check_new(data.task, "format")
    rewarded = methods.uses_reward(config.method, config.zo.objective)
    if rewarded and data.format == "text":
      raise errors.UserError(
        "config.data.format: rewards score answers, and rows of 'text' have "
        "none; expected another format."
      )
    metric = data.metric or ("token_f1" if rewarded else None)
    task = tasks.formatted(data.task, data.format, metric=metric)
  else:
    task = _registered_task(data.task, data.metric)
  generated = task.kind in ("generation", "text")
  if generated and config.loss != "likelihood":
    raise errors.UserError(
      f"config.loss: task {task.name} is answered by generating text; "
      f"expected 'likelihood'; found '{config.loss}'."
    )
  if data.pack and not task.document:
    raise errors.UserError(
      f"config.data.pack: task {task.name} has a prompt; expected False, or "
      "rows of a data.format."
    )
  objective = config.zo.objective
  if data.pack and objective not in ("loss", "reward"):
    raise errors.UserError(
      "config.data.pack: a packed row has several answers, and zo.objective "
      f"compares one; expected False, or 'loss'; found '{objective}'."
    )
  if task.document and objective in objectives.OF_OPTIONS:
    raise errors.UserError(
      f"config.zo.objective: task {task.name} has no options; expected 'loss' "
      f"or 'token_f1'; found '{objective}'."
    )
  if objective == "macro_f1" and task.kind != "classification":
    raise errors.UserError(
      f"config.zo.objective: task {task.name} has no labels that its rows "
      "share; expected 'accuracy' or 'loss', or a task with such labels; found "
      "'macro_f1'."
    )
  task.template(data.template)
  return task


def check_answers(task: tasks.Task, *, reward: bool, alone: bool) -> None:
  """Checks that a task has the answers that a run needs.

  Args:
    task: the task.
    reward: whether the run is trained by rewards.
    alone: whether it is trained by nothing else.

  Raises:
    UserError: rewards would score options, or rows without answers are to be
      learned from.
  """
  if task.label is None and not alone:
    raise errors.UserError(
      "config.data.label: without a column of answers only methods 'es' and "
      "'es_peft' train; expected a column, or one of these methods."
    )
  if not reward:
    return
  if task.kind == "text":
    raise errors.UserError(
      "config.data.metric: rewards score generated text; expected token_f1, "
      f"exact_match or rouge_l; found '{task.metric}'."
    )
  if task.kind != "generation":
    raise errors.UserError(
      f"config.data.task: rewards score generated text, and '{task.name}' has "
      "options; expected a task without, as 'squad', or one of your own with "
      "data.prompt and no data.options."
    )


def _find_format(name: str, source: str, stream: bool) -> str:
  """Returns the format that the rows of a source have, by their columns."""
  assets.make(source)
  # Any format will do to find the rows.
  rows = tasks.formatted(name, "text")
  columns = sources.columns(rows, source, stream=stream)
  if form := tasks.recognise(columns):
    read = (*tasks.FORMATS[form].columns, *tasks.FORMATS[form].optional)
    if others := [column for column in columns if column not in read]:
      _log.warning(
        "%s: rows are read as data.format=%s, which has no column %s",
        *(name, form, ", ".join(others)),
      )
    return form
  problem = (
    f"config.data.task: there is no built-in task '{name}', and rows with the "
    f"columns {', '.join(columns)} "
  )
  suggestion = errors.nearest(name, tasks.ALL, 0.75)
  if "text" in columns:
    raise errors.UserError(
      f"{problem}may be texts or have labels; expected data.format=text to "
      "learn the texts, or data.prompt and data.options to learn the column "
      "label."
      f"{suggestion}"
    )
  formats = "; ".join(" and ".join(f.columns) for f in tasks.FORMATS.values())
  raise errors.UserError(
    f"{problem}have no known format; expected {formats}, or data.prompt."
    f"{suggestion}"
  )


def _check_new(name: str, field: str) -> None:
  if name in tasks.ALL:
    raise errors.UserError(
      f"config.data.{field}: declares a task of your own; expected a new name "
      f"in config.data.task; found '{name}', which is taken."
    )


def _registered_task(name: str, metric: Any) -> tasks.Task:
  """Looks a task up; a metric that is not empty replaces the task's own."""
  task = tasks.get(name)
  if not metric:
    return task
  generated = task.kind == "generation"
  valid_names = metrics.TEXT_METRICS if generated else metrics.METRICS
  if metric not in valid_names:
    raise errors.UserError(
      f"config.data.metric: expected one of {', '.join(valid_names)}; found "
      f"'{metric}'.{errors.nearest(metric, valid_names)}"
    )
  return dataclasses.replace(task, metric=metric)


def _declared_task(
  name: str,
  *,
  prompt: str,
  options: Sequence[str],
  label: str,
  labels: Sequence[str] | None,
  metric: Any,
) -> tasks.Task:
  """Makes a user's own task."""
  _check_new(name, "prompt")
  task = tasks.custom(
    name,
    prompt=prompt,
    options=options,
    label=label,
    labels=labels,
    metric=metric,
  )
  for option in options:
    if _ends_in_word(prompt) and _in_word(option[:1]):
      _log.warning(
        "config.data.options: %r follows the prompt, which ends in %r, without "
        "a space; expected %r if it is a word of its own.",
        option,
        prompt[-8:],
        f" {option}",
      )
      break
  return task


def _ends_in_word(prompt: str) -> bool:
  """Whether a pattern ends in a word, or in a column, which mostly does."""
  column = prompt.endswith("}") and not prompt.endswith("}}")
  return column or _in_word(prompt[-1:])


def _in_word(character: str) -> bool:
  """Whether it is a digit or a letter of a script that has upper case.

  Scripts without it may write words without spaces.
  """
  return character.isdigit() or character.islower() or character.isupper()
