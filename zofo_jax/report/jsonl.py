"""JSON files: one dictionary a line, or one object written in one piece.

Of several processes only the first writes anything.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import IO, Any, Self

import numpy as np
from etils import epath

from zofo_jax import errors
from zofo_jax.sharding import multihost


class JsonlWriter:
  """Appends dictionaries to a file, one a line, each flushed at once."""

  def __init__(self, path: epath.PathLike):
    """Remembers the path; the file is made by the first write."""
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
    """Drops what a resumed run will write again.

    Rows of steps later than `step` go, and so does a last line without its end;
    rows without a step stay. The file is replaced in one piece.

    Raises:
      UserError: if a whole line is no JSON dictionary.
    """
    self.close()
    if not multihost.is_primary():
      return
    rows = [r for r in read_jsonl(self.path) if r.get("step", step) <= step]
    _replace(self.path, "".join(_dumps(row) + "\n" for row in rows))

  def close(self) -> None:
    """Closes the file; a later write opens it again."""
    if self._file is not None:
      self._file.close()
      self._file = None


def read_jsonl(path: epath.PathLike) -> list[dict[str, Any]]:
  """Reads the rows but for a torn last line; none where there is no file.

  Raises:
    UserError: if a whole line is no JSON dictionary.
  """
  path = epath.Path(path)
  if not path.exists():
    return []
  # Bytes, split at b"\n" alone: the tear may be inside a character.
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
  """Writes a JSON file in one piece: the old one or the new one, never half."""
  _replace(epath.Path(path), _dumps(obj, indent=2) + "\n")


def write_lines(path: epath.PathLike, rows: Iterable[Any]) -> None:
  """Writes a JSON line for each row, all of them or none."""
  lines = "".join(_dumps(row) + "\n" for row in rows)
  _replace(epath.Path(path), lines)


def _plain(value: Any) -> Any:
  """Turns arrays and paths into JSON; what is not finite becomes null."""
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


def _replace(path: epath.Path, text: str) -> None:
  if not multihost.is_primary():
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  beside = path.with_name(path.name + ".tmp")
  beside.write_text(text)
  beside.replace(path)
