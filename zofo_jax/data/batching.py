"""Batches of fixed shape.

The rows of a training batch are a pure function of (seed, batch number), so a
run resumes without any iterator state.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from zofo_jax.core import losses
from zofo_jax.data import encode_options

# Sequence lengths that evaluation compiles for: two per power of two, which
# keeps padding below a third and the number of programs small.
_BUCKETS = tuple(
  sorted({2**i for i in range(4, 17)} | {3 * 2**i for i in range(3, 16)})
)


class Shape(NamedTuple):
  """Static sizes of a batch: rows, length, positions, targets, options."""

  rows: int
  length: int
  positions: int
  targets: int
  options: int


class EvalBatch(NamedTuple):
  """A batch and the index of each of its examples in the data set.

  Attributes:
    batch: the arrays.
    indices: int [B], into the data set; -1 for padding examples.
  """

  batch: losses.Batch
  indices: np.ndarray


class PromptBatch(NamedTuple):
  """A batch of prompts and the index of each one in the data set.

  Attributes:
    tokens: int32 [B, L], padded on the left.
    mask: bool [B, L], True at real tokens.
    indices: int [B], into the data set; -1 for padding prompts.
  """

  tokens: np.ndarray
  mask: np.ndarray
  indices: np.ndarray


def batch_indices(
  seed: int, num_rows: int, batch_size: int, index: int
) -> np.ndarray:
  """Returns the row indices of batch number `index`.

  Batches are consecutive pieces of an endless sequence of seeded permutations,
  one per epoch. Every row occurs once per epoch; a batch may span two epochs.

  Args:
    seed: seed of the permutations; use a different one for each stream.
    num_rows: rows of the data set.
    batch_size: rows of a batch.
    index: number of the batch, from 0.

  Returns:
    int64, shape [batch_size].
  """
  indices = np.arange(index * batch_size, (index + 1) * batch_size)
  return np.array(
    [_epoch(seed, num_rows, p // num_rows)[p % num_rows] for p in indices]
  )


@functools.lru_cache(maxsize=16)
def _epoch(seed: int, num_rows: int, epoch: int) -> np.ndarray:
  return np.random.RandomState([seed, epoch]).permutation(num_rows)


def shape_of(
  examples: Sequence[encode_options.Example], *, multiple: int = 16
) -> Shape:
  """Returns the smallest shape that holds every example.

  Args:
    examples: the data set.
    multiple: the length is rounded up to a multiple of this.
  """
  every = [row for example in examples for row in example.rows]
  length = max(len(row.tokens) for row in every)
  return Shape(
    rows=max(len(example.rows) for example in examples),
    length=-(-length // multiple) * multiple,
    positions=max(len(row.positions) for row in every),
    targets=max(len(row.targets) for row in every),
    options=max(len(example.options) for example in examples),
  )


def collate(
  examples: Sequence[encode_options.Example],
  shape: Shape,
  *,
  pad: int,
  batch_size: int = 0,
) -> losses.Batch:
  """Stacks examples into arrays of a fixed shape.

  Padding examples repeat a real one with weight 0: attention would be
  undefined in a row that is masked entirely.

  Args:
    examples: at least one.
    shape: sizes, at least those of the examples.
    pad: padding token id; rows are padded on the right.
    batch_size: number of examples to pad to; 0 for no padding.

  Returns:
    NumPy arrays, B = max(batch_size, len(examples)).
  """
  size = max(batch_size, len(examples))
  _, length, positions, targets, options = shape
  lead = (size, shape.rows)
  tokens = np.full((*lead, length), pad, np.int32)
  several = any(row.documents for e in examples for row in e.rows)
  mask = np.zeros((*lead, length), np.int32 if several else bool)
  position = np.zeros((*lead, positions), np.int32)
  slot, token, option = np.zeros((3, *lead, targets), np.int32)
  weight = np.zeros((*lead, targets), np.float32)
  label = np.zeros(size, np.int32)
  option_mask = np.zeros((size, options), bool)
  example_weight = np.zeros(size, np.float32)
  example_weight[: len(examples)] = 1.0
  for b in range(size):
    example = examples[b if b < len(examples) else 0]
    label[b] = example.label
    option_mask[b, : len(example.options)] = example.options
    for r in range(shape.rows):
      real = r < len(example.rows)
      row = example.rows[r if real else 0]
      tokens[b, r, : len(row.tokens)] = row.tokens
      mask[b, r, : len(row.tokens)] = row.documents or True
      if not real:
        continue
      position[b, r, : len(row.positions)] = row.positions
      count = len(row.targets)
      slot[b, r, :count], token[b, r, :count], option[b, r, :count] = zip(
        *row.targets, strict=True
      )
      weight[b, r, :count] = 1.0
  arrays: dict[str, Any] = {
    "tokens": tokens,
    "mask": mask,
    "positions": position,
    "target_slot": slot,
    "target_token": token,
    "target_option": option,
    "target_weight": weight,
    "label": label,
    "option_mask": option_mask,
    "example_weight": example_weight,
  }
  return losses.Batch(**arrays)


def eval_batches(
  examples: Sequence[encode_options.Example],
  batch_size: int,
  *,
  pad: int,
  shape: Shape | None = None,
) -> Iterator[EvalBatch]:
  """Yields every example once, sorted by length, in batches of few shapes.

  Args:
    examples: the data set.
    batch_size: examples of every batch; the last one is padded.
    pad: padding token id.
    shape: sizes of the batches except the length; None: the smallest that hold
      all examples.

  Yields:
    Batches with the indices of their examples; `restore` undoes the sorting.
  """
  lengths = [max(len(r.tokens) for r in e.rows) for e in examples]
  shape = shape or shape_of(examples)
  for indices, length in _by_length(lengths, batch_size):
    batch = collate(
      [examples[i] for i in indices if i >= 0],
      shape._replace(length=length),
      pad=pad,
      batch_size=batch_size,
    )
    yield EvalBatch(batch, indices)


def prompt_batches(
  prompts: Sequence[Sequence[int]], batch_size: int, *, pad: int
) -> Iterator[PromptBatch]:
  """Yields every prompt once, sorted by length, in batches of few shapes.

  Args:
    prompts: token ids of each prompt.
    batch_size: prompts of every batch; the last one is padded.
    pad: padding token id; prompts are padded on the left.

  Yields:
    Batches with the indices of their prompts.
  """
  for indices, length in _by_length([len(p) for p in prompts], batch_size):
    chosen = [prompts[i if i >= 0 else indices[0]] for i in indices]
    yield PromptBatch(*collate_prompts(chosen, length, pad=pad), indices)


def collate_prompts(
  prompts: Sequence[Sequence[int]], length: int, *, pad: int
) -> tuple[np.ndarray, np.ndarray]:
  """Stacks prompts, padded on the left.

  Args:
    prompts: token ids of each prompt.
    length: L, at least that of the longest.
    pad: padding token id.

  Returns:
    Tokens, int32 [B, L], and the mask of real ones, bool [B, L].
  """
  tokens = np.full((len(prompts), length), pad, np.int32)
  mask = np.zeros((len(prompts), length), bool)
  for row, prompt in enumerate(prompts):
    tokens[row, length - len(prompt) :] = prompt
    mask[row, length - len(prompt) :] = True
  return tokens, mask


def _by_length(
  lengths: Sequence[int], batch_size: int
) -> Iterator[tuple[np.ndarray, int]]:
  """Yields indices of rows, -1 for padding, and a length that holds them."""
  order = np.argsort(lengths, kind="stable")
  for start in range(0, len(order), batch_size):
    chosen = order[start : start + batch_size]
    longest = max(lengths[i] for i in chosen)
    indices = np.full(batch_size, -1)
    indices[: len(chosen)] = chosen
    yield indices, min(b for b in _BUCKETS if b >= longest)


def restore(
  outputs: Sequence[np.ndarray], indices: Sequence[np.ndarray]
) -> np.ndarray:
  """Reorders outputs of evaluation batches into the data set's order.

  Args:
    outputs: one array [B, ...] per batch.
    indices: the batches' `indices`.

  Returns:
    [examples, ...], without the padding of the last batch.
  """
  flat, index = np.concatenate(outputs), np.concatenate(indices)
  real = index >= 0
  return flat[real][np.argsort(index[real])]
