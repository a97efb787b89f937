"""Calibration of option scores by content-free prompts.

A model prefers some options whatever the question. The scores after a prompt
without content measure this bias, and are subtracted (contextual calibration:
Zhao et al., 2021, arXiv 2102.09690; domain-conditional PMI: Holtzman et al.,
2021, arXiv 2104.08315, MeZO's `sfc`).
"""

from collections.abc import Sequence

import numpy as np

from zofo_jax import errors, tasks
from zofo_jax.data import encode_options

# What replaces the columns of a content-free prompt.
INPUTS = {"contextual": ("N/A", "[MASK]", ""), "domain": ("",)}
_MISSING = np.finfo(np.float32).min


def null_prompt(
  task: tasks.Task, row: tasks.Row, content: str, version: tasks.Version = 0
) -> str:
  """Returns a row's prompt with its columns replaced.

  Columns that the options depend on, or that take certain values only, are
  unchanged.

  Args:
    task: the task.
    row: the row.
    content: replaces the other columns.
    version: the template version.

  Returns:
    The prompt.

  Raises:
    UserError: no column of the prompt can be replaced.
  """
  original, options = task.prompt(row, version), task.options(row, version)
  for column in task.text:
    trial = row._replace(fields={**row.fields, column: content})
    try:
      task.prompt(trial, version)
      same_options = task.options(trial, version) == options
    except errors.UserError:
      continue
    row = trial if same_options else row
  prompt = task.prompt(row, version)
  if prompt == original:
    raise errors.UserError(
      f"Task {task.name} cannot be calibrated: its prompt has no column that "
      "its options do not need; expected icl.calibration 'none'."
    )
  return prompt


def lengths(examples: Sequence[encode_options.Example]) -> np.ndarray:
  """Counts the tokens of each option, int [N, O]; 0 for padding."""
  counts = np.zeros((len(examples), max(len(e.options) for e in examples)), int)
  for i, example in enumerate(examples):
    for row in example.rows:
      for _, _, option in row.targets:
        counts[i, option] += 1
  return counts


def contextual(scores: np.ndarray, null_scores: np.ndarray) -> np.ndarray:
  """Divides the options' probabilities by those of content-free inputs.

  Args:
    scores: mean log-probability of each option, [N, O]; the lowest float32
      for padding.
    null_scores: the same for each of I content-free prompts, [I, N, O]; their
      probabilities, normalized over the options, are averaged.

  Returns:
    Log-probabilities up to a constant, [N, O].
  """
  null = null_scores.astype(float)
  null = null - np.logaddexp.reduce(null, axis=-1, keepdims=True)
  offset = np.logaddexp.reduce(null, axis=0) - np.log(len(null_scores))
  return _subtract(scores, offset)


def domain(
  scores: np.ndarray, null_scores: np.ndarray, counts: np.ndarray
) -> np.ndarray:
  """Subtracts the options' log-probability after the bare template.

  Args:
    scores: mean log-probability of each option, [N, O].
    null_scores: the same for one content-free prompt, [1, N, O].
    counts: tokens of each option, [N, O], which turn means into sums.

  Returns:
    log p(option | prompt) - log p(option | template), [N, O].
  """
  return _subtract(scores * np.maximum(counts, 1), null_scores[0] * counts)


def _subtract(scores: np.ndarray, offset: np.ndarray) -> np.ndarray:
  is_option = scores > _MISSING
  return np.where(is_option, scores - offset, _MISSING).astype(np.float32)
