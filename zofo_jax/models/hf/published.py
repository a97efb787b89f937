"""The config.json of published models, for planning without network access.

Only the fields that affect the compiled program.
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


def _gpt2(size: int, num_layers: int, num_heads: int) -> dict[str, Any]:
  return {
    "model_type": "gpt2",
    "vocab_size": 50257,
    "n_embd": size,
    "n_layer": num_layers,
    "n_head": num_heads,
    "n_positions": 1024,
  }


def _pythia(
  hidden_size: int, num_layers: int, num_heads: int, vocab_size: int = 50304
) -> dict[str, Any]:
  return {
    "model_type": "gpt_neox",
    "vocab_size": vocab_size,
    "hidden_size": hidden_size,
    "intermediate_size": 4 * hidden_size,
    "num_hidden_layers": num_layers,
    "num_attention_heads": num_heads,
    "max_position_embeddings": 2048,
  }


def _qwen3(
  hidden_size: int,
  mlp_size: int,
  num_layers: int,
  num_heads: int,
  tied: bool = False,
) -> dict[str, Any]:
  return _llama(
    151936,
    hidden_size,
    mlp_size,
    num_layers,
    (num_heads, 8),
    40960,
    model_type="qwen3",
    head_dim=128,
    rope_theta=1e6,
    tie_word_embeddings=tied,
  )


def _falcon(
  hidden_size: int, num_layers: int, num_heads: int, **more: Any
) -> dict[str, Any]:
  return {
    "model_type": "falcon",
    "vocab_size": 65024,
    "hidden_size": hidden_size,
    "num_hidden_layers": num_layers,
    "num_attention_heads": num_heads,
    **more,
  }


def _bert(
  model_type: str, vocab_size: int, positions: int, *, large: bool = False
) -> dict[str, Any]:
  return {
    "model_type": model_type,
    "vocab_size": vocab_size,
    "hidden_size": 1024 if large else 768,
    "intermediate_size": 4096 if large else 3072,
    "num_hidden_layers": 24 if large else 12,
    "num_attention_heads": 16 if large else 12,
    "max_position_embeddings": positions,
    "type_vocab_size": 2 if model_type == "bert" else 1,
  }


def _starcoder2(
  hidden_size: int, mlp_size: int, num_layers: int, heads: tuple[int, int]
) -> dict[str, Any]:
  config = _llama(49152, hidden_size, mlp_size, num_layers, heads, 16384)
  del config["rms_norm_eps"]
  return config | {
    "model_type": "starcoder2",
    "sliding_window": 4096,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
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

_OLMO2: dict[str, Any] = {"model_type": "olmo2", "rope_theta": 5e5}
_GRANITE: dict[str, Any] = {
  "model_type": "granite",
  "rope_theta": 5e6,
  "embedding_multiplier": 12.0,
  "residual_multiplier": 0.22,
  **_TIED,
}
_GEMMA2: dict[str, Any] = {
  "model_type": "gemma2",
  "head_dim": 256,
  "sliding_window": 4096,
  **_TIED,
}
_GEMMA3: dict[str, Any] = {
  "model_type": "gemma3_text",
  "head_dim": 256,
  "sliding_window": 512,
  **_TIED,
}
# How far each frequency is stretched does not affect the program.
_LONGROPE: dict[str, Any] = {
  "original_max_position_embeddings": 4096,
  "partial_rotary_factor": 0.75,
  "rope_scaling": {
    "type": "longrope",
    "short_factor": [1.0] * 48,
    "long_factor": [1.0] * 48,
  },
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
  "facebook/opt-175b": _opt(12288, 96, 96),
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
  "openai-community/gpt2": _gpt2(768, 12, 12),
  "openai-community/gpt2-medium": _gpt2(1024, 24, 16),
  "openai-community/gpt2-large": _gpt2(1280, 36, 20),
  "openai-community/gpt2-xl": _gpt2(1600, 48, 25),
  "EleutherAI/pythia-70m": _pythia(512, 6, 8),
  "EleutherAI/pythia-160m": _pythia(768, 12, 12),
  "EleutherAI/pythia-410m": _pythia(1024, 24, 16),
  "EleutherAI/pythia-1b": _pythia(2048, 16, 8),
  "EleutherAI/pythia-1.4b": _pythia(2048, 24, 16),
  "EleutherAI/pythia-2.8b": _pythia(2560, 32, 32),
  "EleutherAI/pythia-6.9b": _pythia(4096, 32, 32, 50432),
  "EleutherAI/pythia-12b": _pythia(5120, 36, 40, 50688),
  "Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, tied=True),
  "Qwen/Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, tied=True),
  "Qwen/Qwen3-4B": _qwen3(2560, 9728, 36, 32, tied=True),
  "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32),
  "Qwen/Qwen3-14B": _qwen3(5120, 17408, 40, 40),
  "Qwen/Qwen3-32B": _qwen3(5120, 25600, 64, 64),
  "allenai/OLMo-2-0425-1B": _llama(
    100352, 2048, 8192, 16, (16, 16), 4096, **_OLMO2
  ),
  "allenai/OLMo-2-1124-7B": _llama(
    100352, 4096, 11008, 32, (32, 32), 4096, **_OLMO2
  ),
  "allenai/OLMo-2-1124-13B": _llama(
    100352, 5120, 13824, 40, (40, 40), 4096, **_OLMO2
  ),
  "allenai/OLMo-2-0325-32B": _llama(
    100352, 5120, 27648, 64, (40, 8), 4096, **_OLMO2
  ),
  "HuggingFaceTB/SmolLM3-3B": _llama(
    128256,
    2048,
    11008,
    36,
    (16, 4),
    65536,
    model_type="smollm3",
    rope_theta=5e6,
    **_TIED,
  ),
  "ibm-granite/granite-3.1-2b-base": _llama(
    49152,
    2048,
    8192,
    40,
    (32, 8),
    131072,
    logits_scaling=8.0,
    attention_multiplier=0.015625,
    **_GRANITE,
  ),
  "ibm-granite/granite-3.1-8b-base": _llama(
    49152,
    4096,
    12800,
    40,
    (32, 8),
    131072,
    logits_scaling=16.0,
    attention_multiplier=0.0078125,
    **_GRANITE,
  ),
  "microsoft/Phi-3-mini-4k-instruct": _llama(
    32064,
    3072,
    8192,
    32,
    (32, 32),
    4096,
    model_type="phi3",
    sliding_window=2047,
  ),
  "microsoft/Phi-4-mini-instruct": _llama(
    200064,
    3072,
    8192,
    32,
    (24, 8),
    131072,
    model_type="phi3",
    **_LONGROPE | _TIED,
  ),
  "microsoft/phi-4": _llama(
    100352,
    5120,
    17920,
    40,
    (40, 10),
    16384,
    model_type="phi3",
    rope_theta=2.5e5,
  ),
  "google/gemma-2b": _llama(
    256000,
    2048,
    16384,
    18,
    (8, 1),
    8192,
    model_type="gemma",
    head_dim=256,
    **_TIED,
  ),
  "google/gemma-7b": _llama(
    256000,
    3072,
    24576,
    28,
    (16, 16),
    8192,
    model_type="gemma",
    head_dim=256,
    **_TIED,
  ),
  "google/gemma-2-2b": _llama(256000, 2304, 9216, 26, (8, 4), 8192, **_GEMMA2),
  "google/gemma-2-9b": _llama(
    256000, 3584, 14336, 42, (16, 8), 8192, **_GEMMA2
  ),
  "google/gemma-2-27b": _llama(
    256000,
    4608,
    36864,
    46,
    (32, 16),
    8192,
    **_GEMMA2 | {"head_dim": 128, "query_pre_attn_scalar": 144},
  ),
  "google/gemma-3-270m": _llama(
    262144, 640, 2048, 18, (4, 1), 32768, **_GEMMA3
  ),
  "google/gemma-3-1b-pt": _llama(
    262144, 1152, 6912, 26, (4, 1), 32768, **_GEMMA3
  ),
  "bigcode/starcoder2-3b": _starcoder2(3072, 12288, 30, (24, 2)),
  "bigcode/starcoder2-7b": _starcoder2(4608, 18432, 32, (36, 4)),
  "bigcode/starcoder2-15b": _starcoder2(6144, 24576, 40, (48, 4)),
  "tiiuae/falcon-7b": _falcon(4544, 32, 71),
  "tiiuae/falcon-40b": _falcon(
    8192, 60, 128, new_decoder_architecture=True, num_kv_heads=8
  ),
  "google-bert/bert-base-uncased": _bert("bert", 30522, 512),
  "google-bert/bert-base-cased": _bert("bert", 28996, 512),
  "google-bert/bert-large-uncased": _bert("bert", 30522, 512, large=True),
  "FacebookAI/roberta-base": _bert("roberta", 50265, 514),
  "FacebookAI/roberta-large": _bert("roberta", 50265, 514, large=True),
  "FacebookAI/xlm-roberta-base": _bert("xlm-roberta", 250002, 514),
  "FacebookAI/xlm-roberta-large": _bert("xlm-roberta", 250002, 514, large=True),
}
