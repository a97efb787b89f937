"""Exports a run's result: `python -m zofo_jax.export`."""

import sys

from zofo_jax.commands import export

if __name__ == "__main__":
  sys.exit(export.main())
