"""Errors that a user can correct, each described in one sentence."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
  """Invalid config, data, checkpoint or mesh; the message is for the user."""


def nearest(name: str, valid: Iterable[str]) -> str:
  """Returns a sentence that suggests the closest valid name, or ""."""
  close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
  return f" Did you mean '{close[0]}'?" if close else ""


def first_cause(error: BaseException) -> UserError | None:
  """Returns the `UserError` that led to an error, the first if several did."""
  first = None
  cause: BaseException | None = error
  while cause is not None:
    if isinstance(cause, UserError):
      first = cause
    cause = cause.__cause__ or cause.__context__
  return first


def first_line(error: BaseException) -> str:
  """Returns the first line of an error's message, or the error's type."""
  return (str(error) or type(error).__name__).splitlines()[0].rstrip(". ")
