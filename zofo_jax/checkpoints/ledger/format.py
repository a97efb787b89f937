"""The file of a ledger: a header and a line for each outer step.

The fields of a line, separated by spaces, are: step, number of directions,
learning rate, decay, coefficients, weights, and the CRC-32 of the text before
it. A float32 is written as eight hexadecimal digits, so that nothing is
rounded; the weights are "-" if the update cannot be replayed. The header is
JSON and its CRC-32. Each line is synced to the disk when it is appended.
"""

import io
import json
import os
import zlib
from typing import IO, Any, NamedTuple

import numpy as np
from etils import epath

from zofo_jax import errors, report
from zofo_jax.core.types import InPlaceUpdate
from zofo_jax.sharding import multihost

FORMAT = "zofo_jax ledger 1"


class LedgerEntry(NamedTuple):
  """An outer step.

  Attributes:
    step: its number, from 1.
    coefficients: directional derivatives, float32 [Q].
    move: the update of θ; None if these numbers do not determine it.
  """

  step: int
  coefficients: np.ndarray
  move: InPlaceUpdate | None

  def serialize(self) -> str:
    """Returns the line, with its checksum and its newline."""
    move = self.move
    fields = [
      str(self.step),
      str(len(self.coefficients)),
      _hex(0.0 if move is None else move.learning_rate),
      _hex(0.0 if move is None else move.decay),
      _hex(self.coefficients),
      "-" if move is None else _hex(move.weights),
    ]
    return _sealed(" ".join(fields))


class Ledger(NamedTuple):
  """The content of a file.

  Attributes:
    header: what all entries depend on; see `replay.make_header`.
    lines: the steps from 1 on, without a gap.
    truncated: whether an incomplete last line was dropped.
  """

  header: dict[str, Any]
  lines: list[LedgerEntry]
  truncated: bool = False

  def serialize(self) -> str:
    """Returns the file's content, byte for byte."""
    return start(self.header) + "".join(line.serialize() for line in self.lines)


def start(header: dict[str, Any]) -> str:
  """Returns the first line."""
  return _sealed(json.dumps({"format": FORMAT, **header}, sort_keys=True))


def parse(content: bytes, source: str) -> Ledger:
  """Parses a ledger.

  A last line without its newline was cut off when a process ended, and is
  dropped.

  Args:
    content: of the file.
    source: the file's name, for messages.

  Returns:
    The ledger.

  Raises:
    UserError: names the line whose checksum is wrong or that cannot be parsed.
  """
  *complete, remainder = content.split(b"\n")
  if not complete:
    raise errors.UserError(f"'{source}' is no ledger: it has no whole line.")
  header = _header(_checked(complete[0], source, 1), source)
  lines = [
    _line(_checked(text, source, number), source, number)
    for number, text in enumerate(complete[1:], 2)
  ]
  return Ledger(header, lines, truncated=bool(remainder))


def read(path: epath.PathLike) -> Ledger:
  """Reads a ledger's file; see `parse`.

  Raises:
    UserError: there is no such file, or a line of it is corrupt.
  """
  path = epath.Path(path)
  if not path.is_file():
    raise errors.UserError(f"There is no ledger '{path}'.")
  return parse(path.read_bytes(), str(path))


class Writer:
  """Appends lines to a ledger; each is on the disk when the call returns.

  Of several processes only the first writes.
  """

  def __init__(self, path: epath.PathLike, content: str):
    """Writes `content` to the file, atomically, and opens it for appending.

    Args:
      path: the file; its folder exists.
      content: so far; at least the first line.
    """
    self.path = epath.Path(path)
    self._parts = [content]
    self._file: IO[Any] | None = None
    if not multihost.is_primary():
      return
    report.write_text(self.path, content)
    self._file = self.path.open("a")

  def append(self, line: LedgerEntry) -> None:
    """Appends a line."""
    self._parts.append(line.serialize())
    if self._file is None:
      return
    self._file.write(self._parts[-1])
    self._file.flush()
    try:
      os.fsync(self._file.fileno())
    except io.UnsupportedOperation:
      pass  # a remote file system

  def serialize(self) -> str:
    """Returns the file's content."""
    self._parts = ["".join(self._parts)]
    return self._parts[0]

  def close(self) -> None:
    """Closes the file."""
    if self._file is not None:
      self._file.close()


def _hex(values: Any) -> str:
  return np.asarray(values, ">f4").tobytes().hex()


def _floats(text: str) -> np.ndarray:
  return np.frombuffer(bytes.fromhex(text), ">f4").astype(np.float32)


def _sealed(text: str) -> str:
  return f"{text} {zlib.crc32(text.encode()):08x}\n"


def _checked(line: bytes, source: str, number: int) -> str:
  """Returns a line without its checksum, which is compared."""
  text, _, checksum = line.rpartition(b" ")
  expected = f"{zlib.crc32(text):08x}"
  if checksum != expected.encode():
    raise errors.UserError(
      f"'{source}' line {number} is corrupt: its checksum is "
      f"{checksum[:16].decode('ascii', 'replace')!r}, expected '{expected}'."
    )
  return text.decode("utf-8", "replace")


def _header(text: str, source: str) -> dict[str, Any]:
  try:
    header = json.loads(text)
    file_format = header.pop("format")
  except (ValueError, KeyError, AttributeError, TypeError):
    file_format = None
  if file_format != FORMAT:
    raise errors.UserError(
      f"'{source}' line 1: expected the header of a '{FORMAT}'; found "
      f"{text[:40]!r}."
    )
  return header


def _line(text: str, source: str, number: int) -> LedgerEntry:
  expected = number - 1
  try:
    step, count, rate, decay, coefficients, weights = text.split(" ")
    line = LedgerEntry(
      int(step),
      _floats(coefficients),
      None
      if weights == "-"
      else InPlaceUpdate(
        weights=_floats(weights),
        decay=_floats(decay)[0],
        learning_rate=_floats(rate)[0],
      ),
    )
    counts = {int(count), len(line.coefficients)}
    if line.move is not None:
      counts.add(len(line.move.weights))
  except (ValueError, IndexError):
    counts = set()
  if len(counts) != 1:
    raise errors.UserError(
      f"'{source}' line {number}: expected the six fields of a step; found "
      f"{text[:60]!r}."
    )
  if line.step != expected:
    raise errors.UserError(
      f"'{source}' line {number}: expected step {expected}; found {line.step}."
    )
  return line
