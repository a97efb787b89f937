"""JSON and JSON Lines files, and text that is written atomically.

Of several processes only the first writes anything.
"""

import json
import math
import uuid
from collections.abc import Iterable, Mapping
from typing import IO, Any, Self

import numpy as np
from etils import epath

from zofo_jax import errors
from zofo_jax.sharding import multihost


class JsonlWriter:
  """Appends dictionaries to a file, one per line, each flushed immediately."""

  def __init__(self, path: epath.PathLike):
    """Initializes the writer; the first write makes the file."""
    self.path = epath.Path(path)
    self._file: IO[Any] | None = None

  def __enter__(self) -> Self:
    """Returns itself."""
    return self

  def __exit__(self, *unused: object) -> None:
    """Closes the file."""
    self.close()

  def write(self, row: Mapping[str, Any]) -> None:
    """Appends one row; NumPy and JAX values become numbers and lists."""
    if not multihost.is_primary():
      return
    if self._file is None:
      self.path.parent.mkdir(parents=True, exist_ok=True)
      self._file = self.path.open("a")
    self._file.write(_dumps(row) + "\n")
    self._file.flush()

  def truncate_after(self, step: int) -> None:
    """Removes the rows that a resumed run will write again.

    These are the rows of steps later than `step`, and a truncated last line.
    The file is replaced atomically.

    Raises:
      UserError: a complete line is not a JSON dictionary.
    """
    self.close()
    if not multihost.is_primary():
      return
    rows = [r for r in read_jsonl(self.path) if r.get("step", step) <= step]
    write_lines(self.path, rows)

  def close(self) -> None:
    """Closes the file; a later write opens it again."""
    if self._file is not None:
      self._file.close()
      self._file = None


def make_folder(folder: epath.Path, flag: str = "--workdir") -> None:
  """Makes a folder, unless it exists, and checks that it can be written to.

  Args:
    folder: of all processes.
    flag: the flag that it was given with, for the error.

  Raises:
    UserError: it cannot be made or written to.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe-{uuid.uuid4().hex}"
    probe.write_text("")
    probe.unlink()
  except OSError as error:
    raise errors.UserError(
      f"{flag}: {folder} cannot be written to ({error.strerror}); expected "
      "a folder to write into."
    ) from error


def check_output(path: epath.PathLike, flag: str) -> None:
  """Checks that a file can be written, before the work that it is of.

  Args:
    path: of the file; its folder is made if need be.
    flag: the flag that it was given with.

  Raises:
    UserError: it cannot be written.
  """
  path = epath.Path(path)
  make_folder(path.parent, flag)
  if path.is_dir():
    raise errors.UserError(
      f"{flag}: {path} is a folder; expected a file to write."
    )


def read_jsonl(path: epath.PathLike) -> list[dict[str, Any]]:
  """Reads the rows, except for a truncated last line; [] if there is no file.

  Raises:
    UserError: a complete line is not a JSON dictionary.
  """
  path = epath.Path(path)
  if not path.exists():
    return []
  # Bytes, since the last line may end within a character.
  *lines, _ = path.read_bytes().split(b"\n")
  rows = []
  for number, line in enumerate(lines, 1):
    try:
      row = json.loads(line)
    except ValueError:
      row = None
    if not isinstance(row, dict):
      raise errors.UserError(
        f"'{path}' line {number}: expected a JSON dictionary, found "
        f"{line[:40]!r}."
      )
    rows.append(row)
  return rows


def write_json(path: epath.PathLike, obj: Any) -> None:
  """Writes a JSON file atomically."""
  write_text(path, _dumps(obj, indent=2) + "\n")


def write_lines(path: epath.PathLike, rows: Iterable[Any]) -> None:
  """Writes a JSON line for each row, atomically."""
  write_text(path, "".join(_dumps(row) + "\n" for row in rows))


def write_text(path: epath.PathLike, text: str) -> None:
  """Writes a file atomically: after a crash it is the old one or the new one.

  Args:
    path: of the file; its folder is made if need be.
    text: the content.
  """
  if not multihost.is_primary():
    return
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + ".tmp")
  temporary.write_text(text)
  temporary.replace(path)


def _plain(value: Any) -> Any:
  """Converts arrays and paths to JSON values; NaN and infinity become null."""
  if isinstance(value, Mapping):
    return {str(key): _plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  if isinstance(value, float):
    return value if math.isfinite(value) else None  # NaN is not JSON
  if value is None or isinstance(value, str | int):
    return value
  if hasattr(value, "__array__"):
    return _plain(np.asarray(value).tolist())
  return str(value)


def _dumps(obj: Any, indent: int | None = None) -> str:
  return json.dumps(_plain(obj), indent=indent, allow_nan=False)
