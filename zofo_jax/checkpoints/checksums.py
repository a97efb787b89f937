"""Integrity of checkpoints: the SHA-256 of every file, in `checksums.json`."""

import hashlib
import json
from collections.abc import Iterator

from etils import epath

from zofo_jax import errors, report

CHECKSUMS = "checksums.json"


class CorruptCheckpointError(errors.UserError):
  """A checkpoint whose files are not as they were written."""


def has_checksums(folder: epath.Path) -> bool:
  """Returns whether a folder has checksums."""
  return (folder / CHECKSUMS).exists()


def write_checksums(folder: epath.Path) -> None:
  """Writes the checksums of all files of a folder, atomically."""
  digests = {name: _digest(folder / name) for name in _files(folder)}
  report.write_json(folder / CHECKSUMS, digests)


def verify(folder: epath.Path) -> None:
  """Compares the files of a folder with their checksums.

  Raises:
    CorruptCheckpointError: names the file that is missing or differs.
  """
  path = folder / CHECKSUMS
  try:
    expected = dict(json.loads(path.read_text()))
  except (ValueError, TypeError) as error:
    raise CorruptCheckpointError(f"'{path}' is corrupt ({error}).") from error
  for name, digest in expected.items():
    if not (folder / name).is_file():
      raise CorruptCheckpointError(f"The checkpoint '{folder}' lacks '{name}'.")
    if _digest(folder / name) != digest:
      raise CorruptCheckpointError(
        f"The checkpoint '{folder}' is corrupt: '{name}' differs from its "
        "checksum."
      )


def quarantine(folder: epath.Path) -> epath.Path:
  """Moves a corrupt checkpoint out of the way, under its own name.

  Args:
    folder: such as `run/checkpoints/4`.

  Returns:
    Where it is now: `run/damaged/checkpoints/4`.
  """
  target = quarantine_folder(folder.parent) / folder.name
  target.parent.mkdir(parents=True, exist_ok=True)
  if target.exists():
    target.rmtree()
  folder.rename(target)
  return target


def quarantine_folder(checkpoints: epath.Path) -> epath.Path:
  """Returns where corrupt checkpoints of a folder are moved to."""
  return checkpoints.parent / "damaged" / checkpoints.name


def _files(folder: epath.Path, prefix: str = "") -> Iterator[str]:
  """Yields the names of all files in a folder, those in folders included."""
  for path in sorted(folder.iterdir()):
    name = prefix + path.name
    if path.is_dir():
      yield from _files(path, name + "/")
    elif path.name not in (CHECKSUMS, CHECKSUMS + ".tmp"):
      yield name


def _digest(path: epath.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
