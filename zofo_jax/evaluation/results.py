"""Results of an evaluation: predictions, their metrics and their records."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from zofo_jax.data import encode_options, encode_prompts
from zofo_jax.evaluation import metrics
from zofo_jax.evaluation import rewards as rewards_lib


class OptionPredictions(NamedTuple):
  """Options chosen for a set of examples.

  Attributes:
    examples: the encoded rows, [N].
    scores: mean log-probability of each option, float32 [N, O].
    metric_names: in `metrics.METRICS`.
  """

  examples: Sequence[encode_options.Example]
  scores: np.ndarray
  metric_names: tuple[str, ...]

  @property
  def predictions(self) -> list[int]:
    """Returns the best option of each example."""
    return self.scores.argmax(axis=-1).tolist()

  def _labels(self) -> list[int]:
    return metrics.resolve_labels(
      self.predictions, [example.right for example in self.examples]
    )

  def metrics(self) -> dict[str, float]:
    """Returns the value of each metric."""
    predictions, labels = self.predictions, self._labels()
    return {
      name: metrics.METRICS[name](predictions, labels)
      for name in self.metric_names
    }

  def intervals(self) -> dict[str, tuple[float, float]]:
    """Returns the 95 % bootstrap interval of each metric."""
    predictions, labels = self.predictions, self._labels()
    return {
      f"{name}_interval": metrics.bootstrap_interval(
        metrics.METRICS[name], predictions, labels
      )
      for name in self.metric_names
    }

  def to_records(self) -> list[dict[str, Any]]:
    """Returns a JSON record of each example."""
    return [
      {
        "where": example.source,
        "prediction": prediction,
        "right": list(example.right),
        "scores": [float(score) for score in scores[: len(example.options)]],
      }
      for example, prediction, scores in zip(
        self.examples, self.predictions, self.scores, strict=True
      )
    ]


class GeneratedAnswers(NamedTuple):
  """Texts generated for a set of questions; like `OptionPredictions`.

  Attributes:
    examples: the encoded questions, [N].
    texts: the answers, up to the first stop string.
    rewards: by which the answers are scored as well; None for no rewards.
  """

  examples: Sequence[encode_prompts.Question]
  texts: list[str]
  rewards: rewards_lib.Rewards | None = None

  def _values(self) -> dict[str, np.ndarray]:
    """Returns each metric of each answer, the best over accepted answers."""
    values = {}
    if self.rewards is not None:
      values["reward"] = self.rewards(self.texts, self.examples)
    if not all(question.answers for question in self.examples):
      return values
    return values | {
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
    return {
      name: float(values.mean()) for name, values in self._values().items()
    }

  def intervals(self) -> dict[str, tuple[float, float]]:
    """Returns the 95 % bootstrap interval of each metric."""

    def mean(values, _):
      return float(np.mean(values))

    return {
      f"{name}_interval": metrics.bootstrap_interval(mean, values, values)
      for name, values in self._values().items()
    }

  def to_records(self) -> list[dict[str, Any]]:
    """Returns a JSON record of each question."""
    values_by_name = self._values()
    return [
      {
        "where": question.source,
        "prediction": text,
        "answers": list(question.answers),
        **{name: float(values[i]) for name, values in values_by_name.items()},
      }
      for i, (question, text) in enumerate(
        zip(self.examples, self.texts, strict=True)
      )
    ]


class TokenScores(NamedTuple):
  """Scores of the tokens of texts; like `OptionPredictions`.

  Attributes:
    examples: the encoded rows, [N].
    sums: as `metrics.token_loss` takes them, float32 [N, 3].
  """

  examples: Sequence[encode_options.Example]
  sums: np.ndarray

  def metrics(self) -> dict[str, float]:
    """Returns the value of each metric."""
    return {
      name: score(self.sums) for name, score in metrics.TOKEN_METRICS.items()
    }

  def intervals(self) -> dict[str, tuple[float, float]]:
    """Returns the 95 % bootstrap interval of each metric."""

    def interval(score):
      return metrics.bootstrap_interval(
        lambda sums, _: score(sums), self.sums, self.sums
      )

    return {
      f"{name}_interval": interval(score)
      for name, score in metrics.TOKEN_METRICS.items()
    }

  def to_records(self) -> list[dict[str, Any]]:
    """Returns a JSON record of each row."""
    return [
      {
        "where": example.source,
        "num_tokens": int(sums[2]),
        "token_loss": metrics.token_loss(sums[None]),
        "token_accuracy": metrics.token_accuracy(sums[None]),
      }
      for example, sums in zip(self.examples, self.sums, strict=True)
    ]


Result = OptionPredictions | GeneratedAnswers | TokenScores
