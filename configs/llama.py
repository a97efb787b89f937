"""Models of the Llama family on one of the paper's tasks, with any adapter.

  zofo train --config=llama:size=smollm2-135m,task=rte --workdir=runs/llama

Weights and rows come from the Hugging Face hub (some models need a login), or
from local folders: --config.model.name=DIR and --config.data.dir=DIR. The other
arguments are those of configs/opt.py.
"""

from zofo_jax.config import presets

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
  """Returns the config of `size=...,task=...,adapter=...,method=...`."""
  return presets.paper_config(arg, SIZES, size="smollm2-135m")
