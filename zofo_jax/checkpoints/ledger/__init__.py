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
  check_base,
  fingerprint,
  make_header,
)

__all__ = [
  "Ledger",
  "LedgerEntry",
  "Writer",
  "advance",
  "check_base",
  "fingerprint",
  "make_header",
  "parse",
  "read",
  "start",
]
