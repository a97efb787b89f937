"""`python -m zofo_jax.plan`: the same as `zofo plan`."""

import sys

from zofo_jax import main

if __name__ == "__main__":
  sys.exit(main.main(["plan", *sys.argv[1:]]))
