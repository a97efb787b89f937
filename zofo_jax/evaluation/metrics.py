"""Metrics of predictions, from scikit-learn, and their bootstrap intervals.

Token F1 and exact match are SQuAD's: lower case, without punctuation and
articles, the best over the accepted answers. ROUGE-L is Lin's (2004) F1 of the
longest common subsequence of words of ASCII letters and digits, without
stemming, as the package rouge-score computes it; of an answer that has no such
word, it is that of the words of token F1.
"""

import collections
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ROUGE_WORDS = re.compile("[a-z0-9]+")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def accuracy(predicted: Sequence[int], label: Sequence[int]) -> float:
  """Returns the fraction of correct predictions."""
  return float(np.mean(np.asarray(predicted) == np.asarray(label)))


def macro_f1(predicted: Sequence[int], label: Sequence[int]) -> float:
  """Returns the mean F1 of the labels that occur in either sequence."""
  from sklearn import metrics  # imported lazily because it is slow

  return float(
    metrics.f1_score(label, predicted, average="macro", zero_division=0)
  )


def matthews(predicted: Sequence[int], label: Sequence[int]) -> float:
  """Returns Matthews's correlation; 0 if a sequence is constant."""
  from sklearn import metrics  # imported lazily because it is slow

  return float(metrics.matthews_corrcoef(label, predicted))


def pearson(predicted: Sequence[int], label: Sequence[int]) -> float:
  """Returns Pearson's correlation of ordinal labels; 0 if one is constant."""
  if np.ptp(predicted) == 0 or np.ptp(label) == 0:
    return 0.0
  return float(np.corrcoef(predicted, label)[0, 1])


# Higher is better: a task's metric on the selection rows selects checkpoints.
METRICS: dict[str, Callable[[Sequence[int], Sequence[int]], float]] = {
  "accuracy": accuracy,
  "macro_f1": macro_f1,
  "matthews": matthews,
  "pearson": pearson,
}


def resolve_labels(
  predicted: Sequence[int], correct: Sequence[Sequence[int]]
) -> list[int]:
  """Returns the label to compare each prediction with.

  If several options are correct, it is the predicted one if that is among them,
  and the first of them otherwise.

  Args:
    predicted: option chosen for each example.
    correct: all correct options of each example.
  """
  return [
    p if p in options else options[0]
    for p, options in zip(predicted, correct, strict=True)
  ]


def token_f1(predicted: str, answers: Sequence[str]) -> float:
  """Returns the best F1 of words between a text and the accepted answers."""
  return max(_word_f1(_words(predicted), _words(a)) for a in answers)


def exact_match(predicted: str, answers: Sequence[str]) -> float:
  """Returns 1 if the words are those of an accepted answer, else 0."""
  return float(any(_words(predicted) == _words(a) for a in answers))


def rouge_l(predicted: str, answers: Sequence[str]) -> float:
  """Returns the best ROUGE-L between a text and the accepted answers."""
  return max(_rouge_l(predicted, answer) for answer in answers)


def _rouge_l(predicted: str, answer: str) -> float:
  split = _ROUGE_WORDS.findall
  right = split(answer.lower())
  words = split(predicted.lower()) if right else _words(predicted)
  right = right or _words(answer)
  return _f1(_common(words, right), len(words), len(right))


TEXT_METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
  "token_f1": token_f1,
  "exact_match": exact_match,
  "rouge_l": rouge_l,
}


def token_loss(sums: np.ndarray) -> float:
  """Returns minus the mean log-probability of the tokens of rows.

  Args:
    sums: [N, 3]; of each row, the sum of its tokens' log-probabilities, the
      number of tokens that were the most likely ones, and the number of tokens.
  """
  log_probs, _, count = np.sum(sums, axis=0)
  return -float(log_probs / count)


def token_accuracy(sums: np.ndarray) -> float:
  """Returns the share of tokens that were the most likely ones."""
  _, right, count = np.sum(sums, axis=0)
  return float(right / count)


def perplexity(sums: np.ndarray) -> float:
  """Returns the exponential of the token loss."""
  return float(np.exp(token_loss(sums)))


TOKEN_METRICS: dict[str, Callable[[np.ndarray], float]] = {
  "token_loss": token_loss,
  "perplexity": perplexity,
  "token_accuracy": token_accuracy,
}
# Metrics of which the lowest value is the best.
LOWER_IS_BETTER = ("token_loss", "perplexity")


def bootstrap_interval(
  score: Callable[[Any, Any], float],
  predicted: Any,
  label: Any,
  *,
  level: float = 0.95,
  resamples: int = 1000,
  seed: int = 0,
) -> tuple[float, float]:
  """Returns the percentile bootstrap interval of a score over examples.

  Efron and Tibshirani (1993), chapter 13. Draws the resamples of
  `scipy.stats.bootstrap`, which rounds differently and rejects one example.

  Args:
    score: a metric of (predicted, label).
    predicted: option chosen for each example, [N]; or each example's score.
    label: correct option of each example, [N].
    level: coverage.
    resamples: number of resamples.
    seed: of the resamples.

  Returns:
    Lower and upper end.
  """
  predictions, labels = np.asarray(predicted), np.asarray(label)
  rng = np.random.RandomState(seed)
  draws = rng.randint(len(labels), size=(resamples, len(labels)))
  scores = [score(predictions[i], labels[i]) for i in draws]
  low, high = np.quantile(scores, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)


def _words(text: str) -> list[str]:
  return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _word_f1(predicted: list[str], answer: list[str]) -> float:
  if not predicted or not answer:
    return float(predicted == answer)
  common = collections.Counter(predicted) & collections.Counter(answer)
  return _f1(sum(common.values()), len(predicted), len(answer))


def _f1(same: int, num_predicted: int, num_right: int) -> float:
  """Returns the F1 of a number of matches."""
  if not same:
    return 0.0
  precision, recall = same / num_predicted, same / num_right
  return 2 * precision * recall / (precision + recall)


def _common(predicted: list[str], answer: list[str]) -> int:
  """Returns the length of the longest common subsequence."""
  lengths = [0] * (len(answer) + 1)  # of all before this word, and each prefix
  for word in predicted:
    above = lengths
    lengths = [0]
    for i, other in enumerate(answer):
      lengths.append(
        above[i] + 1 if word == other else max(above[i + 1], lengths[i])
      )
  return lengths[-1]
