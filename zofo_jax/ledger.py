"""`python -m zofo_jax.ledger`: the same as `zofo ledger`."""

import sys

from zofo_jax import main

if __name__ == "__main__":
  sys.exit(main.main(["ledger", *sys.argv[1:]]))
