"""`python -m zofo_jax.sweep`: the same as `zofo sweep`."""

import sys

from zofo_jax import main

if __name__ == "__main__":
  sys.exit(main.main(["sweep", *sys.argv[1:]]))
