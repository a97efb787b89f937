"""The ledger: a few numbers for each step, from which θ is rebuilt.

`python -m zofo_jax.ledger` is its command line.
"""

from zofo_jax.checkpoints.ledger.format import (
  Ledger,
  LedgerEntry,
  Writer,
  parse,
  read,
  start,
)
from zofo_jax.checkpoints.ledger.replay import (
  advance,
  fingerprint,
  load_start,
  make_header,
)

__all__ = [
  "Ledger",
  "LedgerEntry",
  "Writer",
  "advance",
  "fingerprint",
  "load_start",
  "make_header",
  "parse",
  "read",
  "start",
]
