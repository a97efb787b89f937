"""Reads data sets of the Hugging Face hub.

The package `datasets` reads every repository that holds data. One that holds a
loading script, which it no longer runs, is read from the hub's converted copy:
Parquet files in a folder for each configuration, on a branch of their own.
"""

import functools
import importlib
import itertools
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from zofo_jax import errors, tasks
from zofo_jax.data import files, layouts

CONVERTED = "refs/convert/parquet"
# What `datasets` says of scripts; the second once an older call has left a
# converted copy in its cache.
_IS_SCRIPT = re.compile(r"scripts are no longer|Couldn't find cache for")
# What it says where its cache has lost a table, which it can make again.
_LOST_TABLE = "Failed to open local file"
# Folders of a data set's only configuration on the converted branch.
_ONLY_CONFIG = ("default", "plain_text")


class HubSet(NamedTuple):
  """A data set of the hub.

  Attributes:
    name: its id, as "owner/name".
    config: its configuration; None for the only one.
    revision: branch, tag or commit; None for the latest.
  """

  name: str
  config: str | None = None
  revision: str | None = None


class Stream(NamedTuple):
  """How rows are drawn from the part of a set that is downloaded.

  Attributes:
    seed: of the draw.
    num_rows: number of rows.
    buffer: rows among which the next one is drawn.
  """

  seed: int
  num_rows: int
  buffer: int = 10_000


def resolve(
  task: tasks.Task, source: str | pathlib.Path | None
) -> HubSet | None:
  """Returns the data set that a source names, or None for a local one.

  Args:
    task: its default data set is meant if there is no source.
    source: as for `sources.load`.

  Raises:
    UserError: the task has no default, or the source is no valid id.
  """
  if source is None:
    if task.hub is None:
      raise errors.UserError(
        f"Task {task.name} has no hub set; give data.dir a file or folder."
      )
    return HubSet(*task.hub)
  if not isinstance(source, str) or not source.startswith("hub:"):
    return None
  parts = re.fullmatch(
    r"hub:([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?:@([\w./-]+))?", source
  )
  if not parts:
    raise errors.UserError(
      f"Data source '{source}' is no hub id; expected hub:owner/name or "
      "hub:owner/name/config, and perhaps @revision."
    )
  return HubSet(parts[1], parts[2], parts[3])


def read(
  task: tasks.Task,
  hub: HubSet,
  split: str,
  choose: files.Choose | None = None,
  stream: Stream | None = None,
) -> list[files.Item]:
  """Reads the rows of a split.

  Args:
    task: has the split's name on the hub.
    hub: the data set.
    split: "train", "validation" or "test".
    choose: which rows are read, and in what order; None for all.
    stream: draws rows instead while they are downloaded, unless the set is a
      script.

  Raises:
    UserError: the split cannot be read.
  """
  name = task.hub_splits.get(split, split)
  what = f"split '{name}' of '{hub[0]}'"
  prefix = "/".join(filter(None, (*hub, name)))
  table = None
  if not _is_converted(task, hub):
    options = {} if stream is None else {"streaming": True}
    table = _call_datasets("load_dataset", hub, what, split=name, **options)
  if table is not None and stream is not None:
    return _drawn(table, stream, prefix, what)
  indices: np.ndarray | None = None

  def remember(total):
    nonlocal indices
    indices = choose(total) if choose else None
    return indices

  rows: Iterable[Mapping[str, Any]]
  if table is None:
    paths = _converted_files(task, hub, split, what)
    items = files.read_all(paths, remember)
    rows = [item.fields for item in items if isinstance(item, tasks.Row)]
  else:
    chosen = remember(len(table))
    # Indexing reads a row at a time; iteration reads all in larger parts.
    rows = table if chosen is None else (table[i] for i in chosen.tolist())
  numbers = itertools.count() if indices is None else indices.tolist()
  return [
    tasks.Row(dict(fields), f"{prefix} row {number + 1}")
    for number, fields in zip(numbers, rows)
  ]


def _drawn(
  table: Any, stream: Stream, prefix: str, what: str
) -> list[files.Item]:
  """Draws rows of an `IterableDataset`."""
  shuffled = table.shuffle(seed=stream.seed, buffer_size=stream.buffer)
  try:
    rows = list(shuffled.take(stream.num_rows))
  except Exception as error:  # Network libraries raise many exceptions.
    raise _unreadable(what, error) from error
  return [
    tasks.Row(dict(fields), f"{prefix}, row {number} drawn")
    for number, fields in enumerate(rows, 1)
  ]


def columns(
  task: tasks.Task, hub: HubSet, *, stream: bool = False
) -> tuple[str, ...]:
  """Returns the columns of a row to train on; as `read`."""
  items = read(
    task,
    hub,
    "train",
    lambda total: np.arange(min(total, 1)),
    Stream(seed=0, num_rows=1, buffer=1) if stream else None,
  )
  for item in items:
    if isinstance(item, tasks.Row):
      return tuple(item.fields)
  raise errors.UserError(f"{hub.name}: there are no rows to train on.")


def has_split(task: tasks.Task, hub: HubSet, split: str) -> bool:
  """Returns whether a data set has a split, without reading its rows."""
  name = task.hub_splits.get(split, split)
  names = None
  what = f"splits of '{hub[0]}'"
  if not _is_converted(task, hub):
    names = _call_datasets("get_dataset_split_names", hub, what)
  if names is None:
    return bool(layouts.find(_converted(hub, what), task, split))
  return name in names


def find_splits(task: tasks.Task) -> list[str]:
  """Returns the hub's names of the splits of a task's default data set.

  Reads no rows, and of a converted copy only the names of its files.

  Args:
    task: a task with a data set on the hub.

  Raises:
    UserError: the data set cannot be loaded, or has no rows to train on.
  """
  assert task.hub is not None
  name, config = task.hub
  what = f"splits of '{name}'"
  names = None
  if not task.hub_script:
    names = _call_datasets("get_dataset_split_names", HubSet(*task.hub), what)
  if names is None:
    import huggingface_hub  # Imported here because it is slow to import.

    try:
      paths = huggingface_hub.list_repo_files(
        name, repo_type="dataset", revision=CONVERTED
      )
    except Exception as error:  # Network libraries raise many exceptions.
      raise _unreadable(what, error) from error
    folders = (config,) if config else _ONLY_CONFIG
    parts = [path.split("/") for path in paths]
    names = list(dict.fromkeys(p[1] for p in parts if p[0] in folders))
  train = task.hub_splits.get("train", "train")
  if train not in names:
    raise errors.UserError(
      f"Cannot read {what} from the hub: there is no '{train}' among "
      f"{', '.join(names) or 'no splits'}."
    )
  return names


def _is_converted(task: tasks.Task, hub: HubSet) -> bool:
  """Returns whether a data set is known to be a script."""
  return task.hub_script and hub == (*(task.hub or ()), None)


def _call_datasets(name: str, hub: HubSet, what: str, **options: Any) -> Any:
  """Calls a function of the package `datasets`; None if the set is a script."""
  try:
    datasets = importlib.import_module("datasets")
  except ImportError as error:
    raise errors.UserError(
      f"Reading {what} from the hub needs the package datasets; or point "
      "data.dir at a folder of JSONL files."
    ) from error
  if hub.revision:
    options["revision"] = hub.revision
  call = functools.partial(getattr(datasets, name), hub.name, hub.config)
  try:
    try:
      return call(**options)
    except FileNotFoundError as error:
      if _LOST_TABLE not in str(error):
        raise
      return call(**options, download_mode="reuse_cache_if_exists")
  except Exception as error:  # Its exceptions share no base class.
    if _IS_SCRIPT.search(str(error)) and not hub.revision:
      return None
    raise _unreadable(what, error) from error


def _unreadable(what: str, error: Exception) -> errors.UserError:
  return errors.UserError(
    f"Cannot read {what} from the hub: {errors.first_line(error)}"
  )


def _converted_files(
  task: tasks.Task, hub: HubSet, split: str, what: str
) -> list[pathlib.Path]:
  """Returns the files of a split on the converted branch."""
  paths = layouts.find(_converted(hub, what), task, split)
  if not paths:
    raise errors.UserError(
      f"Cannot read {what} from the hub: its branch {CONVERTED} has no "
      f"such split of {hub[1] or 'a single configuration'}."
    )
  return paths


def _converted(hub: HubSet, what: str) -> pathlib.Path:
  """Returns the folder of a converted copy, from the hub or its cache."""
  import huggingface_hub  # Imported here because it is slow to import.

  folders = (hub.config,) if hub.config else _ONLY_CONFIG
  try:
    # Without a connection, this is a complete copy in the cache.
    place = huggingface_hub.snapshot_download(
      hub.name,
      repo_type="dataset",
      revision=CONVERTED,
      allow_patterns=[f"{folder}/*.parquet" for folder in folders],
    )
  except Exception as error:  # Network libraries raise many exceptions.
    raise _unreadable(what, error) from error
  present = [f for f in folders if pathlib.Path(place, f).is_dir()]
  return pathlib.Path(place, *present[:1])
