"""Models of the Llama family on one of the paper's tasks, with any adapter.

  python -m zofo_jax.main --config=configs/llama.py:size=smollm2-135m,task=rte \
      --workdir=runs/llama

Weights and rows come from the Hugging Face hub (some of these ask for a login
first); a local folder does as well: --config.model.name=DIR and
--config.data.dir=DIR.
"""

from zofo_jax.config import defaults

SIZES = {
  "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
  "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
  "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B",
  "tinyllama": "TinyLlama/TinyLlama_v1.1",
  "7b": "meta-llama/Llama-2-7b-hf",
  "13b": "meta-llama/Llama-2-13b-hf",
  "70b": "meta-llama/Llama-2-70b-hf",
  "2-7b": "meta-llama/Llama-2-7b-hf",
  "2-13b": "meta-llama/Llama-2-13b-hf",
  "2-70b": "meta-llama/Llama-2-70b-hf",
  "3.1-8b": "meta-llama/Llama-3.1-8B",
  "3.1-70b": "meta-llama/Llama-3.1-70B",
  "3.2-1b": "meta-llama/Llama-3.2-1B",
  "3.2-3b": "meta-llama/Llama-3.2-3B",
  "mistral-7b": "mistralai/Mistral-7B-v0.3",
  "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
  "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
  "qwen2.5-7b": "Qwen/Qwen2.5-7B",
}


def get_config(arg: str = ""):
  """Returns the config of `size=...,task=...,adapter=...,method=...`.

  `method=mezo` and others are what Bilevel-ZOFO is compared with.
  """
  args = defaults.parse_arg(
    arg,
    size="smollm2-135m",
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
