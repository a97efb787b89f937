"""Reads rows from tables: Parquet and Arrow."""

import contextlib
import importlib
import logging
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from zofo_jax import errors, tasks
from zofo_jax.data import text_files

# Rows of a Parquet file that are decoded at a time, and bytes that are read.
_BLOCK = 4096
_BUFFER = 2**20


def read(path: pathlib.Path, indices: np.ndarray | None) -> Iterator[tasks.Row]:
  """Reads Parquet, or Arrow: a file, or a stream as `datasets` saves it."""
  if indices is not None:
    yield from _chosen_rows(path, indices)
    return
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
  return path.name.lower().endswith(".parquet")


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


def num_rows(path: pathlib.Path) -> int:
  """Returns the number of rows, without reading them."""
  with _table_errors(path):
    if _is_parquet(path):
      return _open_parquet(path).metadata.num_rows
    return sum(block.num_rows for block in _arrow_blocks(path))


def _chosen_rows(
  path: pathlib.Path, indices: np.ndarray
) -> Iterator[tasks.Row]:
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
) -> Iterator[tasks.Row]:
  """Yields the rows of a table, which have these numbers in their file."""
  names = table.schema.names
  if twice := text_files.repeated(names):
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
