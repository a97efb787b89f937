"""Runs one config with many settings: `python -m zofo_jax.sweep`."""

import sys

from zofo_jax.commands import sweep

if __name__ == "__main__":
  sys.exit(sweep.main())
