"""OPT on one of the paper's tasks, with any adapter.

  python -m zofo_jax.main --config=configs/opt.py:size=125m,task=sst2 \
      --workdir=runs/opt

Weights and rows come from the Hugging Face hub; a local folder does as well:
--config.model.name=DIR and --config.data.dir=DIR. `preset=reference` takes the
choices of the paper's PyTorch code instead of this project's defaults, and
`adapter=prefix` another adapter than LoRA (see `config.adapter`).
"""

from zofo_jax.config import defaults

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
  """Returns the config of `size=...,task=...,adapter=...,method=...`.

  `method=mezo` and others are what Bilevel-ZOFO is compared with.
  """
  args = defaults.parse_arg(
    arg,
    size="125m",
    task="sst2",
    preset="paper",
    adapter="lora",
    method="bilevel",
  )
  config = defaults.base_config()
  config.model.name = defaults.choose("size", args["size"], SIZES)
  config.data.task = args["task"]
  config.adapter.kind = args["adapter"]
  config.method = args["method"]
  defaults.apply_preset(config, args["preset"])
  return config
