"""Seals of checkpoints: the SHA-256 of every file, in `checksums.json`."""

import hashlib
import json
from collections.abc import Iterator

from etils import epath

from zofo_jax import errors

SEAL = "checksums.json"


class DamagedError(errors.UserError):
  """A checkpoint that is not as it was written."""


def is_sealed(folder: epath.Path) -> bool:
  """Tells whether a folder's checksums were written."""
  return (folder / SEAL).exists()


def write(folder: epath.Path) -> None:
  """Writes the checksums of all files of a folder, in one piece."""
  digests = {name: _digest(folder / name) for name in _files(folder)}
  beside = folder / (SEAL + ".tmp")
  beside.write_text(json.dumps(digests, indent=2) + "\n")
  beside.rename(folder / SEAL)


def check(folder: epath.Path) -> None:
  """Compares the files of a sealed folder with their checksums.

  Raises:
    DamagedError: names the file that is not as it was written.
  """
  try:
    expected = dict(json.loads((folder / SEAL).read_text()))
  except (ValueError, TypeError) as error:
    raise DamagedError(f"'{folder / SEAL}' is damaged ({error}).") from error
  for name, digest in expected.items():
    if not (folder / name).is_file():
      raise DamagedError(f"The checkpoint '{folder}' has lost '{name}'.")
    if _digest(folder / name) != digest:
      raise DamagedError(
        f"The checkpoint '{folder}' is damaged: '{name}' is not as it was "
        "written."
      )


def _files(folder: epath.Path, prefix: str = "") -> Iterator[str]:
  """Yields the names of all files in a folder, those in folders included."""
  for path in sorted(folder.iterdir()):
    name = prefix + path.name
    if path.is_dir():
      yield from _files(path, name + "/")
    elif path.name not in (SEAL, SEAL + ".tmp"):
      yield name


def _digest(path: epath.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
