"""Errors that users see."""

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


def test_first_line():
  assert errors.first_line(OSError("no disk.\nmore")) == "no disk"
  assert errors.first_line(KeyError()) == "KeyError"
