"""Reads rows from text files: JSON, JSON lines, CSV, TSV and plain text.

A file is first divided into records, of which only those that are needed are
made into rows.
"""

import codecs
import contextlib
import csv
import functools
import gzip
import io
import json
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

from zofo_jax import errors, tasks

Item = tasks.Row | errors.RowError
# A row's number, what it is made of, and what makes it, with its source.
Record = tuple[int, Any, Callable[[Any, str], Item]]
GZIP_ERRORS = (gzip.BadGzipFile, EOFError, zlib.error)

# The longer marks first, since one begins like another.
_BYTE_ORDER_MARKS = {
  codecs.BOM_UTF8: "utf-8-sig",
  codecs.BOM_UTF32_LE: "utf-32",
  codecs.BOM_UTF32_BE: "utf-32",
  codecs.BOM_UTF16_LE: "utf-16",
  codecs.BOM_UTF16_BE: "utf-16",
}
_GZIP_MARK = b"\x1f\x8b"
# Far above what rows have, far below where Python's recursion ends.
_MAX_DEPTH = 100


@contextlib.contextmanager
def _open_text(
  path: pathlib.Path, newline: str | None
) -> Iterator[io.TextIOWrapper]:
  """Opens UTF-8, or what a byte-order mark says; compressed or not."""
  with contextlib.ExitStack() as stack:
    raw: Any = stack.enter_context(path.open("rb"))
    if path.name.lower().endswith(".gz") or raw.peek(2)[:2] == _GZIP_MARK:
      raw = stack.enter_context(gzip.open(raw))
    start = raw.read(4)
    raw.seek(0)
    marks = _BYTE_ORDER_MARKS.items()
    encoding = next((e for m, e in marks if start.startswith(m)), "utf-8")
    if encoding == "utf-8" and b"\0" in start:
      raise errors.UserError(
        f"{path}: starts with null bytes, as UTF-16 does; expected UTF-8, or a "
        "byte-order mark."
      )
    yield io.TextIOWrapper(raw, encoding, newline=newline)


def undecodable_line(path: pathlib.Path) -> int:
  """Returns the number of the first line that cannot be decoded."""
  with _open_text(path, newline="\n") as stream:
    encoding, content = stream.encoding, bytes(stream.buffer.read())
  try:
    content.decode(encoding)
  except UnicodeDecodeError as error:
    return content.count(b"\n", 0, error.start) + 1
  return 1


def json_records(path: pathlib.Path) -> Iterator[Record]:
  """Reads one array of objects, or an object on each line."""
  with _open_text(path, newline="\n") as stream:
    line = next(filter(str.strip, stream), "")
    stream.seek(0)
    if not line.lstrip().startswith("["):
      for number, line in enumerate(stream, 1):
        if line.strip():
          yield number, line, _json_line
      return
    text = stream.read()
    try:
      values = _parse_json(text)
    except (ValueError, RecursionError) as error:
      raise errors.UserError(
        f"{path}: broken JSON ({errors.first_line(error)}); expected one array "
        "of objects."
      ) from error
  for number, value in enumerate(values, 1):
    yield number, value, _json_row


def _json_line(line: str, source: str) -> Item:
  try:
    value = _parse_json(line)
  except (ValueError, RecursionError) as error:
    reason = errors.first_line(error)
    if isinstance(error, json.JSONDecodeError):
      reason = f"{error.msg} at column {error.colno}"
    return errors.RowError(
      source,
      f"broken JSON ({reason}); expected one JSON object a line, or one "
      "array of objects.",
    )
  return _json_row(value, source)


def _parse_json(text: str) -> Any:
  return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
  """Makes an object; of two values of a key, the first would be lost."""
  fields = dict(pairs)
  if len(fields) < len(pairs):
    raise ValueError(f"'{repeated([key for key, _ in pairs])}' occurs twice")
  return fields


def repeated(names: Sequence[str]) -> str | None:
  """Returns the first name that occurs again, or None."""
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
    f"found {errors.as_json(value)}; expected a JSON object of columns.",
  )


def _is_deeper(value: Any, depth: int) -> bool:
  if not isinstance(value, dict | list):
    return False
  items = value.values() if isinstance(value, dict) else value
  return depth == 0 or any(_is_deeper(item, depth - 1) for item in items)


def line_records(path: pathlib.Path) -> Iterator[Record]:
  """Reads lines, each of which is a text; blank ones are skipped."""
  with _open_text(path, newline=None) as stream:
    for number, line in enumerate(stream, 1):
      if line.strip():
        yield number, line.removesuffix("\n"), _text_row


def _text_row(text: str, source: str) -> Item:
  return tasks.Row({"text": text}, source)


def whole(path: pathlib.Path) -> str:
  """Returns all of a file's text."""
  with _open_text(path, newline=None) as stream:
    return stream.read()


def csv_records(path: pathlib.Path) -> Iterator[Record]:
  """Reads CSV or TSV as spreadsheets and pandas write it."""
  csv.field_size_limit(2**31 - 1)  # 128 KB otherwise
  default = "\t" if ".tsv" in path.name.lower() else ","
  with _open_text(path, newline="") as stream:
    delimiter = _delimiter(stream, default)
    stream.seek(0)
    records = csv.reader(stream, delimiter=delimiter, strict=True)
    try:
      filled = filter(None, records)  # no blank lines
      header = next(filled, [])
      if header and header[0].startswith("sep="):
        header = next(filled, [])
      header = [name.strip() for name in header]
      # Columns without a name, such as pandas' index, are not read.
      if twice := repeated([name for name in header if name]):
        raise errors.UserError(
          f"{path}: the header names the column '{twice}' twice; expected each "
          "column once."
        )
      parse = functools.partial(_csv_row, header=header, delimiter=delimiter)
      for number, cells in enumerate(filled, 1):
        yield number, (cells, records.line_num), parse
    except csv.Error as error:
      raise errors.UserError(
        f"{path} line {records.line_num}: broken CSV ({error})."
      ) from error


def _delimiter(stream: TextIO, default: str) -> str:
  """Returns what separates the header; `default` if it has one column."""
  if mark := re.match(r'"?sep=(.)"?[\r\n]', stream.readline()):
    return mark[1]  # Excel's own line
  for delimiter in (default, ",", ";", "\t"):
    stream.seek(0)
    records = csv.reader(stream, delimiter=delimiter)
    if len(next(filter(None, records), [])) > 1:
      return delimiter
  return default


def _csv_row(
  record: tuple[list[str], int],
  source: str,
  header: list[str],
  delimiter: str,
) -> Item:
  cells, line = record
  if reason := _broken(cells, header, delimiter):
    return errors.RowError(f"{source} (line {line})", reason)
  return tasks.Row(dict(zip(header, cells, strict=True)), source)


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
