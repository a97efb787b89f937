"""Qwen 3 and 2.5 on one of the paper's tasks, with any adapter.

  zofo train --config=qwen:size=3-0.6b,task=sst2 --workdir=runs/qwen

The other arguments are those of configs/opt.py.
"""

from zofo_jax.config import presets

SIZES = {
  "3-0.6b": "Qwen/Qwen3-0.6B",
  "3-1.7b": "Qwen/Qwen3-1.7B",
  "3-4b": "Qwen/Qwen3-4B",
  "3-8b": "Qwen/Qwen3-8B",
  "3-14b": "Qwen/Qwen3-14B",
  "3-32b": "Qwen/Qwen3-32B",
  "2.5-0.5b": "Qwen/Qwen2.5-0.5B",
  "2.5-1.5b": "Qwen/Qwen2.5-1.5B",
  "2.5-7b": "Qwen/Qwen2.5-7B",
}


def get_config(arg: str = ""):
  """Returns the config of `size=...,task=...,adapter=...,method=...`."""
  return presets.paper_config(arg, SIZES, size="3-0.6b")
