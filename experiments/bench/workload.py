"""The benchmark's workload: shapes of models, and random rows.

Weights and tokens are random; times depend on neither.
"""

import dataclasses
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class Decoder:
  """Sizes of a model, with names for both frameworks.

  Attributes:
    vocab_size: tokens.
    hidden_size: width.
    mlp_size: width inside the MLP.
    num_layers: blocks.
    num_heads: heads of queries.
    num_kv_heads: heads of keys and values.
    max_length: longest row.
  """

  vocab_size: int
  hidden_size: int
  mlp_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  max_length: int = 2048


@dataclasses.dataclass(frozen=True)
class Work:
  """Sizes of everything that is timed.

  Attributes:
    llama: model of the zeroth-order step and of evaluation.
    llama_rows: (rows, tokens) of the zeroth-order step.
    opt: model of the bilevel iteration.
    opt_rows: (rows, tokens) of each of its batches.
    lora_rank: rank of its two adapters, on queries and values.
    num_inner_steps: T.
    num_tasks: M of the iteration over tasks, each with batches of `opt_rows`.
    meta_inner_steps: T of that iteration.
    num_scored: rows of evaluation.
    scored_lengths: shortest and longest row of evaluation, in tokens.
    scored_batch: rows of evaluation at a time.
    population: members, prompts of each, tokens of a prompt, new tokens.
    dtype: of weights and arithmetic.
  """

  llama: Decoder
  llama_rows: tuple[int, int]
  opt: Decoder
  opt_rows: tuple[int, int]
  lora_rank: int
  num_inner_steps: int
  num_tasks: int
  meta_inner_steps: int
  num_scored: int
  scored_lengths: tuple[int, int]
  scored_batch: int
  population: tuple[int, int, int, int] = (32, 8, 64, 32)
  dtype: str = "float32"


FULL = Work(
  llama=Decoder(49152, 576, 1536, 30, 9, 3),  # SmolLM2-135M
  llama_rows=(16, 64),
  opt=Decoder(50272, 768, 3072, 12, 12, 12),  # OPT-125M
  opt_rows=(8, 40),
  lora_rank=8,
  num_inner_steps=10,
  num_tasks=4,
  meta_inner_steps=2,
  num_scored=128,
  scored_lengths=(8, 48),
  scored_batch=16,
)
# For a test of the benchmark itself.
TINY = Work(
  llama=Decoder(128, 16, 32, 2, 2, 1, 64),
  llama_rows=(4, 8),
  opt=Decoder(128, 16, 32, 2, 2, 2, 64),
  opt_rows=(2, 8),
  lora_rank=2,
  num_inner_steps=2,
  num_tasks=2,
  meta_inner_steps=1,
  num_scored=8,
  scored_lengths=(4, 12),
  scored_batch=4,
  population=(4, 2, 8, 4),
)
# For an accelerator.
LARGE = dataclasses.replace(
  FULL,
  llama=Decoder(32000, 2048, 5632, 22, 32, 4),  # TinyLlama-1.1B
  opt=Decoder(50272, 2048, 8192, 24, 32, 32),  # OPT-1.3B
  num_scored=1024,
  scored_batch=64,
  dtype="bfloat16",
)

WORKS = {"full": FULL, "large": LARGE, "tiny": TINY}


def toy(work: Work) -> Work:
  """Returns the same work with a tiny bilevel model."""
  return dataclasses.replace(work, opt=Decoder(128, 16, 32, 1, 2, 2, 64))


class Rows(NamedTuple):
  """Rows whose last hidden state predicts one token.

  Attributes:
    tokens: int32 [rows, length], padded at the right.
    lengths: int32 [rows], real tokens.
    targets: int32 [rows], the token after the last one.
  """

  tokens: np.ndarray
  lengths: np.ndarray
  targets: np.ndarray

  def mask(self) -> np.ndarray:
    """Returns bool [rows, length], True at real tokens."""
    return np.arange(self.tokens.shape[1])[None] < self.lengths[:, None]


def full_rows(shape: tuple[int, int], vocab_size: int, seed: int = 0) -> Rows:
  """Makes rows (count, length) without padding."""
  rng = np.random.default_rng(seed)
  count, length = shape
  return Rows(
    tokens=rng.integers(0, vocab_size, shape, np.int32),
    lengths=np.full(count, length, np.int32),
    targets=rng.integers(0, vocab_size, count, np.int32),
  )


def padded_rows(shape: tuple[int, int], vocab_size: int, seed: int) -> Rows:
  """Makes rows (count, length) of which only the first is full."""
  rows = full_rows(shape, vocab_size, seed)
  count, length = shape
  lengths = np.random.default_rng(seed).integers(
    length // 2, length + 1, count, np.int32
  )
  lengths[0] = length
  rows = rows._replace(lengths=lengths)
  return rows._replace(tokens=np.where(rows.mask(), rows.tokens, 1))


def scored_rows(work: Work, seed: int = 0) -> list[list[int]]:
  """Makes rows of different lengths to be scored, in no order."""
  rng = np.random.default_rng(seed)
  shortest, longest = work.scored_lengths
  lengths = rng.integers(shortest, longest + 1, work.num_scored)
  vocab_size = work.llama.vocab_size
  return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


# The two options' tokens in evaluation, as " terrible" and " great" would be.
OPTIONS = (7, 11)
