"""Gemma 3 and 2 on one of the paper's tasks, with any adapter.

  zofo train --config=gemma:size=3-270m,task=sst2 --workdir=runs/gemma

The other arguments are those of configs/opt.py.
"""

from zofo_jax.config import presets

SIZES = {
  "3-270m": "google/gemma-3-270m",
  "3-1b": "google/gemma-3-1b-pt",
  "2-2b": "google/gemma-2-2b",
  "2-9b": "google/gemma-2-9b",
  "2-27b": "google/gemma-2-27b",
}


def get_config(arg: str = ""):
  """Returns the config of `size=...,task=...,adapter=...,method=...`."""
  return presets.paper_config(arg, SIZES, size="3-270m")
