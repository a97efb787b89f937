"""The task of a run: a registered one, or one that the config declares."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import ml_collections

from zofo_jax import errors, tasks
from zofo_jax.evaluation import metrics


def load_task(config: ml_collections.ConfigDict) -> tasks.Task:
  """Returns the task that `config.data` names or declares.

  Args:
    config: the run's config; reads `data` and `loss`.

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
  else:
    task = _registered_task(data.task, data.metric)
  if task.kind == "generation" and config.loss != "likelihood":
    raise errors.UserError(
      f"config.loss: task {task.name} is answered by generating text; "
      f"expected 'likelihood'; found '{config.loss}'."
    )
  task.template(data.template)
  return task


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
  if name in tasks.ALL:
    raise errors.UserError(
      "config.data.prompt: declares a task of your own; expected a new name "
      f"in config.data.task; found '{name}', which is taken."
    )
  return tasks.custom(
    name,
    prompt=prompt,
    options=options,
    label=label,
    labels=labels,
    metric=metric,
  )
