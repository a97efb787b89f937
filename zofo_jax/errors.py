"""Mistakes of a user, told in one sentence."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
  """A mistake in config, data, checkpoint or mesh; its text is for people."""


def nearest(name: str, valid: Iterable[str]) -> str:
  """Suggests the closest valid name, as a sentence to append, or nothing."""
  close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
  return f" Did you mean '{close[0]}'?" if close else ""


def first_line(error: BaseException) -> str:
  """Returns what an error says first; the rest is for experts."""
  return (str(error) or type(error).__name__).splitlines()[0].rstrip(". ")
