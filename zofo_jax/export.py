"""`python -m zofo_jax.export`: the same as `zofo export`."""

import sys

from zofo_jax import main

if __name__ == "__main__":
  sys.exit(main.main(["export", *sys.argv[1:]]))
