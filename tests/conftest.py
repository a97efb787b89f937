"""Settings of every test, made before any device is used, and tiny data.

The fixtures are a checkpoint folder as Hugging Face's, of two layers and with
random weights, a folder of rows whose label one word decides, and the command
line as a function.
"""

import json
import random
import sys
import warnings

import flax.traverse_util
import jax
import numpy as np
import pytest

from zofo_jax import config as config_lib

jax.config.update("jax_platforms", "cpu")
# Sharding is tested on one machine: eight devices in one process.
jax.config.update("jax_num_cpu_devices", 8)
# Broadcasting between different ranks is written out, or it is a mistake.
jax.config.update("jax_numpy_rank_promotion", "raise")
# Comparisons see rounding of float32, never of a faster matrix product.
jax.config.update("jax_default_matmul_precision", "highest")

# A run is on one device unless a test asks for more.
_base_config = config_lib.base_config


def _on_one_device():
  config = _base_config()
  config.mesh.data = 1
  return config


config_lib.base_config = _on_one_device

_WORDS = ("a dull and cold", "a bright and warm")
_NOUNS = ("film", "story", "comedy", "ending", "cast", "score", "plot", "tale")
_PLACES = ("by the sea", "of two friends", "in the hills", "about a dog")
_NAMES = ("", " for Ann", " for Bob", " for all")


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


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory):
  """A folder with train.jsonl (192 rows) and validation.jsonl (64 rows)."""
  folder = tmp_path_factory.mktemp("rows")
  rows = _reviews()
  _write_jsonl(folder / "train.jsonl", rows[64:])
  _write_jsonl(folder / "validation.jsonl", rows[:64])
  return folder


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


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
  """A Llama checkpoint of two layers, width 32 and 64 tokens of context."""
  from zofo_jax.models import llama, weights

  folder = tmp_path_factory.mktemp("model")
  _save_tokenizer(folder)
  hf_config = {
    "model_type": "llama",
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
  }
  (folder / "config.json").write_text(json.dumps(hf_config))
  config = llama.config_from_hf(hf_config)
  draw = np.random.RandomState(0)
  flat = {}
  for path, shape in weights.shapes(llama, config).items():
    if path.endswith("scale"):
      flat[path] = np.ones(shape, np.float32)
      continue
    # Far larger than at a fresh start: random features that LoRA can read.
    size = {"embed": 1.0, "head": 0.3}.get(path.split("/")[0], 32**-0.5)
    flat[path] = size * draw.standard_normal(shape).astype(np.float32)
  base = flax.traverse_util.unflatten_dict(flat, sep="/")
  weights.save(folder, llama, config, base)
  return folder


@pytest.fixture(scope="session")
def command_line():
  """The command line as a function of its arguments; returns the exit code."""
  from absl.testing import flagsaver

  from zofo_jax import main

  def run(*arguments):
    # Flags are global, and --config.* defines more of them: all is put back.
    with (
      pytest.MonkeyPatch.context() as patch,
      flagsaver.flagsaver(),
      warnings.catch_warnings(),
    ):
      # ml_collections loads a config file the old way.
      warnings.filterwarnings("ignore", "the load_module", DeprecationWarning)
      # There a file without get_config would find that of the last one.
      patch.delitem(sys.modules, "config_config", raising=False)
      patch.setattr(sys, "argv", ["zofo_jax", *map(str, arguments)])
      return main.main()

  return run
