import re
from typing import get_args

import numpy as np
import pytest

from zofo_jax import tasks
from zofo_jax.config import defaults
from zofo_jax.evaluation import metrics
from zofo_jax.tasks import base


def test_tasks_and_configs_name_all_metrics():
  assert get_args(base.OptionMetric) == tuple(metrics.METRICS)
  assert get_args(base.TextMetric) == tuple(metrics.TEXT_METRICS)
  tokens = get_args(base.TokenMetric)
  assert {*tokens, "perplexity"} == {*metrics.TOKEN_METRICS}
  assert defaults.METRICS == (*metrics.METRICS, *metrics.TEXT_METRICS, *tokens)
  assert tuple(tasks.FORMATS) == defaults.FORMATS


@pytest.mark.parametrize(
  "predicted, answer, common",
  [
    ("The cat sat", "the cat sat.", 3),
    ("a b c d", "d a b", 2),
    ("b a", "a x b", 1),
    ("", "a", 0),
    ("It's 3", "it s three", 2),
  ],
)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(
  predicted, answer, common
):
  lengths = [
    len(re.findall(r"[a-z0-9]+", t.lower())) for t in (predicted, answer)
  ]
  expected = 2 * common / sum(lengths)
  assert metrics.rouge_l(predicted, ["zzz", answer]) == pytest.approx(expected)


@pytest.mark.parametrize(
  "predicted, answer, expected",
  [
    ("北京。", "北京", 0.0),
    ("北京", "北京", 1.0),
    ("Это не кот", "это кот", 0.8),
    ("cat 北京", "cat", 1.0),  # as rouge-score, which sees ASCII alone
    ("cat", "北京", 0.0),
    ("", "北京", 0.0),
    ("!", "?", 0.0),
  ],
)
def test_rouge_l_of_other_scripts(predicted, answer, expected):
  assert metrics.rouge_l(predicted, [answer]) == pytest.approx(expected)


def test_token_metrics_are_over_all_tokens():
  sums = np.array([[-1.0, 1, 1], [-6.0, 0, 3]])
  assert metrics.token_loss(sums) == pytest.approx(7 / 4)
  assert metrics.perplexity(sums) == pytest.approx(np.exp(7 / 4))
  assert metrics.token_accuracy(sums) == pytest.approx(1 / 4)


def test_scores_from_their_definitions():
  rng = np.random.RandomState(0)
  label, predicted = rng.randint(3, size=(2, 60))
  assert metrics.accuracy(predicted, label) == pytest.approx(
    sum(p == y for p, y in zip(predicted, label)) / 60
  )
  f1 = []
  for c in range(3):
    hits = np.sum((predicted == c) & (label == c))
    f1.append(2 * hits / (np.sum(predicted == c) + np.sum(label == c)))
  assert metrics.macro_f1(predicted, label) == pytest.approx(np.mean(f1))


def test_matthews_is_the_correlation_of_two_classes():
  label = np.array([0, 0, 1, 1, 1, 0, 1])
  predicted = np.array([0, 1, 1, 1, 0, 0, 1])
  assert metrics.matthews(predicted, label) == pytest.approx(
    np.corrcoef(label, predicted)[0, 1]
  )
  assert metrics.matthews(np.zeros(7, int), label) == 0.0


def test_pearson_is_the_correlation():
  label, predicted = np.array([0, 1, 2, 4, 3]), np.array([0, 2, 1, 4, 4])
  centred = [x - x.mean() for x in (label, predicted)]
  expected = (
    centred[0] @ centred[1] / np.prod([np.linalg.norm(x) for x in centred])
  )
  assert metrics.pearson(predicted, label) == pytest.approx(expected)
  assert metrics.pearson(np.ones(5), label) == 0.0


def test_any_right_option_counts():
  label = metrics.resolve_labels([2, 0, 1], [(1, 2), (1, 2), (1,)])
  assert label == [2, 1, 1]


@pytest.mark.parametrize(
  "predicted, answers, f1, exact",
  [
    ("The red cat.", ["red cat"], 1.0, 1.0),
    ("red dog", ["red cat", "a blue dog"], 0.5, 0.0),
    ("red cat sat", ["cat"], 0.5, 0.0),
    ("", ["cat"], 0.0, 0.0),
    ("the", [""], 1.0, 1.0),
    ("no no no", ["no"], 0.5, 0.0),
  ],
)
def test_words_of_answers(predicted, answers, f1, exact):
  assert metrics.token_f1(predicted, answers) == pytest.approx(f1)
  assert metrics.exact_match(predicted, answers) == exact


def test_bootstrap_interval_is_the_binomial_s():
  label = np.zeros(400, int)
  predicted = (np.arange(400) < 100).astype(int)  # accuracy 0.75
  low, high = metrics.bootstrap_interval(
    metrics.accuracy, predicted, label, resamples=2000
  )
  half = 1.96 * np.sqrt(0.75 * 0.25 / 400)
  assert low == pytest.approx(0.75 - half, abs=0.01)
  assert high == pytest.approx(0.75 + half, abs=0.01)
