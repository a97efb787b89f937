"""Calibration: options judged against what the prompt alone makes of them.

A model prefers some options whatever it is asked. The scores of a question
without content tell how much, and are taken off (Zhao et al., 2021,
arXiv 2102.09690; Holtzman et al., 2021, arXiv 2104.08315, MeZO's `sfc`).
"""

from collections.abc import Sequence

import numpy as np

from zofo_jax import errors, tasks
from zofo_jax.data import encode_options

# What stands in the columns of a question without content.
INPUTS = {"contextual": ("N/A", "[MASK]", ""), "domain": ("",)}
_MISSING = np.finfo(np.float32).min


def null_prompt(
  task: tasks.Task, row: tasks.Row, content: str, version: tasks.Version = 0
) -> str:
  """Returns a row's prompt with other words in its columns.

  A column that options are made of, or that takes certain words only, stays.

  Args:
    task: the task.
    row: gives what stays.
    content: what stands in the other columns.
    version: the template version.

  Returns:
    The prompt.

  Raises:
    UserError: no column of the prompt can be left out.
  """
  whole, options = task.prompt(row, version), task.options(row, version)
  for column in task.text:
    trial = row._replace(fields={**row.fields, column: content})
    try:
      task.prompt(trial, version)
      free = task.options(trial, version) == options
    except errors.UserError:
      continue
    row = trial if free else row
  prompt = task.prompt(row, version)
  if prompt == whole:
    raise errors.UserError(
      f"Task {task.name} cannot be calibrated: its prompt has no column that "
      "its options do not need; expected icl.calibration 'none'."
    )
  return prompt


def lengths(examples: Sequence[encode_options.Example]) -> np.ndarray:
  """Counts the tokens of each option, int [N, O]; 0 where there is none."""
  counts = np.zeros((len(examples), max(len(e.options) for e in examples)), int)
  for i, example in enumerate(examples):
    for row in example.rows:
      for _, _, option in row.targets:
        counts[i, option] += 1
  return counts


def contextual(scores: np.ndarray, null_scores: np.ndarray) -> np.ndarray:
  """Divides the options' probabilities by those of content-free inputs.

  Args:
    scores: mean log-probability of each option, [N, O]; float32's least where
      there is none.
    null_scores: the same of each of I content-free inputs, [I, N, O]; their
      probabilities, which sum to 1 over the options, are averaged.

  Returns:
    Log-probabilities up to a constant, [N, O].
  """
  null = null_scores.astype(float)
  null = null - np.logaddexp.reduce(null, axis=-1, keepdims=True)
  offset = np.logaddexp.reduce(null, axis=0) - np.log(len(null_scores))
  return _less(scores, offset)


def domain(
  scores: np.ndarray, null_scores: np.ndarray, counts: np.ndarray
) -> np.ndarray:
  """Takes the options' log-probability after the bare template off.

  Args:
    scores: mean log-probability of each option, [N, O].
    null_scores: the same of one input, [1, N, O].
    counts: tokens of each option, which make the means sums, [N, O].

  Returns:
    log p(option | prompt) - log p(option | template), [N, O].
  """
  return _less(scores * np.maximum(counts, 1), null_scores[0] * counts)


def _less(scores: np.ndarray, offset: np.ndarray) -> np.ndarray:
  there = scores > _MISSING
  return np.where(there, scores - offset, _MISSING).astype(np.float32)
