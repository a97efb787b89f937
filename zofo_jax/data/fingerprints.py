"""Fingerprints of rows, by which a run notices that its data has changed."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from zofo_jax import tasks

# Of the columns, in ASCII, whatever their order.
_encode = json.JSONEncoder(sort_keys=True, default=str).encode


def of_splits(
  splits: Mapping[str, Sequence[tasks.Row]],
) -> dict[str, dict[str, Any]]:
  """Returns the number of rows and the fingerprint of every split."""
  return {
    name: {"count": len(rows), "blake2b": of_rows(rows)}
    for name, rows in splits.items()
  }


def of_rows(rows: Iterable[tasks.Row]) -> str:
  """Returns a digest of the columns of rows, in their order."""
  digest = hashlib.blake2b(digest_size=16)
  for row in rows:
    digest.update(f"{_encode(dict(row.fields))}\n".encode())
  return digest.hexdigest()
