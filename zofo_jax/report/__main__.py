"""Compares runs on one page: `python -m zofo_jax.report`."""

import sys

from zofo_jax.commands import report

if __name__ == "__main__":
  sys.exit(report.main())
