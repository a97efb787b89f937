"""From a config to the task and the rows of a run.

What is cheap and can fail comes first: names, files, rows and lengths are
checked before any weight is read or anything is compiled.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_collections

from zofo_jax import errors, tasks
from zofo_jax.builders import model as model_lib
from zofo_jax.config import defaults
from zofo_jax.data import batching, encode_options, encode_prompts
from zofo_jax.data import splits as splits_lib
from zofo_jax.evaluation import metrics


class Examples(NamedTuple):
  """Encoded rows: D_p, D_f, those that choose a checkpoint, and the test's."""

  lower: list[encode_options.Example]
  upper: list[encode_options.Example]
  selection: list[encode_options.Example] | list[encode_prompts.Question]
  test: list[encode_options.Example] | list[encode_prompts.Question]


def load_task(config: ml_collections.ConfigDict) -> tasks.Task:
  """Looks the config's task up, or makes the one that its fields declare.

  Raises:
    UserError: no such task, a declaration that is broken, or a loss that the
      task cannot have.
  """
  task = _own_task(config) if config.data.prompt else _known_task(config)
  if task.kind == "generation" and config.loss != "likelihood":
    raise errors.UserError(
      f"config.loss: task {task.name} is answered by generating text; "
      f"expected 'likelihood'; found '{config.loss}'."
    )
  task.template(config.data.template)
  return task


def _known_task(config: ml_collections.ConfigDict) -> tasks.Task:
  """Looks a task up; its metric may be another than the usual."""
  task = tasks.get(config.data.task)
  metric = config.data.metric
  generated = task.kind == "generation"
  known = metrics.TEXT_METRICS if generated else metrics.METRICS
  if metric and metric not in known:
    raise errors.UserError(
      f"config.data.metric: expected one of {', '.join(known)}; found "
      f"'{metric}'.{errors.nearest(metric, known)}"
    )
  return dataclasses.replace(task, metric=metric) if metric else task


def _own_task(config: ml_collections.ConfigDict) -> tasks.Task:
  """Makes the task that the config declares."""
  name = config.data.task
  if name in tasks.ALL:
    raise errors.UserError(
      f"config.data.prompt: declares a task of one's own; expected a new name "
      f"in config.data.task, found '{name}', which there is."
    )
  return tasks.custom(
    name,
    prompt=config.data.prompt,
    options=config.data.options,
    label=config.data.label,
    labels=config.data.labels or None,
    metric=config.data.metric or None,
  )


def context_length(
  config: ml_collections.ConfigDict, model: model_lib.Model
) -> int:
  """Returns how many tokens fit beside what the adapters put in front.

  Raises:
    UserError: the adapters leave no place.
  """
  context = model.module.config.max_length
  taken = defaults.num_virtual(config)
  if taken >= context:
    raise errors.UserError(
      f"config.adapter.kind: '{config.adapter.kind}' takes {taken} positions; "
      f"expected fewer than the model's {context} (prefix.length, "
      "prompt.length)."
    )
  return context - taken


def max_train_length(
  config: ml_collections.ConfigDict, model: model_lib.Model
) -> int:
  """Returns the longest row in tokens: the config's, within the model's."""
  return min(config.data.max_length, context_length(config, model))


def max_eval_length(
  config: ml_collections.ConfigDict, model: model_lib.Model
) -> int:
  """Returns the longest row that is answered, in tokens.

  All that the model takes where rows that are trained on would be dropped.
  """
  if config.data.long_rows == "drop":
    return context_length(config, model)
  return max_train_length(config, model)


def load_rows(
  config: ml_collections.ConfigDict, task: tasks.Task
) -> splits_lib.Splits:
  """Reads and divides the rows of a run.

  Raises:
    UserError: names the file and row that is wrong.
  """
  counts = splits_lib.Counts(
    lower=config.data.num_lower,
    upper=config.data.num_upper,
    selection=config.data.num_selection,
    test=config.data.num_test,
  )
  return splits_lib.load_splits(
    task,
    config.data.dir,
    counts=counts,
    shots=config.data.shots,
    seed=config.data.seed,
    test_split=config.data.test_split or None,
  )


def load_examples(
  config: ml_collections.ConfigDict, model: model_lib.Model, task: tasks.Task
) -> Examples:
  """Reads, divides and encodes the rows of a run.

  D_p and D_f are the same rows, all of both, with `data.pooled` and for methods
  with one level.

  Test and selection rows are never dropped for their length: those that do
  not fit `data.max_length` still count, up to the model's own context.

  Args:
    config: the run's config; reads `config.data`, `config.method` and
      `config.loss`.
    model: gives the tokenizer and the longest row.
    task: the task.

  Returns:
    The encoded rows.

  Raises:
    UserError: names the file and row that is wrong.
  """
  splits = load_rows(config, task)
  lower = encode_train(config, model, task, splits.lower)
  upper = encode_train(config, model, task, splits.upper)
  if config.data.pooled or config.method != "bilevel":
    lower = upper = [*lower, *upper]
  return Examples(
    lower=lower,
    upper=upper,
    selection=encode_eval(config, model, task, splits.selection),
    test=encode_eval(config, model, task, splits.test),
  )


def encode_train(
  config: ml_collections.ConfigDict,
  model: model_lib.Model,
  task: tasks.Task,
  found: Sequence[tasks.Row],
) -> list[encode_options.Example]:
  """Encodes rows that are trained on.

  Raises:
    UserError: names the file and row that is wrong.
  """
  # Accuracy compares the options, whatever the loss.
  compared = config.zo.objective == "accuracy"
  mode: encode_options.Mode = "classification" if compared else config.loss
  return encode_options.encode_rows(
    task,
    found,
    model.tokenizer,
    mode,
    max_length=max_train_length(config, model),
    version=config.data.template,
    long_rows=config.data.long_rows,
  )


def encode_eval(
  config: ml_collections.ConfigDict,
  model: model_lib.Model,
  task: tasks.Task,
  found: Sequence[tasks.Row],
) -> list[Any]:
  """Encodes rows that are answered; none is dropped for its length.

  Raises:
    UserError: names the file and row that is wrong.
  """
  if task.kind == "generation":
    return load_questions(config, model, task, found)
  long_rows = config.data.long_rows
  return encode_options.encode_rows(
    task,
    found,
    model.tokenizer,
    "classification",
    max_length=max_eval_length(config, model),
    version=config.data.template,
    long_rows="error" if long_rows == "drop" else long_rows,
  )


def load_questions(
  config: ml_collections.ConfigDict,
  model: model_lib.Model,
  task: tasks.Task,
  asked: Sequence[tasks.Row],
  *,
  labelled: bool = True,
) -> list[encode_prompts.Question]:
  """Encodes rows that are answered by generating text.

  None is dropped for its length; see `load_examples`.

  Raises:
    UserError: a prompt leaves no room for its answer.
  """
  return encode_prompts.encode_questions(
    task,
    asked,
    model.tokenizer,
    max_length=question_length(config, model),
    version=config.data.template,
    truncate=config.data.long_rows == "truncate",
    labelled=labelled,
  )


def question_length(
  config: ml_collections.ConfigDict, model: model_lib.Model
) -> int:
  """Returns the longest prompt in tokens that leaves room for its answer.

  Raises:
    UserError: there is none.
  """
  room = encode_prompts.check_room(
    config.generate.max_new_tokens, context_length(config, model)
  )
  cut = config.data.long_rows == "truncate"
  return min(room, config.data.max_length) if cut else room


def train_shape(examples: Examples) -> batching.Shape:
  """Returns the one shape of all training batches."""
  return batching.shape_of([*examples.lower, *examples.upper], multiple=8)
