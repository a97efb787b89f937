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
_ALIASES = {"validation": ("valid", "dev", "val", "eval", "evaluation")}
# Folders in which data sets of one configuration keep their files.
_SUBFOLDERS = ("", "data", "default", "plain_text")
_SHARD = r"(?P<number>\d+)(-of-(?P<total>\d+)(-[0-9a-f]+)?)?"


def find(
  source: pathlib.Path, task: tasks.Task, split: str
) -> list[pathlib.Path]:
  """Returns the files of a split, in order; [] if there are none.

  All splits are in the same folder: `source`, the folder of the task's name in
  it or that of its configuration on the hub, or one of their subfolders.

  Args:
    source: the folder, or the common prefix of the files' names.
    task: names the folders.
    split: "train", "validation" or "test".

  Raises:
    UserError: two files or folders have the same split, or a shard is missing.
  """
  if not source.is_dir():
    return _in_folder(source.parent, task, split, f"{source.name}_")
  names = ["", task.name]
  config = task.hub[1] if task.hub else None
  # Where the task has a folder of its own, another task's is not a candidate.
  is_other = config in tasks.ALL and (source / task.name).is_dir()
  if config and not is_other:
    names.append(config)
  folders = dict.fromkeys(source / n / s for n in names for s in _SUBFOLDERS)
  chosen: dict[str, list[pathlib.Path]] = {}
  for folder in folders:
    splits = {s: _in_folder(folder, task, s) for s in SPLITS}
    for name, paths in splits.items():
      if paths and chosen.get(name):
        raise _several(source, [chosen[name], paths], name)
    if not chosen and any(splits.values()):
      chosen = splits
  paths = chosen.get(split, [])
  # The only split of some sets is called "test", and is the one to train on.
  return [] if split != "train" and paths == chosen.get("train") else paths


def unread(source: pathlib.Path, task: tasks.Task) -> list[pathlib.Path]:
  """Returns files that are named like those of splits, but are in none."""
  used = {path for split in SPLITS for path in find(source, task, split)}
  names = (*SPLITS, *(name for names in _ALIASES.values() for name in names))
  return [
    path
    for folder in {path.parent for path in used}
    for path in sorted(folder.iterdir())
    if path not in used
    and files.ending(path)
    and path.name.lower().startswith(names)
  ]


def documents(source: pathlib.Path) -> list[pathlib.Path]:
  """Returns a folder's files of plain text, if it has no other data."""
  listed = sorted(source.iterdir()) if source.is_dir() else []
  paths = [path for path in listed if files.ending(path)]
  return paths if all(map(files.is_plain, paths)) else []


def _in_folder(
  folder: pathlib.Path, task: tasks.Task, split: str, prefix: str = ""
) -> list[pathlib.Path]:
  """Returns the files of a split, under any of its names."""
  if not folder.is_dir():
    return []
  listed = sorted(folder.iterdir())

  def candidates(name):
    stem = re.escape(prefix + name)
    yield from ([path] for path in _matching(listed, stem))
    yield _shards(listed, rf"{stem}-(?=\d+-of-){_SHARD}")
    if not prefix:
      yield _shards_in(folder / name)

  names = (split, *_ALIASES.get(split, ()))
  matches = [*filter(None, (c for name in names for c in candidates(name)))]
  if not matches and task.hub_splits.get(split):
    matches = [*filter(None, candidates(task.hub_splits[split]))]
  if len(matches) > 1:
    raise _several(folder, matches, split)
  return matches[0] if matches else []


def _several(
  folder: pathlib.Path, matches: Sequence[Sequence[pathlib.Path]], split: str
) -> errors.UserError:
  names = " and ".join(str(paths[0].relative_to(folder)) for paths in matches)
  return errors.UserError(
    f"{folder} holds {names}; expected one file of the split '{split}', or "
    "one set of numbered files."
  )


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
