"""Scoring options by likelihood, or generated answers, and their worth.

A prediction is the option with the highest mean log-probability of its tokens
given the prompt, or a generated text. Rows go by length in batches of few
shapes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from zofo_jax import batches, encode, losses, metrics, questions
from zofo_jax import progress as progress_lib

# (base, adapter, batch) -> scores, float32 [B, O].
ScoreFn = Callable[[Any, Any, losses.Batch], Any]


class Evaluation(NamedTuple):
  """Scores of a set of examples.

  Attributes:
    scores: mean log-probability of each option, float32 [N, O].
    predictions: the best option of each example, int [N].
    accuracy: share of predictions that are right.
    metric: value of the task's own metric.
  """

  scores: np.ndarray
  predictions: np.ndarray
  accuracy: float
  metric: float


class Answers(NamedTuple):
  """Generated answers of a set of questions.

  Attributes:
    texts: the answers, without what follows a stop string.
    token_f1: of each answer, float64 [N]; best over the accepted ones.
    exact_match: of each answer, float64 [N].
  """

  texts: list[str]
  token_f1: np.ndarray
  exact_match: np.ndarray


def make_score_fn(log_probs_fn: losses.LogProbsFn) -> ScoreFn:
  """Makes the function that scores a batch's options; to be jitted once."""

  def score_fn(base, adapter, batch):
    log_probs = log_probs_fn(base, adapter, batch, None)
    return losses.option_scores(log_probs, batch)

  return score_fn


def score_options(
  score_fn: ScoreFn,
  base: Any,
  adapter: Any,
  examples: Sequence[encode.Example],
  *,
  batch_size: int,
  pad: int,
  label: str = "evaluate",
) -> np.ndarray:
  """Scores every option of every example.

  Args:
    score_fn: jitted function of `make_score_fn`.
    base: backbone parameters.
    adapter: adapter parameters; {} for the bare backbone.
    examples: encoded with mode "classification".
    batch_size: examples at a time.
    pad: token id that fills rows.
    label: what the progress is called.

  Returns:
    float32 [N, O], in the order of `examples`.
  """
  outputs, places, done = [], [], 0
  with progress_lib.Progress(len(examples), label, unit="rows") as progress:
    for batch, place in batches.eval_batches(examples, batch_size, pad=pad):
      outputs.append(np.asarray(score_fn(base, adapter, batch)))
      places.append(place)
      done += int((place >= 0).sum())
      progress.update(done)
  return batches.restore(outputs, places)


def evaluate(
  score_fn: ScoreFn,
  base: Any,
  adapter: Any,
  examples: Sequence[encode.Example],
  *,
  metric: str,
  batch_size: int,
  pad: int,
  label: str = "evaluate",
) -> Evaluation:
  """Scores examples and compares the best options with the right ones.

  Args:
    score_fn: jitted function of `make_score_fn`.
    base: backbone parameters.
    adapter: adapter parameters; {} for the bare backbone.
    examples: encoded with mode "classification".
    metric: a name in `metrics.METRICS`.
    batch_size: examples at a time.
    pad: token id that fills rows.
    label: what the progress is called.

  Returns:
    Scores, predictions and their worth.
  """
  scores = score_options(
    score_fn,
    base,
    adapter,
    examples,
    batch_size=batch_size,
    pad=pad,
    label=label,
  )
  predictions = scores.argmax(axis=-1)
  right = metrics.credit(
    predictions.tolist(), [example.right for example in examples]
  )
  return Evaluation(
    scores=scores,
    predictions=predictions,
    accuracy=metrics.accuracy(predictions, right),
    metric=metrics.METRICS[metric](predictions, right),
  )


def score_answers(
  texts: Sequence[str], asked: Sequence[questions.Question]
) -> Answers:
  """Compares generated answers with the accepted ones.

  Args:
    texts: an answer to each question.
    asked: questions with their answers.

  Returns:
    Answers and what each is worth.
  """
  pairs = [(t, q.answers) for t, q in zip(texts, asked, strict=True)]
  return Answers(
    texts=list(texts),
    token_f1=np.array([metrics.token_f1(*pair) for pair in pairs]),
    exact_match=np.array([metrics.exact_match(*pair) for pair in pairs]),
  )
