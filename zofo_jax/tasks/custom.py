"""Custom tasks, defined by plain values as in a config."""

import string
from collections.abc import Callable, Mapping, Sequence
from typing import get_args

from zofo_jax import errors
from zofo_jax.tasks.base import (
  Fields,
  Metric,
  OptionMetric,
  Task,
  Template,
  TextMetric,
  texts,
)


def custom(
  name: str,
  *,
  prompt: str,
  options: Sequence[str] = (),
  label: str = "label",
  labels: Sequence[str] | None = None,
  metric: Metric | None = None,
) -> Task:
  """Defines a task like the built-in ones.

  Args:
    name: name of the task.
    prompt: pattern such as "{review} It was"; braces name columns.
    options: one text per label, such as " bad". An option may name columns
      too, as in "{ending0}", for multiple choice. Empty for a task that is
      answered by generating text.
    label: column of the label. Without options: column of the answer, a text
      or a list of all accepted answers, which may be the entry "text" of a
      dictionary, as in SQuAD; empty if rows have no answer, and rewards alone
      score what is generated.
    labels: label values in the options' order, unless they are 0, 1, ...
    metric: how predictions are scored; None: accuracy, or token F1 without
      options.

  Returns:
    The task.

  Raises:
    UserError: a pattern is malformed, the metric does not fit the kind of
      task, there is only one option, or not one label per option, all
      different.

  Examples:
    >>> from zofo_jax import tasks
    >>> task = tasks.custom(
    ...   "mood", prompt="{text} I am", options=(" sad", " glad"))
    >>> task.prompt(tasks.Row({"text": "Rain.", "label": 0}, "row 1"))
    'Rain. I am'
  """
  columns = _columns(name, prompt, options)
  if len(options) == 1:
    raise errors.UserError(
      f"Task {name}: options has 1 entry; at least 2 expected, or none to "
      "generate the answer."
    )
  if labels is not None and len(labels) != len(options):
    raise errors.UserError(
      f"Task {name}: labels has {len(labels)} entries and options "
      f"{len(options)}; one label per option expected."
    )
  stripped = [str(value).strip() for value in labels or ()]
  if not all(stripped) or len({*stripped}) < len(stripped):
    raise errors.UserError(
      f"Task {name}: labels are {', '.join(map(repr, labels or ()))}; expected "
      "values that differ, none of them blank."
    )
  metrics = get_args(OptionMetric if options else TextMetric)
  metric = metric or ("accuracy" if options else "token_f1")
  if metric not in metrics:
    raise errors.UserError(
      f"Task {name}: metric is '{metric}'; expected one of "
      f"{', '.join(metrics)}.{errors.nearest(metric, metrics)}"
    )
  example = {column: f"<{column}>" for column in columns}
  if options and not label:
    raise errors.UserError(
      f"Task {name}: label is empty; expected the column of the labels, by "
      "which options are right or wrong."
    )
  if not label:
    return Task(
      name=name,
      templates=(Template(prompt, ()),),
      example=example,
      text=columns,
      label=None,
      metric=metric,
      kind="generation",
    )
  if not options:
    answers = _answers_of(label)
    return Task(
      name=name,
      templates=(Template(prompt, answers),),
      example={**example, label: ["<answer>"]},
      text=columns,
      other=(label,),
      label=lambda fields: range(len(answers(fields))),
      metric=metric,
      kind="generation",
    )
  varying = any("{" in option for option in options)
  return Task(
    name=name,
    templates=(Template(prompt, tuple(options)),),
    example=example,
    text=columns,
    label=label,
    labels=None if labels is None else tuple(map(str, labels)),
    metric=metric,
    kind="multiple choice" if varying else "classification",
  )


def _columns(name: str, prompt: str, options: Sequence[str]) -> tuple[str, ...]:
  """Returns the columns that the patterns name, without duplicates."""
  columns: list[str] = []
  for field, pattern in [
    ("prompt", prompt),
    *((f"options[{i}]", option) for i, option in enumerate(options)),
  ]:
    try:
      names = [f for _, f, _, _ in string.Formatter().parse(pattern)]
    except ValueError as error:
      raise errors.UserError(
        f"Task {name}: {field} {pattern!r} is not a pattern: {error}. Write "
        "columns as {column} and a real brace twice."
      ) from error
    for column in names:
      if column is None:
        continue
      if not column.isidentifier():
        raise errors.UserError(
          f"Task {name}: {field} {pattern!r} names the column '{column}'; "
          "expected a plain column name between braces."
        )
      if column not in columns:
        columns.append(column)
  if not columns:
    raise errors.UserError(
      f"Task {name}: prompt {prompt!r} names no column; write one as "
      "{column}."
    )
  return tuple(columns)


def _answers_of(column: str) -> Callable[[Fields], list[str]]:
  """Returns a function that reads a row's accepted answers.

  Every answer ends with the line break at which generation stops.
  """

  def answers(fields):
    value = fields[column]
    if isinstance(value, Mapping) and "text" in value:  # SQuAD's answers
      value = value["text"]
    if isinstance(value, str | int | float):
      value = [value]
    return [f" {answer}\n" for answer in dict.fromkeys(texts(value, column))]

  return answers
