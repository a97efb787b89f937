"""Rewards: scores of generated texts, computed on the host.

A reward is a function as trainers of TRL take it: `reward(completions,
**columns)` returns one number for each completion, the higher the better. The
columns are those of the rows, and `prompts`, each a list as long as the
completions. The built-in ones also read the accepted `answers`.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from zofo_jax import errors
from zofo_jax.data import encode_prompts
from zofo_jax.evaluation import metrics, user_function

RewardFn = Callable[..., Sequence[float]]
_FIELD = "config.reward.functions"
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


class Options(NamedTuple):
  """What the built-in rewards read besides texts.

  Attributes:
    pattern: regular expression of `regex`.
    keys: of the object that `json` expects.
    max_words: of an answer, for `length`.
  """

  pattern: str = ""
  keys: tuple[str, ...] = ()
  max_words: int = 0


_DEFAULT_OPTIONS = Options()


def _of_answers(score: Callable[[str, Sequence[str]], float]) -> RewardFn:
  """Returns the reward of a score of (text, accepted answers)."""

  def reward(completions, answers, **columns):
    del columns
    return [score(text, a) for text, a in zip(completions, answers)]

  return reward


def _of_text(score: Callable[[str], float]) -> RewardFn:
  """Returns the reward of a score of a text alone."""
  return lambda completions, **columns: [score(text) for text in completions]


def last_number(text: str) -> float | None:
  """Returns the last number in a text, "1,200.50" as 1200.5; None without."""
  numbers = _NUMBER.findall(text)
  return float(numbers[-1].replace(",", "")) if numbers else None


def number(text: str, answers: Sequence[str]) -> float:
  """Returns 1 if the last number is that of an accepted answer, else 0."""
  value = last_number(text)
  if value is None:
    return 0.0
  expected = [last_number(answer) for answer in answers]
  return float(
    any(
      x is not None and math.isclose(value, x, rel_tol=1e-6) for x in expected
    )
  )


def json_keys(text: str, keys: Sequence[str]) -> float:
  """Returns how much of an object with some keys a text is, 0 to 1.

  Half is for being a JSON object, the rest for the share of keys that it has.
  """
  try:
    value = json.loads(text)
  except ValueError:
    return 0.0
  if not isinstance(value, dict):
    return 0.0
  return 0.5 + 0.5 * (sum(k in value for k in keys) / len(keys) if keys else 1)


def length(text: str, max_words: int) -> float:
  """Returns minus the words beyond a number of them, over that number."""
  return -max(0, len(text.split()) - max_words) / max_words


# Those that compare a completion with the accepted answers.
NEED_ANSWERS = ("exact_match", "token_f1", "number", "rouge_l")
BUILT_IN: dict[str, Callable[[Options], RewardFn]] = {
  "exact_match": lambda _: _of_answers(metrics.exact_match),
  "token_f1": lambda _: _of_answers(metrics.token_f1),
  "number": lambda _: _of_answers(number),
  "regex": lambda options: _of_text(
    lambda text: float(bool(re.search(options.pattern, text)))
  ),
  "json": lambda options: _of_text(lambda text: json_keys(text, options.keys)),
  "length": lambda options: _of_text(
    lambda text: length(text, options.max_words)
  ),
  "rouge_l": lambda _: _of_answers(metrics.rouge_l),
}


class Rewards:
  """A weighted sum of reward functions.

  Attributes:
    names: of the functions, built-in or MODULE:FUNCTION.
    weights: of the functions, in the same order.
  """

  def __init__(
    self,
    names: Sequence[str],
    weights: Sequence[float] = (),
    options: Options = _DEFAULT_OPTIONS,
  ):
    """Finds the functions.

    Args:
      names: built-in ones, or MODULE:FUNCTION.
      weights: one for each; () for 1.
      options: of the built-in ones.

    Raises:
      UserError: a function does not exist.
    """
    self.names = tuple(names)
    self.weights = tuple(weights) or (1.0,) * len(self.names)
    self._functions = [
      BUILT_IN[name](options)
      if name in BUILT_IN
      else user_function.load(name, _FIELD)
      for name in self.names
    ]

  def score(
    self,
    completions: Sequence[str],
    questions: Sequence[encode_prompts.Question],
  ) -> np.ndarray:
    """Scores completions by each function.

    Args:
      completions: generated texts.
      questions: the prompt of each.

    Returns:
      float64, shape [functions, completions].

    Raises:
      UserError: a function raised, or returned another number of scores or
        some that are not finite; names the function and the row.
    """
    return np.array(
      [
        _call(name, function, completions, questions)
        for name, function in zip(self.names, self._functions, strict=True)
      ]
    ).reshape(len(self.names), len(completions))

  def total(self, scores: np.ndarray) -> np.ndarray:
    """Returns the weighted sum over the first axis of `score`'s result."""
    return np.tensordot(np.asarray(self.weights, np.float64), scores, 1)

  def __call__(
    self,
    completions: Sequence[str],
    questions: Sequence[encode_prompts.Question],
  ) -> np.ndarray:
    """Returns the reward of each completion; as `total` of `score`."""
    return self.total(self.score(completions, questions))


def _columns(
  name: str, questions: Sequence[encode_prompts.Question]
) -> dict[str, list[Any]]:
  """Returns what a function is called with, besides the completions."""
  if name in BUILT_IN:
    return {"answers": [question.answers for question in questions]}
  names = dict.fromkeys(c for question in questions for c in question.columns)
  columns: dict[str, list[Any]] = {
    str(column): [question.columns.get(column) for question in questions]
    for column in names
    if column != "completions"
  }
  return {**columns, "prompts": [question.prompt for question in questions]}


def _call(
  name: str,
  function: RewardFn,
  completions: Sequence[str],
  questions: Sequence[encode_prompts.Question],
) -> list[float]:
  """Calls a function and checks what it returns."""
  about = f"{_FIELD}: '{name}'"
  if name in NEED_ANSWERS:
    for question in questions:
      if not question.answers:
        raise errors.UserError(
          f"{about} compares with an accepted answer; {question.source} has "
          "none."
        )

  def call(completions, questions):
    return function(list(completions), **_columns(name, questions))

  # A function that ends the process would end it in the middle of a run.
  try:
    values = call(completions, questions)
  except (Exception, SystemExit) as error:
    row = _first_failing(call, completions, questions)
    raise errors.UserError(
      f"{about} raised {type(error).__name__}{row} "
      f"({errors.first_line(error)}); expected reward(completions, **columns) "
      "to return a number for each completion."
    ) from error
  try:
    values = list(values)
  except TypeError:
    values = [values]
  if len(values) != len(completions):
    raise errors.UserError(
      f"{about} returned {len(values)} scores for {len(completions)} "
      f"completions, the first of {questions[0].source}; expected one each."
    )
  scores = []
  for value, text, question in zip(values, completions, questions, strict=True):
    try:
      score = float(value)
    except (TypeError, ValueError):
      score = math.nan
    if not math.isfinite(score):
      raise errors.UserError(
        f"{about} returned {value!r} for the answer to {question.source}, "
        f"{text[:60]!r}; expected a finite number."
      )
    scores.append(score)
  return scores


def _first_failing(call, completions, questions) -> str:
  """Returns for which row a function raises when it is called with one."""
  for text, question in zip(completions, questions, strict=True):
    try:
      call([text], [question])
    except (Exception, SystemExit):
      return f" for the answer to {question.source}, {text[:60]!r}"
  return ""
