"""Errors that a user can correct, each described in one sentence."""

import difflib
import json
import os
import signal
import sys
from collections.abc import Iterable, Mapping
from typing import Any


class UserError(ValueError):
  """Invalid config, data, checkpoint or mesh; the message is for the user.

  The message is one line that every terminal can print: characters of a file
  that are not printable are written as Python writes them.
  """

  def __init__(self, text: str):
    """Stores the message."""
    super().__init__(
      "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    )


class RowError(UserError):
  """A row of data that cannot be used.

  Attributes:
    source: file and row.
    reason: what is wrong with it.
    fields: its columns, if they could be read.
  """

  fields: Mapping[str, Any] | None = None

  def __init__(self, source: str, reason: str):
    """Stores the row's source and the reason."""
    super().__init__(f"{source}: {reason}")
    self.source = source
    self.reason = reason


class UnusableRowError(RowError):
  """A row that published sets are known to have.

  It has no label or no text, or two of its options are the same tokens.
  """


class BlankTextError(UnusableRowError):
  """A row without text."""


class InterruptedRun(Exception):
  """A signal ended a run, whose state is saved; the message is for the user.

  Attributes:
    code: exit code, 128 and the signal's number: 143 or 130.
  """

  def __init__(self, number: int, text: str):
    """Stores the signal's number."""
    super().__init__(f"stopped by {signal.Signals(number).name} {text}")
    self.code = 128 + number


def nearest(name: str, valid: Iterable[str], cutoff: float = 0.5) -> str:
  """Returns a sentence that suggests the closest valid name, or ""."""
  close = difflib.get_close_matches(name, list(valid), n=1, cutoff=cutoff)
  return f" Did you mean '{close[0]}'?" if close else ""


def as_json(value: Any) -> str:
  """Returns a value of a row for a message; dots stand for its end."""
  if isinstance(value, str):
    return json.dumps(value if len(value) <= 40 else f"{value[:40]}...")
  text = json.dumps(value, default=str)
  return text if len(text) <= 60 else f"{text[:60]}..."


def first_line(error: BaseException) -> str:
  """Returns the first line of an error's message, or the error's type."""
  return (str(error) or type(error).__name__).splitlines()[0].rstrip(". ")


def exit_if_command(error: ValueError) -> None:
  """Prints why jax cannot be imported and exits, in commands of this package.

  Args:
    error: what `import jax` raised, as it does if a variable of the shell, such
      as JAX_ENABLE_X64, has no valid value.
  """
  # "-m" stands for a module that is still being looked for.
  if os.path.basename((*sys.argv, "")[0]) not in ("-m", "zofo"):
    return
  problem = first_line(error)
  for name, value in os.environ.items():
    if name.startswith("JAX_") and name.lower() in problem.lower():
      problem = f"{name}: expected a value that jax knows; found '{value}'"
  print(f"zofo_jax: {UserError(problem)}.", file=sys.stderr)
  sys.exit(2)
