"""`python -m zofo_jax.report`: the same as `zofo report`."""

import sys

from zofo_jax import main

if __name__ == "__main__":
  sys.exit(main.main(["report", *sys.argv[1:]]))
