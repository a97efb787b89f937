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


def test_the_first_cause_is_found_inside_other_errors():
  def wrapped():
    try:
      try:
        raise errors.UserError("the sentence")
      except ValueError as error:
        # As ml_collections does: the same class, a traceback as its text.
        raise type(error)("Traceback: …")  # noqa: B904
    except ValueError as error:
      raise RuntimeError("flag --config") from error

  with pytest.raises(RuntimeError) as caught:
    wrapped()
  assert str(errors.first_cause(caught.value)) == "the sentence"
  assert errors.first_cause(KeyError("a")) is None
