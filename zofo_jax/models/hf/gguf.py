"""Converts a GGUF file of the Llama family to a Hugging Face folder."""

import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from zofo_jax import errors
from zofo_jax.models.hf import tensor_files

# SmolLM2 was trained and published in bfloat16. The file's values are 4-bit:
# next to their error, rounding to bfloat16 is negligible, and float32 would
# double the size of the folder and of what a run reads.
DTYPE = np.dtype(ml_dtypes.bfloat16)

_TENSORS = {
  "token_embd": "model.embed_tokens",
  "output_norm": "model.norm",
  "output": "lm_head",
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}


def convert(source: pathlib.Path, folder: pathlib.Path) -> None:
  """Writes a GGUF file as a Hugging Face checkpoint folder.

  Knows the architecture `llama` with the tokenizer of SmolLM2.

  Args:
    source: the GGUF file; quantised tensors are dequantised.
    folder: an existing folder to write to.

  Raises:
    errors.UserError: if `gguf` is missing or the file is of another kind.
  """
  try:
    import gguf
  except ImportError:
    raise errors.UserError(
      "Converting the demo's model needs a package that is not installed;"
      " run: pip install gguf"
    ) from None
  import rich.console
  import rich.progress

  reader = gguf.GGUFReader(source)
  metadata = {name: f.contents() for name, f in reader.fields.items()}
  kind = (
    metadata.get("general.architecture"),
    metadata.get("tokenizer.ggml.pre"),
  )
  if kind != ("llama", "smollm"):
    raise errors.UserError(
      f"{source.name} holds architecture and tokenizer {kind}, expected"
      " ('llama', 'smollm')."
    )
  tied = all(t.name != "output.weight" for t in reader.tensors)
  config = _config(metadata, tied)
  heads = {
    "attn_q": config["num_attention_heads"],
    "attn_k": config["num_key_value_heads"],
  }
  tensors = {}
  for tensor in rich.progress.track(
    reader.tensors,
    description="Converting SmolLM2",
    console=rich.console.Console(stderr=True),
  ):
    *block, part, _ = tensor.name.split(".")
    value = gguf.dequantize(tensor.data, tensor.tensor_type)
    if part in heads:
      value = unpermute(value, heads[part])
    prefix = f"model.layers.{block[1]}." if block else ""
    tensors[f"{prefix}{_TENSORS[part]}.weight"] = value.astype(DTYPE)
  tensor_files.write_safetensors(folder / "model.safetensors", tensors)
  _write_json(folder / "config.json", config)
  _write_tokenizer(metadata, folder)


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
  """Undoes GGUF's order of the rows of a query or key projection.

  llama.cpp rotates neighbouring pairs of rows of a head, Hugging Face rotates
  row i with row i + size/2; the conversion to GGUF therefore interleaves the
  two halves of every head (`LlamaModel.permute` in convert_hf_to_gguf.py).

  Args:
    weight: [heads * size, D], rows (0, size/2, 1, size/2 + 1, ...) per head.
    heads: number of heads of this projection.

  Returns:
    The same rows in Hugging Face's order, [heads * size, D].
  """
  rows, width = weight.shape
  pairs = weight.reshape(heads, rows // heads // 2, 2, width)
  return pairs.swapaxes(1, 2).reshape(rows, width)


def _config(metadata: dict[str, Any], tied: bool) -> dict[str, Any]:
  """Returns Hugging Face's config.json for a GGUF file's metadata."""
  size = metadata["llama.embedding_length"]
  heads = metadata["llama.attention.head_count"]
  return {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
    "hidden_size": size,
    "intermediate_size": metadata["llama.feed_forward_length"],
    "num_hidden_layers": metadata["llama.block_count"],
    "num_attention_heads": heads,
    "num_key_value_heads": metadata["llama.attention.head_count_kv"],
    "head_dim": metadata.get("llama.rope.dimension_count", size // heads),
    "max_position_embeddings": metadata["llama.context_length"],
    "rope_theta": metadata["llama.rope.freq_base"],
    # Stored as float32: the shortest decimal is the original value.
    "rms_norm_eps": float(
      str(np.float32(metadata["llama.attention.layer_norm_rms_epsilon"]))
    ),
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": tied,
    "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
    "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
    "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    "torch_dtype": DTYPE.name,
  }


def _write_tokenizer(metadata: dict[str, Any], folder: pathlib.Path) -> None:
  """Writes tokenizer.json and tokenizer_config.json.

  Byte-level BPE after splitting every digit off: the pre-tokenizer that
  llama.cpp calls `smollm`.
  """
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers

  tokens = metadata["tokenizer.ggml.tokens"]
  merges = [tuple(m.split(" ")) for m in metadata["tokenizer.ggml.merges"]]
  vocabulary = {token: i for i, token in enumerate(tokens)}
  tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  control, user_defined = 3, 4  # gguf.TokenType
  types = metadata["tokenizer.ggml.token_type"]
  for kind, add in (
    (control, tokenizer.add_special_tokens),
    (user_defined, tokenizer.add_tokens),
  ):
    add(
      [
        tokenizers.AddedToken(token, normalized=False, special=kind == control)
        for token, type_ in zip(tokens, types, strict=True)
        if type_ == kind
      ]
    )
  tokenizer.save(str(folder / "tokenizer.json"))
  special = {
    f"{name}_token": tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
    for name, key in (
      ("bos", "bos"),
      ("eos", "eos"),
      ("unk", "unknown"),
      ("pad", "padding"),
    )
  }
  _write_json(folder / "special_tokens_map.json", special)
  _write_json(
    folder / "tokenizer_config.json",
    {
      "tokenizer_class": "PreTrainedTokenizerFast",
      "model_max_length": metadata["llama.context_length"],
      "add_prefix_space": False,
      "clean_up_tokenization_spaces": False,
      "chat_template": metadata.get("tokenizer.chat_template"),
      **special,
    },
  )


def _write_json(path: pathlib.Path, value: Any) -> None:
  path.write_text(
    json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8"
  )
