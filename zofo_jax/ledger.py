"""Reads and replays a ledger: `python -m zofo_jax.ledger`."""

import sys

from zofo_jax.commands import ledger

if __name__ == "__main__":
  sys.exit(ledger.main())
