"""Reads rows from files: JSON, JSON lines, CSV, TSV, Parquet and Arrow.

A broken row becomes a `RowError` in its place among the rows, so that callers
choose between stopping and leaving it out. A file that cannot be divided into
rows is a `UserError`.
"""

import codecs
import contextlib
import csv
import gzip
import importlib
import io
import json
import logging
import pathlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from zofo_jax import errors, tasks

Item = tasks.Row | errors.RowError
# Number of rows of a table -> int [N], those to be read; None for all.
Choose = Callable[[int], np.ndarray | None]

# The longer marks first, since one begins like another.
_BYTE_ORDER_MARKS = {
  codecs.BOM_UTF8: "utf-8-sig",
  codecs.BOM_UTF32_LE: "utf-32",
  codecs.BOM_UTF32_BE: "utf-32",
  codecs.BOM_UTF16_LE: "utf-16",
  codecs.BOM_UTF16_BE: "utf-16",
}
_GZIP_MARK = b"\x1f\x8b"
_GZIP_ERRORS = (gzip.BadGzipFile, EOFError, zlib.error)
# Far above what rows have, far below where Python's recursion ends.
_MAX_DEPTH = 100
# Rows of a Parquet file that are decoded at a time, and bytes that are read.
_BLOCK = 4096
_BUFFER = 2**20


def ending(path: pathlib.Path) -> str:
  """Returns the ending that can be read, ".gz" included, or ""."""
  match = re.search(
    r"\.(jsonl?|[ct]sv)(\.gz)?$|\.(parquet|arrow)$", path.name, re.I
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
  kind = ending(path).lower().removesuffix(".gz")
  if kind not in _READERS:
    raise errors.UserError(
      f"{path}: unknown ending; expected {', '.join(ENDINGS)}."
    )
  try:
    return list(_READERS[kind](path))
  except UnicodeDecodeError as error:
    line = error.object[: error.start].count(b"\n") + 1
    raise errors.UserError(
      f"{path} line {line}: not UTF-8 text ({error.reason})."
    ) from error
  except (OSError, *_GZIP_ERRORS) as error:
    raise errors.UserError(
      f"{path}: cannot be read ({errors.first_line(error)})."
    ) from error


def read_all(
  paths: Sequence[pathlib.Path], choose: Choose | None = None
) -> list[Item]:
  """Reads the rows of several files, one after the other.

  Args:
    paths: of the files.
    choose: which rows of Parquet and Arrow files are read; None for all. Rows
      of other files are all read.

  Returns:
    Rows and errors of rows, in the files' order or in that of the choice.

  Raises:
    UserError: a file cannot be read.
  """
  tables = all(ending(path).lower() in _TABLES for path in paths)
  if choose is None or not tables:
    return [item for path in paths for item in read(path)]
  ends = np.cumsum([_num_rows(path) for path in paths])
  indices = choose(int(ends[-1]))
  if indices is None:
    return read_all(paths)
  items: dict[int, Item] = {}
  for path, start, end in zip(paths, [0, *ends[:-1]], ends, strict=True):
    inside = np.sort(indices[(indices >= start) & (indices < end)])
    rows = _chosen_rows(path, inside - start)
    items |= zip(inside.tolist(), rows, strict=True)
  return [items[i] for i in indices.tolist()]


def _read_text(path: pathlib.Path) -> str:
  """Reads UTF-8, or what a byte-order mark says; compressed or not."""
  content = path.read_bytes()
  if path.name.lower().endswith(".gz") or content.startswith(_GZIP_MARK):
    content = gzip.decompress(content)
  for mark, encoding in _BYTE_ORDER_MARKS.items():
    if content.startswith(mark):
      return content.decode(encoding)
  if b"\0" in content[:4]:
    raise errors.UserError(
      f"{path}: starts with null bytes, as UTF-16 does; expected UTF-8, or a "
      "byte-order mark."
    )
  return content.decode("utf-8")


def _read_json(path: pathlib.Path) -> Iterator[Item]:
  """Reads one array of objects, or an object on each line."""
  text = _read_text(path)
  if text.lstrip().startswith("["):
    try:
      values = _parse_json(text)
    except (ValueError, RecursionError) as error:
      raise errors.UserError(
        f"{path}: broken JSON ({errors.first_line(error)}); expected one array "
        "of objects."
      ) from error
    for number, value in enumerate(values, 1):
      yield _json_row(value, f"{path} row {number}")
    return
  for number, line in enumerate(io.StringIO(text), 1):
    if not line.strip():
      continue
    source = f"{path} row {number}"
    try:
      value = _parse_json(line)
    except (ValueError, RecursionError) as error:
      reason = errors.first_line(error)
      if isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg} at column {error.colno}"
      yield errors.RowError(
        source,
        f"broken JSON ({reason}); expected one JSON object a line, or one "
        "array of objects.",
      )
    else:
      yield _json_row(value, source)


def _parse_json(text: str) -> Any:
  return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
  """Makes an object; of two values of a key, the first would be lost."""
  fields = dict(pairs)
  if len(fields) < len(pairs):
    raise ValueError(f"'{_repeated([key for key, _ in pairs])}' occurs twice")
  return fields


def _repeated(names: Sequence[str]) -> str | None:
  return next((n for i, n in enumerate(names) if n in names[:i]), None)


def _json_row(value: Any, source: str) -> Item:
  if _is_deeper(value, _MAX_DEPTH):
    return errors.RowError(
      source,
      f"lists and objects are nested more than {_MAX_DEPTH} deep; expected "
      "columns.",
    )
  if isinstance(value, dict):
    return tasks.Row(value, source)
  return errors.RowError(
    source,
    f"found {json.dumps(value)[:40]}; expected a JSON object of columns.",
  )


def _is_deeper(value: Any, depth: int) -> bool:
  if not isinstance(value, dict | list):
    return False
  items = value.values() if isinstance(value, dict) else value
  return depth == 0 or any(_is_deeper(item, depth - 1) for item in items)


def _read_csv(path: pathlib.Path) -> Iterator[Item]:
  """Reads CSV or TSV as spreadsheets and pandas write it."""
  csv.field_size_limit(2**31 - 1)  # 128 KB otherwise
  text = _read_text(path)
  default = "\t" if ".tsv" in path.name.lower() else ","
  records = csv.reader(
    io.StringIO(text, newline=""),
    delimiter=_delimiter(text, default),
    strict=True,
  )
  try:
    yield from _csv_rows(path, records)
  except csv.Error as error:
    raise errors.UserError(
      f"{path} line {records.line_num}: broken CSV ({error})."
    ) from error


def _delimiter(text: str, default: str) -> str:
  """Returns what separates the header; `default` if it has one column."""
  if mark := re.match(r'"?sep=(.)"?[\r\n]', text):  # Excel's own line
    return mark[1]
  for delimiter in (default, ",", ";", "\t"):
    records = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    if len(next(filter(None, records), [])) > 1:
      return delimiter
  return default


def _csv_rows(path: pathlib.Path, records: Any) -> Iterator[Item]:
  filled = filter(None, records)  # no blank lines
  header: list[str] = next(filled, [])
  if header and header[0].startswith("sep="):
    header = next(filled, [])
  header = [name.strip() for name in header]
  # Columns without a name, such as pandas' index, are not read.
  if twice := _repeated([name for name in header if name]):
    raise errors.UserError(
      f"{path}: the header names the column '{twice}' twice; expected each "
      "column once."
    )
  for number, cells in enumerate(filled, 1):
    source = f"{path} row {number}"
    if reason := _broken(cells, header, records.dialect.delimiter):
      yield errors.RowError(f"{source} (line {records.line_num})", reason)
    else:
      yield tasks.Row(dict(zip(header, cells, strict=True)), source)


def _broken(cells: list[str], header: list[str], delimiter: str) -> str | None:
  """Returns why the cells are no row, or None."""
  if len(cells) != len(header):
    return (
      f"found {len(cells)} cells; expected the {len(header)} cells of the "
      "header."
    )
  if cells[0].startswith("\ufeff"):
    return (
      "starts with a byte-order mark, as where files were joined; expected one "
      "only at the start of the file."
    )
  if [cell.strip() for cell in cells] == header:
    return "repeats the header; expected it only in the first line."
  if delimiter == "\t" and len(header) > 1:
    # Most programs write tabs without quoting: two cells that merely begin and
    # end with a quote would swallow the rows from one to the other.
    lines = re.split(r"\r\n|\r|\n", delimiter.join(cells))
    if len(lines) > 1 and all(
      line.count(delimiter) + 1 == len(header) for line in lines
    ):
      return (
        f"a quoted cell spans {len(lines)} lines, each of which has the "
        f"{len(header)} cells of the header; expected quotes that are "
        "part of a text to be doubled, within a quoted cell."
      )
  return None


def _read_table(path: pathlib.Path) -> Iterator[Item]:
  """Reads Parquet, or Arrow: a file, or a stream as `datasets` saves it."""
  with _table_errors(path):
    if _is_parquet(path):
      table = _open_parquet(path).read()
    else:
      with path.open("rb") as stream:
        table = _open_arrow(path, stream).read_all()
  yield from _table_rows(path, table, range(table.num_rows))


def _pyarrow(path: pathlib.Path, name: str) -> Any:
  try:
    return importlib.import_module(f"pyarrow.{name}")
  except ImportError as error:
    raise errors.UserError(
      f"{path}: reading Parquet needs the package pyarrow."
    ) from error


def _is_parquet(path: pathlib.Path) -> bool:
  return ending(path).lower() == ".parquet"


@contextlib.contextmanager
def _table_errors(path: pathlib.Path) -> Iterator[None]:
  """Raises the errors of pyarrow as `UserError`s."""
  try:
    yield
  except (OSError, ValueError, NotImplementedError) as error:
    if isinstance(error, errors.UserError):
      raise
    kind = "a Parquet" if _is_parquet(path) else "an Arrow"
    raise errors.UserError(
      f"{path}: not {kind} file ({errors.first_line(error)})."
    ) from error


def _open_parquet(path: pathlib.Path) -> Any:
  parquet = _pyarrow(path, "parquet")
  # One file, whatever the names of its folders ("label=1") suggest. Without a
  # buffer of this size, a column of a whole group of rows is in memory.
  return parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False)


def _open_arrow(path: pathlib.Path, stream: Any) -> Any:
  """Opens an Arrow file or stream."""
  ipc = _pyarrow(path, "ipc")
  is_file = stream.read(6) == b"ARROW1"
  stream.seek(0)
  return (ipc.open_file if is_file else ipc.open_stream)(stream)


def _num_rows(path: pathlib.Path) -> int:
  with _table_errors(path):
    if _is_parquet(path):
      return _open_parquet(path).metadata.num_rows
    return sum(block.num_rows for block in _arrow_blocks(path))


def _chosen_rows(path: pathlib.Path, indices: np.ndarray) -> Iterator[Item]:
  """Reads some rows, in ascending order, a block of the file at a time."""
  start = 0
  with _table_errors(path):
    blocks = (
      _open_parquet(path).iter_batches(_BLOCK)
      if _is_parquet(path)
      else _arrow_blocks(path)
    )
    for block in blocks:
      end = start + block.num_rows
      inside = indices[(indices >= start) & (indices < end)]
      if len(inside):
        yield from _table_rows(path, block.take(inside - start), inside)
      start = end


def _arrow_blocks(path: pathlib.Path) -> Iterator[Any]:
  """Yields the batches of an Arrow file, which are read where they are used."""
  with _pyarrow(path, "lib").memory_map(str(path)) as stream:
    reader = _open_arrow(path, stream)
    if hasattr(reader, "num_record_batches"):
      yield from map(reader.get_batch, range(reader.num_record_batches))
    else:
      yield from reader


def _table_rows(
  path: pathlib.Path, table: Any, numbers: Iterable[int]
) -> Iterator[Item]:
  """Yields the rows of a table, which have these numbers in their file."""
  names = table.schema.names
  if twice := _repeated(names):
    raise errors.UserError(
      f"{path}: two columns have the name '{twice}'; expected each once."
    )
  columns = {}
  for name, column in zip(names, table.columns, strict=True):
    try:
      columns[name] = column.to_pylist()
    except UnicodeDecodeError:
      raise
    except (ArithmeticError, ValueError, NotImplementedError) as error:
      # Such as a time that Python has no value for; tasks seldom read it.
      logging.getLogger("zofo_jax").warning(
        "%s: column '%s' is left out, as it cannot be converted from %s (%s)",
        *(path, name, column.type, errors.first_line(error)),
      )
  for i, number in enumerate(numbers):
    fields = {name: values[i] for name, values in columns.items()}
    yield tasks.Row(fields, f"{path} row {number + 1}")


_TABLES = (".parquet", ".arrow")
# Reader of each ending.
_READERS: dict[str, Callable[[pathlib.Path], Iterator[Item]]] = {
  ".jsonl": _read_json,
  ".json": _read_json,
  ".csv": _read_csv,
  ".tsv": _read_csv,
  ".parquet": _read_table,
  ".arrow": _read_table,
}
ENDINGS = (*_READERS, ".jsonl.gz", ".json.gz", ".csv.gz", ".tsv.gz")
