"""Reads rows of labelled data from files, folders and the Hugging Face hub.

Every row keeps its file and row number, so that error messages can name them.
"""

import logging
import pathlib

from zofo_jax import errors, tasks
from zofo_jax.data import bad_rows as bad_rows_lib
from zofo_jax.data import files, layouts
from zofo_jax.data import hub as hub_lib


def load(
  task: tasks.Task,
  source: str | pathlib.Path | None,
  split: str,
  *,
  labelled: bool = True,
  bad_rows: bad_rows_lib.BadRows | None = None,
  choose: files.Choose | None = None,
  stream: hub_lib.Stream | None = None,
) -> list[tasks.Row]:
  """Reads and checks every row of a split.

  Args:
    task: defines which columns a row must have and checks each row.
    source: one of: a folder with `<split>.jsonl` or another of
      `files.ENDINGS`, in a layout of `layouts.find`; of rows of a format, a
      folder of plain texts, each of which is a row of the split "train"; the
      common prefix of such files, as MetaICL names them (`DIR/mrpc_16_100` for
      `mrpc_16_100_<split>.jsonl`); a single file, which is the split "train";
      "hub:owner/name" or "hub:owner/name/config", and perhaps "@revision";
      None for the task's default data set on the hub.
    split: "train", "validation" or "test".
    labelled: False for rows to be predicted, which need no label.
    bad_rows: what happens to rows that cannot be used; None to stop at them.
      Rows without label are left out of data sets of the hub and copies of
      them, rows without text are left out of those of the hub.
    choose: which rows of tables and of the hub are read; None for all.
    stream: as for `hub.read`.

  Returns:
    The rows, in the file's order or in that of the choice.

  Raises:
    UserError: there is no such data, or a row is invalid; names file and row.
  """
  bad_rows = bad_rows or bad_rows_lib.BadRows()
  items = read(
    task, source, split, labelled=labelled, choose=choose, stream=stream
  )
  hub = hub_lib.resolve(task, source)

  def is_known(error):
    if not isinstance(error, errors.UnusableRowError):
      return False
    local = task.hub and not isinstance(error, errors.BlankTextError)
    return bool(hub or local)

  name = "/".join(filter(None, (*hub, split))) if hub else str(source)
  if split == "train" and not hub and task.hub is None:
    path = pathlib.Path(str(source))
    if unread := [] if path.is_file() else layouts.unread(path, task):
      logging.getLogger("zofo_jax").warning(
        "%s: files that no split holds are not read: %s; expected names such "
        "as train.jsonl or train-00000-of-00002.jsonl",
        *(source, ", ".join(path.name for path in unread)),
      )
  return bad_rows.keep(items, name, is_known)


def read(
  task: tasks.Task,
  source: str | pathlib.Path | None,
  split: str,
  *,
  labelled: bool = True,
  choose: files.Choose | None = None,
  stream: hub_lib.Stream | None = None,
) -> list[files.Item]:
  """Reads a split: checked rows, and errors in the place of bad rows.

  Args:
    task: as for `load`.
    source: as for `load`.
    split: as for `load`.
    labelled: as for `load`.
    choose: as for `load`.
    stream: as for `load`.

  Raises:
    UserError: there is no such data, or a file cannot be read.
  """
  hub = hub_lib.resolve(task, source)
  if hub:
    name = "/".join(filter(None, hub))
    items = hub_lib.read(task, hub, split, choose, stream)
  else:
    path = pathlib.Path(str(source))
    paths = _local_files(task, path, split)
    name = str(paths[0])
    is_whole = path.is_dir() and not layouts.find(path, task, split)
    read_all = files.read_documents if is_whole else files.read_all
    items = read_all(paths, choose)
  if not items:
    raise errors.UserError(f"{name}: split '{split}' has no rows.")

  def checked(item):
    if isinstance(item, errors.RowError):
      return item
    item = task.from_mirror(item)
    try:
      task.check(item, labelled=labelled)
    except errors.RowError as error:
      error.fields = item.fields
      return error
    return item

  return [checked(item) for item in items]


def columns(
  task: tasks.Task, source: str, *, stream: bool = False
) -> tuple[str, ...]:
  """Returns the columns of the first usable row to train on.

  Args:
    task: its name may be that of a folder; what it reads is ignored.
    source: as for `load`.
    stream: whether no more than needed of a set of the hub is downloaded.

  Raises:
    UserError: there is no such data, or every row is broken.
  """
  hub = hub_lib.resolve(task, source)
  if hub:
    return hub_lib.columns(task, hub, stream=stream)
  (path, *_) = _local_files(task, pathlib.Path(source), "train")
  row = files.first(path)
  if row is None:
    items = files.read(path)
    raise errors.UserError(str(items[0]) if items else f"{path}: has no rows.")
  return tuple(map(str, row.fields))


def has_split(
  task: tasks.Task, source: str | pathlib.Path | None, split: str
) -> bool:
  """Returns whether a source has a split, without reading its rows."""
  hub = hub_lib.resolve(task, source)
  if not hub:
    path = pathlib.Path(str(source))
    return not path.is_file() and bool(layouts.find(path, task, split))
  return hub_lib.has_split(task, hub, split)


def _local_files(
  task: tasks.Task, source: pathlib.Path, split: str
) -> list[pathlib.Path]:
  """Returns the files of a split, or raises a `UserError` if there are none."""
  if source.is_file():
    if split != "train":
      raise errors.UserError(
        f"{source} is one file, hence the split 'train'; it has no '{split}'."
      )
    return [source]
  if paths := layouts.find(source, task, split):
    return paths
  if task.document and split == "train":
    if paths := layouts.documents(source):
      return paths
  if not source.is_dir():
    suggestion = (
      errors.nearest(source.name, [p.name for p in source.parent.iterdir()])
      if source.parent.is_dir()
      else ""
    )
    kind = "file" if files.ending(source) else "folder"
    raise errors.UserError(f"No data {kind} {source}.{suggestion}")
  names = ", ".join(sorted(p.name for p in source.iterdir())[:12])
  first, *others = files.ENDINGS
  raise errors.UserError(
    f"{source} has no {split}{first} (or {', '.join(others)}) for task "
    f"{task.name}; it holds {names or 'nothing'}."
  )
