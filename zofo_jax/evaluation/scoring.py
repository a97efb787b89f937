"""Scores options by the log-probability of their tokens.

The score of an option is the mean log-probability of its tokens given the
prompt; the prediction is the option with the highest score. Rows are sorted by
length into batches of few shapes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from zofo_jax.core import losses
from zofo_jax.data import batching, encode_options
from zofo_jax.report import progress as progress_lib

# (base, adapter, batch) -> scores, float32 [B, O].
ScoreFn = Callable[[Any, Any, losses.Batch], Any]


def make_score_fn(log_probs_fn: losses.LogProbsFn) -> ScoreFn:
  """Returns the function that scores a batch's options, to be jitted once."""

  def score_fn(base, adapter, batch):
    log_probs = log_probs_fn(base, adapter, batch, None)
    return losses.option_scores(log_probs, batch)

  return score_fn


def make_token_score_fn(
  log_probs_fn: losses.LogProbsFn,
  best_tokens_fn: Callable[[Any, Any, losses.Batch], Any],
) -> ScoreFn:
  """Returns the function that scores a batch's tokens, to be jitted once.

  Args:
    log_probs_fn: log p of a batch's targets.
    best_tokens_fn: the most likely token at each target.

  Returns:
    (base, adapter, batch) -> float32 [B, 3], as `metrics.token_loss` takes it.
  """

  def score_fn(base, adapter, batch):
    log_probs = log_probs_fn(base, adapter, batch, None)
    best = best_tokens_fn(base, adapter, batch)
    per_token = jnp.stack(
      [log_probs, best == batch.target_token, jnp.ones_like(log_probs)], axis=-1
    )
    return jnp.einsum("brk,brkn->bn", batch.target_weight, per_token)

  return score_fn


def score_options(
  score_fn: ScoreFn,
  base: Any,
  adapter: Any,
  examples: Sequence[encode_options.Example],
  *,
  batch_size: int,
  pad: int,
  label: str = "evaluate",
  shape: batching.Shape | None = None,
) -> np.ndarray:
  """Scores every option of every example.

  Args:
    score_fn: jitted result of `make_score_fn` or `make_token_score_fn`.
    base: backbone parameters.
    adapter: adapter parameters; {} for none.
    examples: encoded with mode "classification".
    batch_size: examples at a time.
    pad: token id that fills rows.
    label: of the progress display.
    shape: sizes of the batches, except the length; None for the examples'
      own.

  Returns:
    float32 [N, O], or [N, 3] of tokens, in the order of `examples`.
  """
  return map_batches(
    lambda batch: score_fn(base, adapter, batch),
    examples,
    batch_size=batch_size,
    pad=pad,
    label=label,
    shape=shape,
  )


def map_batches(
  fn: Callable[[losses.Batch], Any],
  examples: Sequence[encode_options.Example],
  *,
  batch_size: int,
  pad: int,
  label: str,
  shape: batching.Shape | None = None,
) -> np.ndarray:
  """Applies a function to batches of examples, and shows the progress.

  Args:
    fn: from a batch to an array with a row for each of its examples.
    examples: encoded rows.
    batch_size: examples at a time.
    pad: token id that fills rows.
    label: of the progress display.
    shape: as for `score_options`.

  Returns:
    What fn returns, [N, ...], in the order of `examples`.
  """
  outputs, indices, done = [], [], 0
  with progress_lib.Progress(len(examples), label, unit="rows") as progress:
    for batch, index in batching.eval_batches(
      examples, batch_size, pad=pad, shape=shape
    ):
      outputs.append(np.asarray(fn(batch)))
      indices.append(index)
      done += int((index >= 0).sum())
      progress.update(done)
  return batching.restore(outputs, indices)
