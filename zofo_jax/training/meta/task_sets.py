"""From a config to many tasks and their rows.

A name is a task's, a group's, or a file in which MetaICL lists a split.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import ml_collections

from zofo_jax import errors, tasks
from zofo_jax.builders import data as data_lib
from zofo_jax.builders import model as model_lib
from zofo_jax.data import batching, splits
from zofo_jax.tasks import groups

Split = Literal["train", "target"]
# The keys of MetaICL's files.
_METAICL = {"train": "train", "target": "test"}


class TaskSource(NamedTuple):
  """A task among others.

  Attributes:
    task: what its rows mean.
    source: where its rows are, as `data.dir`; None for the hub.
  """

  task: tasks.Task
  source: str | None


def resolve_tasks(
  config: ml_collections.ConfigDict,
  names: Sequence[str],
  side: Split,
  field: str,
) -> list[TaskSource]:
  """Finds tasks by their names, each once.

  Args:
    config: reads `data.dir` and `meta.metaicl`.
    names: of tasks, of groups, or `.json` files with MetaICL's lists "train"
      and "test".
    side: which tasks of a group.
    field: where the names come from, for complaints.

  Returns:
    The tasks, in order.

  Raises:
    UserError: a name is unknown, a task has no options, or there is none.
  """
  found: dict[str, TaskSource] = {}
  for name in names:
    for member in _members_of(config, name, side, field):
      found.setdefault(member.task.name, member)
  if not found:
    raise errors.UserError(
      f"config.{field}: expected names of tasks or groups; found nothing."
    )
  for member in found.values():
    if member.task.kind == "generation":
      raise errors.UserError(
        f"config.{field}: task {member.task.name} is answered by generating "
        "text; expected tasks with options."
      )
  return list(found.values())


def _members_of(
  config, name: str, side: Split, field: str
) -> Iterator[TaskSource]:
  if name.endswith(".json"):
    yield from _metaicl_split(config, pathlib.Path(name), side, field)
  elif name in groups.ALL:
    for each in getattr(groups.ALL[name], side):
      yield TaskSource(tasks.get(each), config.data.dir)
  elif name in tasks.ALL:
    yield TaskSource(tasks.get(name), config.data.dir)
  else:
    known = [*groups.ALL, *tasks.ALL]
    raise errors.UserError(
      f"config.{field}: expected a task, a group ({', '.join(groups.ALL)}) or "
      f"a .json file of MetaICL; found '{name}'.{errors.nearest(name, known)}"
    )


def _metaicl_split(
  config: ml_collections.ConfigDict,
  path: pathlib.Path,
  side: Split,
  field: str,
) -> Iterator[TaskSource]:
  """Yields the tasks that a file of MetaICL's folder `config` lists."""
  try:
    names = json.loads(path.read_text())[_METAICL[side]]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise errors.UserError(
      f"config.{field}: expected a file with the lists 'train' and 'test', as "
      f"MetaICL's config/hr_to_lr.json; found '{path}' ({error!r})."
    ) from error
  if config.data.dir is None:
    raise errors.UserError(
      "config.data.dir: expected MetaICL's folder of data, with a folder for "
      "each task; found nothing."
    )
  for name in names:
    task = dataclasses.replace(tasks.get("meta_icl"), name=name)
    folder = pathlib.Path(config.data.dir) / name
    yield TaskSource(task, str(folder / f"{name}_{config.meta.metaicl}"))


def check_held_out(
  trained: Sequence[TaskSource], targets: Sequence[TaskSource]
) -> None:
  """Stops on a target task that is trained on.

  Raises:
    UserError: names it.
  """
  both = {m.task.name for m in trained} & {m.task.name for m in targets}
  if both:
    raise errors.UserError(
      "config.meta.target: expected tasks that are not trained on "
      f"(config.meta.train); found {', '.join(sorted(both))}."
    )


def _own(
  config: ml_collections.ConfigDict, member: TaskSource
) -> ml_collections.ConfigDict:
  own = config.copy_and_resolve_references()
  own.data.dir = member.source
  return own


def load_examples(
  config: ml_collections.ConfigDict,
  model: model_lib.Model,
  found: Sequence[TaskSource],
) -> list[data_lib.Examples]:
  """Reads, divides and encodes the rows of every task.

  Raises:
    UserError: names the file and row that is wrong.
  """
  return [
    data_lib.load_examples(_own(config, member), model, member.task)
    for member in found
  ]


def load_rows(
  config: ml_collections.ConfigDict, member: TaskSource
) -> splits.Splits:
  """Reads and divides the rows of a task; see `experiment.load_rows`."""
  return data_lib.load_rows(_own(config, member), member.task)


def common_shape(shapes: Sequence[batching.Shape]) -> batching.Shape:
  """Returns the least sizes that hold batches of every task."""
  return batching.Shape(*map(max, zip(*shapes, strict=True)))
