"""Fingerprints of rows, by which a run notices that its data has changed."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from zofo_jax import tasks
from zofo_jax.data import splits as splits_lib


def of_splits(splits: splits_lib.Splits) -> dict[str, dict[str, Any]]:
  """Returns the number of rows and the fingerprint of every split."""
  return {
    name: {"count": len(rows), "blake2b": of_rows(rows)}
    for name, rows in splits._asdict().items()
  }


def of_rows(rows: Iterable[tasks.Row]) -> str:
  """Returns a digest of the columns of rows, in their order."""
  digest = hashlib.blake2b(digest_size=16)
  encode = json.JSONEncoder(sort_keys=True, default=str).encode  # in ASCII
  for row in rows:
    digest.update(f"{encode(dict(row.fields))}\n".encode())
  return digest.hexdigest()
