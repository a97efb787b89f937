"""Whether a run fits, before there are devices or weights.

  python -m zofo_jax.plan --config=configs/llama.py:size=70b \
      --topology=v5p:4x4x4 --json=PLAN.json

The same as `python -m zofo_jax.main plan`; see `zofo_jax.plan.planner`.
"""

import sys

from zofo_jax import main

if __name__ == "__main__":
  sys.exit(main.main([sys.argv[0], "plan", *sys.argv[1:]]))
