"""Sets of tasks by name, and their rows.

A name is a task's, a group's, or that of a file in which MetaICL lists tasks.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from zofo_jax import errors, tasks
from zofo_jax.builders import data as data_lib
from zofo_jax.builders import encoder as encoder_lib
from zofo_jax.data import batching, splits
from zofo_jax.tasks import groups

Split = Literal["train", "target"]
# The keys of MetaICL's files.
_METAICL = {"train": "train", "target": "test"}


class TaskSource(NamedTuple):
  """A task of a set, and where its rows are.

  Attributes:
    task: what its rows mean.
    folder: where its rows are, as `data.dir`; None for the hub.
  """

  task: tasks.Task
  folder: str | None


def resolve_tasks(
  names: Sequence[str],
  split: Split,
  field: str,
  *,
  folder: str | None,
  metaicl: str,
) -> list[TaskSource]:
  """Finds tasks by their names, each once.

  Args:
    names: of tasks, of groups, or `.json` files with MetaICL's lists "train"
      and "test".
    split: which tasks of a group or of a file.
    field: config field that holds the names, for messages.
    folder: `config.data.dir`.
    metaicl: k and seed in MetaICL's file names, `config.meta.metaicl`.

  Returns:
    The tasks, in order.

  Raises:
    UserError: a name is unknown, a task has no options, or there are no tasks.
  """
  sources: dict[str, TaskSource] = {}
  for name in names:
    for source in _tasks_of(name, split, field, folder, metaicl):
      sources.setdefault(source.task.name, source)
  if not sources:
    raise errors.UserError(
      f"config.{field}: expected names of tasks or groups; found nothing."
    )
  for source in sources.values():
    if source.task.kind == "generation":
      raise errors.UserError(
        f"config.{field}: task {source.task.name} is answered by generating "
        "text; expected tasks with options."
      )
  return list(sources.values())


def _tasks_of(
  name: str, split: Split, field: str, folder: str | None, metaicl: str
) -> Iterator[TaskSource]:
  if name.endswith(".json"):
    yield from _metaicl_split(pathlib.Path(name), split, field, folder, metaicl)
  elif name in groups.ALL:
    for task_name in getattr(groups.ALL[name], split):
      yield TaskSource(tasks.get(task_name), folder)
  elif name in tasks.ALL:
    yield TaskSource(tasks.get(name), folder)
  else:
    valid_names = [*groups.ALL, *tasks.ALL]
    raise errors.UserError(
      f"config.{field}: expected a task, a group ({', '.join(groups.ALL)}) or "
      f"a .json file of MetaICL; found '{name}'."
      f"{errors.nearest(name, valid_names)}"
    )


def _metaicl_split(
  path: pathlib.Path,
  split: Split,
  field: str,
  folder: str | None,
  metaicl: str,
) -> Iterator[TaskSource]:
  """Yields the tasks that a file of MetaICL's folder `config` lists."""
  try:
    names = json.loads(path.read_text())[_METAICL[split]]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise errors.UserError(
      f"config.{field}: expected a file with the lists 'train' and 'test', as "
      f"MetaICL's config/hr_to_lr.json; found '{path}' ({error!r})."
    ) from error
  if folder is None:
    raise errors.UserError(
      "config.data.dir: expected MetaICL's folder of data, with a folder for "
      "each task; found nothing."
    )
  for name in names:
    task = dataclasses.replace(tasks.get("meta_icl"), name=name)
    rows = pathlib.Path(folder) / name / f"{name}_{metaicl}"
    yield TaskSource(task, str(rows))


def check_held_out(
  trained: Sequence[TaskSource], targets: Sequence[TaskSource]
) -> None:
  """Raises if a target task is trained on.

  Raises:
    UserError: names it.
  """
  both = {s.task.name for s in trained} & {s.task.name for s in targets}
  if both:
    raise errors.UserError(
      "config.meta.target: expected tasks that are not trained on "
      f"(config.meta.train); found {', '.join(sorted(both))}."
    )


def load_examples(
  sources: Sequence[TaskSource],
  row_source: data_lib.RowSource,
  encoder: encoder_lib.Encoder,
) -> list[data_lib.Examples]:
  """Reads, divides and encodes the rows of every task.

  Args:
    sources: the tasks and their folders.
    row_source: how rows are divided; its folder is not used.
    encoder: encodes the rows.

  Raises:
    UserError: names the file and row that is wrong.
  """
  return [
    data_lib.load_examples(
      source.task, row_source._replace(folder=source.folder), encoder
    )
    for source in sources
  ]


def load_rows(
  source: TaskSource, row_source: data_lib.RowSource
) -> splits.Splits:
  """Reads and divides the rows of one task; see `load_examples`."""
  return row_source._replace(folder=source.folder).load(source.task)


def common_shape(shapes: Sequence[batching.Shape]) -> batching.Shape:
  """Returns the smallest shape that holds batches of every task."""
  return batching.Shape(*map(max, zip(*shapes, strict=True)))
