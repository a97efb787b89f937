"""Errors that users see."""

import json

import pytest

from zofo_jax import errors


def test_a_user_error_is_a_value_error():
  with pytest.raises(ValueError, match="expected 1"):
    raise errors.UserError("found 2, expected 1")


def test_nearest():
  assert errors.nearest("low_rnk", ["gaussian", "low_rank"]) == (
    " Did you mean 'low_rank'?"
  )
  assert errors.nearest("zzz", ["gaussian", "low_rank"]) == ""
  assert errors.nearest("own", ["wnli"]) == " Did you mean 'wnli'?"
  assert errors.nearest("own", ["wnli"], 0.75) == ""


@pytest.mark.parametrize(
  "value, expected",
  [
    ('a "b"', '"a \\"b\\""'),
    (41 * "a", '"' + 40 * "a" + '..."'),
    ([1, None], "[1, null]"),
    (["a"] * 20, json.dumps(["a"] * 12) + ", ..."),
  ],
)
def test_values_for_messages(value, expected):
  text = errors.as_json(value)
  assert text == expected if len(text) < 60 else text[:50] == expected[:50]


def test_first_line():
  assert errors.first_line(OSError("no disk.\nmore")) == "no disk"
  assert errors.first_line(KeyError()) == "KeyError"
