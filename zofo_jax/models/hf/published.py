"""The config.json of published models, for planning without network access.

Only the fields that affect the compiled program, for the models in `configs/`.
"""

from typing import Any


def _opt(
  hidden_size: int, num_layers: int, num_heads: int, **more: Any
) -> dict[str, Any]:
  return {
    "model_type": "opt",
    "vocab_size": 50272,
    "hidden_size": hidden_size,
    "ffn_dim": 4 * hidden_size,
    "num_hidden_layers": num_layers,
    "num_attention_heads": num_heads,
    "max_position_embeddings": 2048,
    "word_embed_proj_dim": hidden_size,
    **more,
  }


def _llama(
  vocab_size: int,
  hidden_size: int,
  mlp_size: int,
  num_layers: int,
  heads: tuple[int, int],
  max_length: int,
  **more: Any,
) -> dict[str, Any]:
  return {
    "model_type": "llama",
    "vocab_size": vocab_size,
    "hidden_size": hidden_size,
    "intermediate_size": mlp_size,
    "num_hidden_layers": num_layers,
    "num_attention_heads": heads[0],
    "num_key_value_heads": heads[1],
    "max_position_embeddings": max_length,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    **more,
  }


def _llama3(factor: float) -> dict[str, Any]:
  return {
    "rope_theta": 500000.0,
    "rope_scaling": {
      "rope_type": "llama3",
      "factor": factor,
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
      "original_max_position_embeddings": 8192,
    },
  }


_TIED = {"tie_word_embeddings": True}
_QWEN: dict[str, Any] = {
  "model_type": "qwen2",
  "rms_norm_eps": 1e-6,
  "rope_theta": 1e6,
}

CONFIGS: dict[str, dict[str, Any]] = {
  "facebook/opt-125m": _opt(768, 12, 12),
  "facebook/opt-350m": _opt(
    1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False
  ),
  "facebook/opt-1.3b": _opt(2048, 24, 32),
  "facebook/opt-2.7b": _opt(2560, 32, 32),
  "facebook/opt-6.7b": _opt(4096, 32, 32),
  "facebook/opt-13b": _opt(5120, 40, 40),
  "facebook/opt-30b": _opt(7168, 48, 56),
  "facebook/opt-66b": _opt(9216, 64, 72),
  "HuggingFaceTB/SmolLM2-135M": _llama(
    49152, 576, 1536, 30, (9, 3), 8192, rope_theta=1e5, **_TIED
  ),
  "HuggingFaceTB/SmolLM2-360M": _llama(
    49152, 960, 2560, 32, (15, 5), 8192, rope_theta=1e5, **_TIED
  ),
  "HuggingFaceTB/SmolLM2-1.7B": _llama(
    49152, 2048, 8192, 24, (32, 32), 8192, rope_theta=1.3e5, **_TIED
  ),
  "TinyLlama/TinyLlama_v1.1": _llama(32000, 2048, 5632, 22, (32, 4), 2048),
  "meta-llama/Llama-2-7b-hf": _llama(32000, 4096, 11008, 32, (32, 32), 4096),
  "meta-llama/Llama-2-13b-hf": _llama(32000, 5120, 13824, 40, (40, 40), 4096),
  "meta-llama/Llama-2-70b-hf": _llama(32000, 8192, 28672, 80, (64, 8), 4096),
  "meta-llama/Llama-3.1-8B": _llama(
    128256, 4096, 14336, 32, (32, 8), 131072, **_llama3(8.0)
  ),
  "meta-llama/Llama-3.1-70B": _llama(
    128256, 8192, 28672, 80, (64, 8), 131072, **_llama3(8.0)
  ),
  "meta-llama/Llama-3.2-1B": _llama(
    128256, 2048, 8192, 16, (32, 8), 131072, **_llama3(32.0), **_TIED
  ),
  "meta-llama/Llama-3.2-3B": _llama(
    128256, 3072, 8192, 28, (24, 8), 131072, **_llama3(32.0), **_TIED
  ),
  "mistralai/Mistral-7B-v0.3": _llama(
    32768,
    4096,
    14336,
    32,
    (32, 8),
    32768,
    model_type="mistral",
    rope_theta=1e6,
    sliding_window=None,
  ),
  "Qwen/Qwen2.5-0.5B": _llama(
    151936, 896, 4864, 24, (14, 2), 32768, **_QWEN | _TIED
  ),
  "Qwen/Qwen2.5-1.5B": _llama(
    151936, 1536, 8960, 28, (12, 2), 131072, **_QWEN | _TIED
  ),
  "Qwen/Qwen2.5-7B": _llama(152064, 3584, 18944, 28, (28, 4), 131072, **_QWEN),
}
