"""GPT-2 and Pythia on one of the paper's tasks, with any adapter.

  zofo train --config=gpt2:size=gpt2,task=sst2 --workdir=runs/gpt2

The other arguments are those of configs/opt.py.
"""

from zofo_jax.config import presets

SIZES = {
  "gpt2": "openai-community/gpt2",
  "gpt2-medium": "openai-community/gpt2-medium",
  "gpt2-large": "openai-community/gpt2-large",
  "gpt2-xl": "openai-community/gpt2-xl",
  "pythia-70m": "EleutherAI/pythia-70m",
  "pythia-160m": "EleutherAI/pythia-160m",
  "pythia-410m": "EleutherAI/pythia-410m",
  "pythia-1b": "EleutherAI/pythia-1b",
  "pythia-1.4b": "EleutherAI/pythia-1.4b",
  "pythia-2.8b": "EleutherAI/pythia-2.8b",
  "pythia-6.9b": "EleutherAI/pythia-6.9b",
  "pythia-12b": "EleutherAI/pythia-12b",
}


def get_config(arg: str = ""):
  """Returns the config of `size=...,task=...,adapter=...,method=...`."""
  return presets.paper_config(arg, SIZES, size="gpt2")
