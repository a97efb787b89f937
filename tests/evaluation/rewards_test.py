"""Reward functions: what they return, and what is wrong with others."""

import sys
import types

import numpy as np
import pytest

from zofo_jax import errors
from zofo_jax.config import validate_reward
from zofo_jax.data import encode_prompts
from zofo_jax.evaluation import rewards

QUESTIONS = [
  encode_prompts.Question(
    (1,), ("a cat", "dog"), f"rows.jsonl row {i}", f"Q{i}:", {"level": i}
  )
  for i in (1, 2, 3)
]


def scores(name, texts, questions=QUESTIONS, **options):
  function = rewards.Rewards((name,), (), rewards.Options(**options))
  return function(texts, questions[: len(texts)]).tolist()


@pytest.mark.parametrize(
  "name, options, by_text",
  [
    ("exact_match", {}, {"The cat": 1, "dog.": 1, "a dog and a cat": 0}),
    ("rouge_l", {}, {"dog": 1, "a red cat": 0.8, "bird": 0}),
    ("token_f1", {}, {"cat": 1, "cat dog": 2 / 3, "": 0}),
    ("regex", {"pattern": r"^\d+ cats?$"}, {"3 cats": 1, "1 cat": 1, "cat": 0}),
    (
      "json",
      {"keys": ("a", "b")},
      {'{"a": 1, "b": 2}': 1, '{"b": 0}': 0.75, "[1]": 0, '{"a": 1': 0},
    ),
    ("length", {"max_words": 2}, {"one two": 0, "one two three": -0.5}),
  ],
)
def test_built_in_rewards(name, options, by_text):
  questions = QUESTIONS * 2
  actual = scores(name, list(by_text), questions, **options)
  assert actual == pytest.approx(list(by_text.values()))


@pytest.mark.parametrize(
  "text, answer, expected",
  [
    ("6 * 7 = 42", "#### 42", 1),
    ("It costs $1,200.50.", "1200.5", 1),
    ("-3", "3", 0),
    ("4e1", "40", 1),
    ("forty", "40", 0),
    ("41 or 42, so 41", "42", 0),
  ],
)
def test_the_last_number_is_the_answer(text, answer, expected):
  assert rewards.number(text, (answer,)) == expected


@pytest.fixture
def own(monkeypatch):
  """Registers functions of one's own as the module `own_rewards`."""
  module = types.ModuleType("own_rewards")
  monkeypatch.setitem(sys.modules, "own_rewards", module)

  def add(function):
    module.reward = function
    return "own_rewards:reward"

  return add


def test_a_function_gets_completions_prompts_and_columns(own):
  seen = {}

  def reward(completions, prompts, level, **columns):
    seen.update(columns, prompts=prompts)
    return [len(text) + n for text, n in zip(completions, level)]

  name = own(reward)
  assert scores(name, ["a", "bb", "ccc"]) == [2, 4, 6]
  assert seen == {"prompts": ["Q1:", "Q2:", "Q3:"]}
  both = rewards.Rewards((name, "exact_match"), (0.5, 2.0))
  np.testing.assert_allclose(
    both(["dog", "bb", "ccc"], QUESTIONS), [0.5 * 4 + 2, 2, 3]
  )


def fail(completions, level, **columns):
  del completions, columns
  return [1 / (2 - n) for n in level]


def leave(completions, **columns):
  del completions, columns
  sys.exit("bye")


@pytest.mark.parametrize(
  "reward, words",
  [
    (
      fail,
      "raised ZeroDivisionError for the answer to rows.jsonl row 2, 'b' "
      r"\(division by zero\)",
    ),
    (leave, r"raised SystemExit for .* row 1, 'a' \(bye\)"),
    (lambda completions: [1.0], r"raised TypeError .*expected reward\("),
    (
      lambda completions, **columns: [1.0],
      "returned 1 scores for 3 completions, .* row 1; expected one each",
    ),
    (lambda completions, **columns: 1.0, "returned 1 scores for 3"),
    (
      lambda completions, **columns: [0.0, float("nan"), 0.0],
      "returned nan for the answer to rows.jsonl row 2, 'b'; expected a finite",
    ),
    (lambda completions, **columns: [0.0, 0.0, None], "returned None .* row 3"),
    (lambda completions, **columns: ["x"] * 3, "returned 'x' .* row 1"),
  ],
)
def test_what_is_wrong_with_a_function(own, reward, words):
  with pytest.raises(errors.UserError, match="'own_rewards:reward' " + words):
    scores(own(reward), ["a", "b", "c"])


@pytest.mark.parametrize(
  "name, words",
  [
    ("no_such_module:reward", "cannot import.*no_such_module"),
    ("own_rewards:rewards", "no function 'rewards'.*mean 'reward'"),
  ],
)
def test_functions_that_are_not_there(own, name, words):
  own(fail)
  with pytest.raises(errors.UserError, match=f"reward.functions: .*{words}"):
    rewards.Rewards((name,))


def test_a_module_of_the_current_folder_needs_a_path(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "my_own_rewards.py").write_text("")
  monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
  with pytest.raises(errors.UserError, match=r"PYTHONPATH=\. lets"):
    rewards.Rewards(("my_own_rewards:reward",))


def test_rewards_of_answers_need_answers():
  question = QUESTIONS[0]._replace(answers=())
  with pytest.raises(errors.UserError, match=r"'token_f1' .* row 1 has none"):
    scores("token_f1", ["a"], [question])


def test_the_config_knows_the_same_functions():
  assert tuple(validate_reward.BUILT_IN) == tuple(rewards.BUILT_IN)
