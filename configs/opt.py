"""OPT on one of the paper's tasks, with any adapter.

  zofo train --config=opt:size=125m,task=sst2 --workdir=runs/opt

Weights and rows come from the Hugging Face hub, or from local folders:
--config.model.name=DIR and --config.data.dir=DIR. `method=mezo` and others are
the baselines, `adapter=prefix` replaces LoRA, and `preset=reference` makes the
choices of the paper's PyTorch code instead of this project's defaults.
"""

from zofo_jax.config import presets

SIZES = {
  size: f"facebook/opt-{size}"
  for size in (
    "125m",
    "350m",
    "1.3b",
    "2.7b",
    "6.7b",
    "13b",
    "30b",
    "66b",
  )
}


def get_config(arg: str = ""):
  """Returns the config of `size=...,task=...,adapter=...,method=...`."""
  return presets.paper_config(arg, SIZES, size="125m")
