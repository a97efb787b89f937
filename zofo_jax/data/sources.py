"""Reads rows of labelled data from files, folders and the Hugging Face hub.

Every row keeps its file and row number, so that error messages can name them.
"""

import csv
import importlib
import json
import logging
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from zofo_jax import errors, tasks

_CONVERTED = "refs/convert/parquet"
# Split -> base names of files that may hold it.
_SPLITS = {"validation": ("validation", "valid", "dev", "val")}


def load(
  task: tasks.Task,
  source: str | pathlib.Path | None,
  split: str,
  *,
  labelled: bool = True,
) -> list[tasks.Row]:
  """Reads and checks every row of a split.

  Args:
    task: defines which columns a row must have and checks each row.
    source: one of: a folder with `<split>.jsonl`, `.csv` or `.parquet`, or
      with a subfolder of the task's name that has them; the common prefix of
      such files, as MetaICL names them (`DIR/mrpc_16_100` for
      `mrpc_16_100_<split>.jsonl`); a single file, which is the split "train";
      "hub:owner/name" or "hub:owner/name/config"; None for the task's default
      data set on the hub.
    split: "train", "validation" or "test".
    labelled: False for rows to be predicted, which need no label.

  Returns:
    The rows, in the file's order.

  Raises:
    UserError: there is no such data, or a row is invalid; names file and row.
  """
  hub = _hub_id(task, source)
  if hub:
    name = "/".join(filter(None, hub))
    rows = _read_hub(task, *hub, split)
  else:
    path = _local_file(task, pathlib.Path(str(source)), split)
    name = str(path)
    rows = _read_file(path)
  if not rows:
    raise errors.UserError(f"{name}: split '{split}' has no rows.")
  for row in rows:
    task.check(row, labelled=labelled)
  return rows


def has_split(
  task: tasks.Task, source: str | pathlib.Path | None, split: str
) -> bool:
  """Returns whether a source has a split, without reading its rows."""
  hub = _hub_id(task, source)
  if not hub:
    path = pathlib.Path(str(source))
    return not path.is_file() and _find_file(path, task, split) is not None
  name = task.hub_splits.get(split, split)
  return name in _call_datasets(
    "get_dataset_split_names", hub, f"splits of '{hub[0]}'"
  )


def _read_jsonl(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
  with path.open(encoding="utf-8") as lines:
    for number, line in enumerate(lines, 1):
      if not line.strip():
        continue
      try:
        yield number, json.loads(line)
      except json.JSONDecodeError as error:
        raise errors.UserError(
          f"{path} row {number}: broken JSON ({error.msg} at column "
          f"{error.colno}); expected one JSON object a line."
        ) from error


def _read_csv(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
  with path.open(encoding="utf-8", newline="") as lines:
    reader = csv.DictReader(lines)
    for number, fields in enumerate(reader, 1):
      if None in fields or None in fields.values():
        raise errors.UserError(
          f"{path} row {number} (line {reader.line_num}): the row does not "
          f"have the {len(reader.fieldnames or ())} cells of the header."
        )
      yield number, fields


def _read_parquet(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
  try:
    parquet = importlib.import_module("pyarrow.parquet")
  except ImportError as error:
    raise errors.UserError(
      f"{path}: reading Parquet needs the package pyarrow."
    ) from error
  try:
    rows = parquet.read_table(path).to_pylist()
  except (OSError, ValueError) as error:
    raise errors.UserError(
      f"{path}: not a Parquet file ({errors.first_line(error)})."
    ) from error
  yield from enumerate(rows, 1)


# Reader of each file extension.
_READERS: dict[str, Callable[[pathlib.Path], Iterator[tuple[int, Any]]]] = {
  ".jsonl": _read_jsonl,
  ".csv": _read_csv,
  ".parquet": _read_parquet,
}


def _read_file(path: pathlib.Path) -> list[tasks.Row]:
  """Reads the rows of one file with the reader of its extension."""
  rows = []
  try:
    for number, fields in _READERS[path.suffix](path):
      source = f"{path} row {number}"
      if not isinstance(fields, dict):
        raise errors.UserError(
          f"{source}: found a {type(fields).__name__}; expected a JSON object "
          "of columns."
        )
      rows.append(tasks.Row(fields, source))
  except UnicodeDecodeError as error:
    raise errors.UserError(
      f"{path}: not UTF-8 text (byte {error.start}: {error.reason})."
    ) from error
  return rows


def _hub_id(
  task: tasks.Task, source: str | pathlib.Path | None
) -> tuple[str, str | None] | None:
  """Returns the hub id and configuration, or None for a local source."""
  if source is None:
    if task.hub is None:
      raise errors.UserError(
        f"Task {task.name} has no hub set; give data.dir a file or folder."
      )
    return task.hub
  if not isinstance(source, str) or not source.startswith("hub:"):
    return None
  parts = re.fullmatch(r"hub:([\w.-]+/[\w.-]+)(?:/([\w.-]+))?", source)
  if not parts:
    raise errors.UserError(
      f"Data source '{source}' is no hub id; expected hub:owner/name or "
      "hub:owner/name/config."
    )
  return parts[1], parts[2]


def _call_datasets(
  name: str, hub: tuple[str, str | None], what: str, **options: str
) -> Any:
  """Calls a function of the package `datasets` on a data set of the hub."""
  try:
    datasets = importlib.import_module("datasets")
  except ImportError as error:
    raise errors.UserError(
      f"Reading {what} from the hub needs the package datasets; or point "
      "data.dir at a folder of JSONL files."
    ) from error
  function = getattr(datasets, name)
  try:
    try:
      return function(*hub, **options)
    except RuntimeError as error:
      if "scripts are no longer supported" not in str(error):
        raise
      # The hub keeps a converted copy with a folder for each configuration.
      return function(hub[0], data_dir=hub[1], revision=_CONVERTED, **options)
  except Exception as error:  # Its exceptions share no base class.
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise errors.UserError(
      f"Cannot read {what} from the hub: {reason}"
    ) from error


def _read_hub(
  task: tasks.Task, hub: str, config: str | None, split: str
) -> list[tasks.Row]:
  """Reads a split from the hub; drops rows without text, with a warning."""
  name = task.hub_splits.get(split, split)
  what = f"split '{name}' of '{hub}'"
  table = _call_datasets("load_dataset", (hub, config), what, split=name)
  prefix = "/".join(filter(None, (hub, config, name)))
  rows = [
    tasks.Row(dict(f), f"{prefix} row {i}") for i, f in enumerate(table, 1)
  ]
  with_text = [
    row
    for row in rows
    if all(str(row.fields.get(column, "-")).strip() for column in task.text)
  ]
  if len(with_text) < len(rows):
    logging.getLogger("zofo_jax").warning(
      "%s: %d rows without text left out", prefix, len(rows) - len(with_text)
    )
  return with_text


def _find_file(
  source: pathlib.Path, task: tasks.Task, split: str
) -> pathlib.Path | None:
  """Returns the file of a split in a folder, or None if there is none."""
  prefixes = [f"{source}/", f"{source / task.name}/"]
  if task.hub and task.hub[1]:
    prefixes.append(f"{source / task.hub[1]}/")
  if not source.is_dir():
    prefixes = [f"{source}_"]
  for prefix in prefixes:
    for name in _SPLITS.get(split, (split,)):
      for suffix in _READERS:
        path = pathlib.Path(f"{prefix}{name}{suffix}")
        if path.is_file():
          return path
  return None


def _local_file(
  task: tasks.Task, source: pathlib.Path, split: str
) -> pathlib.Path:
  """Returns the file of a split, or raises a `UserError` if there is none."""
  if source.is_file():
    if source.suffix not in _READERS:
      raise errors.UserError(
        f"{source}: unknown ending; expected {', '.join(_READERS)}."
      )
    if split != "train":
      raise errors.UserError(
        f"{source} is one file, hence the split 'train'; it has no '{split}'."
      )
    return source
  path = _find_file(source, task, split)
  if path is not None:
    return path
  if not source.is_dir():
    suggestion = (
      errors.nearest(source.name, [p.name for p in source.parent.iterdir()])
      if source.parent.is_dir()
      else ""
    )
    raise errors.UserError(f"No data folder {source}.{suggestion}")
  names = ", ".join(sorted(p.name for p in source.iterdir())[:12])
  raise errors.UserError(
    f"{source} has no {split}.jsonl (or .csv, .parquet) for task "
    f"{task.name}; it holds {names or 'nothing'}."
  )
