"""Calibration against a slow transcription, and prompts without content."""

import math

import numpy as np
import pytest

from zofo_jax import errors, tasks
from zofo_jax.data import encode_options
from zofo_jax.data import tokenizer as tokenizer_lib
from zofo_jax.evaluation import calibration

LEAST = np.finfo(np.float32).min


def test_contextual_is_the_transcription():
  draw = np.random.RandomState(0)
  scores = draw.randn(4, 3).astype(np.float32)
  nulls = draw.randn(2, 4, 3).astype(np.float32)
  actual = calibration.contextual(scores, nulls)
  for n in range(4):
    content_free = []
    for o in range(3):
      shares = []
      for null in nulls:
        total = sum(math.exp(value) for value in null[n])
        shares.append(math.exp(null[n][o]) / total)
      content_free.append(sum(shares) / len(shares))
    total = sum(math.exp(value) for value in scores[n])
    q = [math.exp(scores[n][o]) / total / content_free[o] for o in range(3)]
    expected = [value / sum(q) for value in q]
    one_row = np.exp(actual[n]) / np.exp(actual[n]).sum()
    np.testing.assert_allclose(one_row, expected, rtol=1e-5)


def test_domain_is_the_transcription():
  draw = np.random.RandomState(0)
  scores, null = draw.randn(2, 4, 3).astype(np.float32)
  counts = draw.randint(1, 5, size=(4, 3))
  actual = calibration.domain(scores, null[None], counts)
  np.testing.assert_allclose(actual, counts * (scores - null), rtol=1e-5)


def test_missing_options_never_win():
  scores = np.array([[-1.0, -2.0, LEAST]], np.float32)
  nulls = np.array([[[-0.5, -1.0, LEAST]]], np.float32)
  for actual in (
    calibration.contextual(scores, nulls),
    calibration.domain(scores, nulls, np.array([[1, 2, 0]])),
  ):
    assert np.isfinite(actual).all() and actual.argmax() < 2
    assert actual[0, 2] == LEAST


@pytest.mark.parametrize(
  "name, fields, content, expected",
  [
    ("sst2", {"sentence": "a fine film ."}, "", " It was"),
    ("sst2", {"sentence": "a fine film ."}, "N/A", "N/A It was"),
    (
      "rte",
      {"premise": "It froze.", "hypothesis": "It was cold"},
      "",
      '\nDoes this mean that "" is true? Yes or No?\n',
    ),
    (
      "copa",
      {
        "premise": "It froze.",
        "choice1": "We slid.",
        "choice2": "We swam.",
        "question": "effect",
      },
      "N/A",
      "N/A so",
    ),
  ],
)
def test_null_prompts(name, fields, content, expected):
  row = tasks.Row(fields, "made up row 1")
  assert calibration.null_prompt(tasks.get(name), row, content) == expected


def test_every_task_has_a_null_prompt_or_says_why_not():
  without = set()
  for name, task in tasks.ALL.items():
    row = tasks.Row(task.example, "example")
    for content in ("N/A", "[MASK]", ""):
      try:
        calibration.null_prompt(task, row, content)
      except errors.UserError as error:
        assert "cannot be calibrated" in str(error)
        without.add(name)
  # What follows the blank is part of the options; the text is a list of words.
  assert without == {"winogrande", "hatexplain"}


def test_lengths(tiny_model):
  tokenizer = tokenizer_lib.load_tokenizer(tiny_model)
  task = tasks.custom("own", prompt="{a} is", options=(" great", " great film"))
  row = tasks.Row({"a": "it", "label": 0}, "made up row 1")
  examples = [encode_options.encode(task, row, tokenizer, max_length=64)]
  expected = [
    len(tokenizer(option)["input_ids"]) for option in task.options(row)
  ]
  assert calibration.lengths(examples).tolist() == [expected]


def test_columns_of_the_options_stay():
  task = tasks.custom(
    "own", prompt="{a}: {b} or {c}?", options=(" {b}", " {c}")
  )
  row = tasks.Row({"a": "Now", "b": "ice", "c": "fire", "label": 0}, "row 1")
  assert calibration.null_prompt(task, row, "N/A") == "N/A: ice or fire?"
