"""A tiny model and data set as files, for tests and fault injection."""

import json
import random

import flax.traverse_util
import numpy as np

# Weights that the runs of most tests move: a table, a stack of matrices and one
# of vectors.
MOVED = "embed|query|attention_norm"

_WORDS = ("a dull and cold", "a bright and warm")
_NOUNS = ("film", "story", "comedy", "ending", "cast", "score", "plot", "tale")
_PLACES = ("by the sea", "of two friends", "in the hills", "about a dog")
_NAMES = ("", " for Ann", " for Bob", " for all")


def base_config():
  """Returns the default config of a run on one device.

  The tests have eight devices; a run would use them all.
  """
  from zofo_jax.config import defaults

  config = defaults.base_config()
  config.mesh.data = 1
  return config


def _reviews():
  """Returns made-up rows of rotten_tomatoes, shuffled."""
  rows = [
    {"text": f"{word} {noun} {place}{name}", "label": label}
    for label, word in enumerate(_WORDS)
    for noun in _NOUNS
    for place in _PLACES
    for name in _NAMES
  ]
  random.Random(0).shuffle(rows)
  return rows


def _write_jsonl(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_rows(folder):
  """Writes train.jsonl (192 rows) and validation.jsonl (64 rows)."""
  rows = _reviews()
  _write_jsonl(folder / "train.jsonl", rows[64:])
  _write_jsonl(folder / "validation.jsonl", rows[:64])


def _save_tokenizer(folder):
  """Trains a byte-level tokenizer to which every option is one token."""
  import tokenizers
  import transformers
  from tokenizers import decoders, models, pre_tokenizers, trainers

  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  texts = [row["text"] + " It was" for row in _reviews()]
  texts += [" terrible", " great"] * 50
  trainer = trainers.BpeTrainer(
    vocab_size=400,
    special_tokens=["<s>", "</s>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
  ).save_pretrained(folder)


def write_model(folder):
  """Writes a Llama of two layers, width 32 and 64 tokens of context."""
  _save_tokenizer(folder)
  write_weights(
    folder,
    {
      "model_type": "llama",
      "vocab_size": 400,
      "hidden_size": 32,
      "intermediate_size": 64,
      "num_hidden_layers": 2,
      "num_attention_heads": 4,
      "num_key_value_heads": 2,
      "max_position_embeddings": 64,
      "tie_word_embeddings": False,
    },
  )


def write_gpt2(folder):
  """Writes a GPT-2 of the same size."""
  _save_tokenizer(folder)
  write_weights(
    folder,
    {
      "model_type": "gpt2",
      "vocab_size": 400,
      "n_embd": 32,
      "n_layer": 2,
      "n_head": 4,
      "n_positions": 64,
    },
  )


def write_roberta(folder):
  """Writes a RoBERTa of the same size, whose tokenizer has a mask."""
  import transformers

  _save_tokenizer(folder)
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  tokenizer.add_special_tokens({"mask_token": "<mask>", "pad_token": "</s>"})
  tokenizer.save_pretrained(folder)
  write_weights(
    folder,
    {
      "model_type": "roberta",
      "vocab_size": 401,
      "hidden_size": 32,
      "intermediate_size": 64,
      "num_hidden_layers": 2,
      "num_attention_heads": 4,
      "max_position_embeddings": 66,
      "type_vocab_size": 1,
    },
  )


def write_weights(folder, hf_config):
  """Writes config.json and random weights."""
  from zofo_jax import models
  from zofo_jax.models.hf import weights

  (folder / "config.json").write_text(json.dumps(hf_config))
  module, family = models.from_hf(hf_config)
  draw = np.random.RandomState(0)
  flat = {}
  for path, shape in weights.shapes(family, module.config).items():
    if path.endswith("scale"):
      flat[path] = np.ones(shape, np.float32)
      continue
    # Far larger than at a fresh start: random features that LoRA can read.
    size = {"embed": 1.0, "head": 0.3}.get(path.split("/")[0], 32**-0.5)
    flat[path] = size * draw.standard_normal(shape).astype(np.float32)
  base = flax.traverse_util.unflatten_dict(flat, sep="/")
  weights.save(folder, family, module.config, base)
