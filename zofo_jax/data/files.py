"""Reads rows from files: JSON, CSV, TSV, plain text, Parquet and Arrow.

A broken row becomes a `RowError` in its place among the rows, so that callers
choose between stopping and leaving it out. A file that cannot be divided into
rows is a `UserError`.
"""

import contextlib
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from zofo_jax import errors, tasks
from zofo_jax.data import tables, text_files

Item = text_files.Item
# Number of rows -> int [N], those to be read; None for all.
Choose = Callable[[int], np.ndarray | None]

_TABLES = (".parquet", ".arrow")
# Reader of each ending.
_TEXTS = {
  ".jsonl": text_files.json_records,
  ".json": text_files.json_records,
  ".csv": text_files.csv_records,
  ".tsv": text_files.csv_records,
  ".txt": text_files.line_records,
  ".md": text_files.line_records,
}
_PLAIN = (".txt", ".md")
ENDINGS = (*_TEXTS, *_TABLES, *(f"{ending}.gz" for ending in _TEXTS))


def ending(path: pathlib.Path) -> str:
  """Returns the ending that can be read, ".gz" included, or ""."""
  match = re.search(
    r"\.(jsonl?|[ct]sv|txt|md)(\.gz)?$|\.(parquet|arrow)$", path.name, re.I
  )
  return match[0] if match else ""


def read(path: pathlib.Path) -> list[Item]:
  """Reads the rows of a file, by its ending.

  Args:
    path: of a file with one of `ENDINGS`, in upper or lower case; text may be
      compressed (".gz") and start with a byte-order mark.

  Returns:
    Rows and errors of rows, in the file's order.

  Raises:
    UserError: the file cannot be read.
  """
  return list(_items(path))


def read_all(
  paths: Sequence[pathlib.Path], choose: Choose | None = None
) -> list[Item]:
  """Reads the rows of several files, one after the other.

  Args:
    paths: of the files.
    choose: which rows are read; None for all. Others are counted, but neither
      converted nor checked.

  Returns:
    Rows and errors of rows, in the files' order or in that of the choice.

  Raises:
    UserError: a file cannot be read.
  """
  if choose is None:
    return [item for path in paths for item in read(path)]
  ends = np.cumsum([_num_rows(path) for path in paths])
  indices = choose(int(ends[-1]))
  if indices is None:
    return read_all(paths)
  items: dict[int, Item] = {}
  for path, start, end in zip(paths, [0, *ends[:-1]], ends, strict=True):
    inside = np.sort(indices[(indices >= start) & (indices < end)])
    rows = _items(path, inside - start)
    items |= zip(inside.tolist(), rows, strict=True)
  return [items[i] for i in indices.tolist()]


def read_documents(
  paths: Sequence[pathlib.Path], choose: Choose | None = None
) -> list[Item]:
  """Reads files of plain text, each of which is a row.

  Args:
    paths: of the files.
    choose: as for `read_all`.

  Raises:
    UserError: a file cannot be read.
  """
  indices = choose(len(paths)) if choose else None
  items: list[Item] = []
  for path in paths if indices is None else [paths[i] for i in indices]:
    with _file_errors(path):
      items.append(tasks.Row({"text": text_files.whole(path)}, str(path)))
  return items


def is_plain(path: pathlib.Path) -> bool:
  """Returns whether a file has plain text, by its ending."""
  return ending(path).lower().removesuffix(".gz") in _PLAIN


def first(path: pathlib.Path) -> tasks.Row | None:
  """Returns the first row that can be read, or None; as `read`."""
  indices = np.arange(min(_num_rows(path), 1)) if _is_table(path) else None
  rows = (item for item in _items(path, indices) if isinstance(item, tasks.Row))
  return next(rows, None)


def _items(
  path: pathlib.Path, indices: np.ndarray | None = None
) -> Iterator[Item]:
  """Yields a file's rows: all, or those with these indices, in ascending order.

  Raises:
    UserError: the file cannot be read.
  """
  with _file_errors(path):
    if _is_table(path):
      yield from tables.read(path, indices)
      return
    records = _records(path)
    if indices is not None:
      chosen = set(indices.tolist())
      records = (record for i, record in enumerate(records) if i in chosen)
    for number, value, parse in records:
      yield parse(value, f"{path} row {number}")


def _num_rows(path: pathlib.Path) -> int:
  """Returns the number of rows; those of a text are not parsed."""
  with _file_errors(path):
    if _is_table(path):
      return tables.num_rows(path)
    return sum(1 for _ in _records(path))


def _is_table(path: pathlib.Path) -> bool:
  return ending(path).lower() in _TABLES


def _records(path: pathlib.Path) -> Iterator[text_files.Record]:
  kind = ending(path).lower().removesuffix(".gz")
  if kind not in _TEXTS:
    raise errors.UserError(
      f"{path}: unknown ending; expected {', '.join(ENDINGS)}."
    )
  return _TEXTS[kind](path)


@contextlib.contextmanager
def _file_errors(path: pathlib.Path) -> Iterator[None]:
  """Raises the errors of files and encodings as `UserError`s."""
  try:
    yield
  except UnicodeDecodeError as error:
    source = str(path)
    if not _is_table(path):
      source += f" line {text_files.undecodable_line(path)}"
    raise errors.UserError(f"{source}: not UTF-8 text ({error.reason}).") from (
      error
    )
  except (OSError, *text_files.GZIP_ERRORS) as error:
    raise errors.UserError(
      f"{path}: cannot be read ({errors.first_line(error)})."
    ) from error
