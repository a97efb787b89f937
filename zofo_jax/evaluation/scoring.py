"""Scoring options by likelihood, or generated answers, and their worth.

A prediction is the option with the highest mean log-probability of its tokens
given the prompt, or a generated text. Rows go by length in batches of few
shapes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from zofo_jax.core import losses
from zofo_jax.data import batching, encode_options, encode_prompts
from zofo_jax.evaluation import metrics
from zofo_jax.report import progress as progress_lib

# (base, adapter, batch) -> scores, float32 [B, O].
ScoreFn = Callable[[Any, Any, losses.Batch], Any]


class OptionPredictions(NamedTuple):
  """Options chosen for a set of examples.

  Attributes:
    examples: what was asked, [N].
    scores: mean log-probability of each option, float32 [N, O].
    names: what it is measured by, in `metrics.METRICS`.
  """

  examples: Sequence[encode_options.Example]
  scores: np.ndarray
  names: tuple[str, ...]

  @property
  def predictions(self) -> list[int]:
    """Returns the best option of each example."""
    return self.scores.argmax(axis=-1).tolist()

  def _right(self) -> list[int]:
    return metrics.resolve_labels(
      self.predictions, [e.right for e in self.examples]
    )

  def metrics(self) -> dict[str, float]:
    """Returns the value of each metric."""
    guess, truth = self.predictions, self._right()
    return {name: metrics.METRICS[name](guess, truth) for name in self.names}

  def intervals(self) -> dict[str, tuple[float, float]]:
    """Returns the 95 % bootstrap interval of each metric."""
    guess, truth = self.predictions, self._right()
    return {
      f"{name}_interval": metrics.bootstrap_interval(
        metrics.METRICS[name], guess, truth
      )
      for name in self.names
    }

  def to_records(self) -> list[dict[str, Any]]:
    """Returns what there is to say of each example."""
    return [
      {
        "where": example.source,
        "prediction": prediction,
        "right": list(example.right),
        "scores": [float(one) for one in scores[: len(example.options)]],
      }
      for example, prediction, scores in zip(
        self.examples, self.predictions, self.scores, strict=True
      )
    ]


class GeneratedAnswers(NamedTuple):
  """Texts generated for a set of questions; like `OptionPredictions`.

  Attributes:
    examples: what was asked, [N].
    texts: the answers, without what follows a stop string.
  """

  examples: Sequence[encode_prompts.Question]
  texts: list[str]

  def _each(self) -> dict[str, np.ndarray]:
    """Returns what each answer is worth; the best over the accepted ones."""
    return {
      name: np.array(
        [
          score(text, question.answers)
          for text, question in zip(self.texts, self.examples, strict=True)
        ]
      )
      for name, score in metrics.TEXT_METRICS.items()
    }

  def metrics(self) -> dict[str, float]:
    """Returns the mean of each metric."""
    return {name: float(each.mean()) for name, each in self._each().items()}

  def intervals(self) -> dict[str, tuple[float, float]]:
    """Returns the 95 % bootstrap interval of each metric."""

    def mean(values, _):
      return float(np.mean(values))

    return {
      f"{name}_interval": metrics.bootstrap_interval(mean, each, each)
      for name, each in self._each().items()
    }

  def to_records(self) -> list[dict[str, Any]]:
    """Returns what there is to say of each question."""
    each = self._each()
    return [
      {
        "where": question.source,
        "prediction": text,
        "answers": list(question.answers),
        **{name: float(values[i]) for name, values in each.items()},
      }
      for i, (question, text) in enumerate(
        zip(self.examples, self.texts, strict=True)
      )
    ]


Result = OptionPredictions | GeneratedAnswers


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
  examples: Sequence[encode_options.Example],
  *,
  batch_size: int,
  pad: int,
  label: str = "evaluate",
  shape: batching.Shape | None = None,
) -> np.ndarray:
  """Scores every option of every example.

  Args:
    score_fn: jitted function of `make_score_fn`, of host arrays.
    base: backbone parameters.
    adapter: adapter parameters; {} for the bare backbone.
    examples: encoded with mode "classification".
    batch_size: examples at a time.
    pad: token id that fills rows.
    label: what the progress is called.
    shape: sizes of the batches, but for the length; None for the examples' own.

  Returns:
    float32 [N, O], in the order of `examples`.
  """
  outputs, indices, done = [], [], 0
  with progress_lib.Progress(len(examples), label, unit="rows") as progress:
    for batch, index in batching.eval_batches(
      examples, batch_size, pad=pad, shape=shape
    ):
      outputs.append(np.asarray(score_fn(base, adapter, batch)))
      indices.append(index)
      done += int((index >= 0).sum())
      progress.update(done)
  return batching.restore(outputs, indices)
