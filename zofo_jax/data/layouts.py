"""Finds the files of a split in a folder.

A split is one file (`train.jsonl`), several in order
(`train-00000-of-00002.parquet`) or a folder of them (`train/0000.parquet`), as
`hf download` and `datasets` leave them.
"""

import pathlib
import re
from collections.abc import Sequence

from zofo_jax import errors, tasks
from zofo_jax.data import files

SPLITS = ("train", "validation", "test")
# Other names of a split's files.
_ALIASES = {"validation": ("valid", "dev", "val")}
# Folders in which data sets of one configuration keep their files.
_SUBFOLDERS = ("", "data", "default", "plain_text")
_SHARD = r"(?P<number>\d+)(-of-(?P<total>\d+)(-[0-9a-f]+)?)?"


def find(
  source: pathlib.Path, task: tasks.Task, split: str
) -> list[pathlib.Path]:
  """Returns the files of a split, in order; [] if there are none.

  All splits are in the same folder: `source`, the folder of the task's name in
  it or that of its configuration on the hub, or one of their subfolders; the
  first that has any split.

  Args:
    source: the folder, or the common prefix of the files' names.
    task: names the folders.
    split: "train", "validation" or "test".

  Raises:
    UserError: two files have the same split, or a shard is missing.
  """
  if not source.is_dir():
    return _in_folder(source.parent, task, split, f"{source.name}_")
  names = ("", task.name, *filter(None, (task.hub or ())[1:]))
  for name in names:
    for subfolder in _SUBFOLDERS:
      folder = source / name / subfolder
      if any(_in_folder(folder, task, s) for s in SPLITS):
        return _in_folder(folder, task, split)
  return []


def _in_folder(
  folder: pathlib.Path, task: tasks.Task, split: str, prefix: str = ""
) -> list[pathlib.Path]:
  """Returns the files of the first of a split's names that a folder has."""
  if not folder.is_dir():
    return []
  hub_name = task.hub_splits.get(split, split)
  listed = sorted(folder.iterdir())
  for name in dict.fromkeys((split, *_ALIASES.get(split, ()), hub_name)):
    stem = re.escape(prefix + name)
    single = list(_matching(listed, stem))
    if len(single) > 1:
      raise errors.UserError(
        f"{folder} holds {' and '.join(p.name for p in single)}; expected one "
        f"file of the split '{split}'."
      )
    paths = (
      single
      or _shards(listed, rf"{stem}-(?=\d+-of-){_SHARD}")
      or (_shards_in(folder / name) if not prefix else [])
    )
    if paths:
      return paths
  return []


def _shards_in(folder: pathlib.Path) -> list[pathlib.Path]:
  if not folder.is_dir():
    return []
  return _shards(sorted(folder.iterdir()), rf"([a-z]+-)?{_SHARD}")


def _matching(
  paths: Sequence[pathlib.Path], stem: str
) -> dict[pathlib.Path, re.Match[str]]:
  """Returns the readable files whose name without ending matches."""
  matches = {}
  for path in paths:
    end = files.ending(path)
    match = re.fullmatch(stem, path.name.removesuffix(end), re.I)
    if end and match and path.is_file():
      matches[path] = match
  return matches


def _shards(paths: Sequence[pathlib.Path], stem: str) -> list[pathlib.Path]:
  """Returns all shards in order.

  Raises:
    UserError: one is missing, or there are two of a number.
  """
  matches = _matching(paths, stem)
  ordered = sorted(matches, key=lambda path: int(matches[path]["number"]))
  numbers = [int(matches[path]["number"]) for path in ordered]
  totals = {int(match["total"] or len(ordered)) for match in matches.values()}
  if ordered and (totals != {len(ordered)} or numbers != [*range(max(totals))]):
    raise errors.UserError(
      f"{ordered[0].parent} holds {', '.join(p.name for p in ordered[:12])}; "
      "expected all shards of a split, each once."
    )
  return ordered
