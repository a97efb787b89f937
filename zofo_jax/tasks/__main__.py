"""`python -m zofo_jax.tasks`: the same as `zofo tasks`."""

import sys

from zofo_jax import main

if __name__ == "__main__":
  sys.exit(main.main(["tasks", *sys.argv[1:]]))
