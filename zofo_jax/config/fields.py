"""A field of the config and its check; the table is `defaults._ROWS`."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from zofo_jax import errors


class Check(NamedTuple):
  """What a value of one field may be, and how it is read.

  Attributes:
    expected: what completes "expected ..." in an error, "" if anything goes.
    accepts: whether a value meets the condition.
    choices: all valid values, where they can be listed.
    is_path: whether it is a path, or several, or may be one.
    is_text: whether a command line may have escapes for line breaks in it.
  """

  expected: str
  accepts: Callable[[Any], bool]
  choices: tuple[str, ...] = ()
  is_path: bool = False
  is_text: bool = False


# Whether a resumed run may have another value of a field.
ON_REQUEST = "on request"  # if `ckpt.may_change` names the field
NEVER = "never"  # the ledger and the state would be those of another run
ALWAYS = "always"  # no result depends on the field


class Field(NamedTuple):
  """A field of the config.

  Attributes:
    name: dotted, such as "zo.eps".
    default: its default; a type stands for a value of it that is not set.
    check: the condition on its value; conditions on several fields are in
      `validate`.
    help: a phrase for `--print_config` and the documentation.
    may_change: ON_REQUEST, NEVER or ALWAYS.
  """

  name: str
  default: Any
  check: Check
  help: str
  may_change: str = ON_REQUEST

  def map_paths(self, fn: Callable[[str], str], value: Any) -> Any:
    """Returns a value with `fn` applied to its paths, if it is valid."""
    if not self.check.is_path or not value or not self.check.accepts(value):
      return value
    return fn(value) if isinstance(value, str) else tuple(map(fn, value))

  def validate(self, value: Any) -> None:
    """Raises a UserError if the value does not meet the field's check."""
    check = self.check
    if check.accepts(value):
      return
    if check.choices and isinstance(value, tuple):
      value = next(item for item in value if item not in check.choices)
    # Names are quoted, numbers are not.
    text = f"'{value}'" if check.choices else f"{value}"
    if check in _NUMBERS and not _is_usable(value):
      whole = isinstance(value, int)
      text += f", which is {'too large' if whole else 'not finite'}"
    raise errors.UserError(
      f"config.{self.name}: expected {check.expected}; found {text}."
      f"{errors.nearest(str(value), check.choices)}"
    )


def _tuple_of(kind: Any, expected: str) -> Check:
  """Returns the check of a field whose items have a type."""
  return Check(
    expected, lambda value: all(isinstance(item, kind) for item in value)
  )


ANY = Check("", lambda _: True)
TEXT = ANY._replace(is_text=True)
NAMES = _tuple_of(str, "texts, as ('a', 'b')")
TEXTS = NAMES._replace(is_text=True)
LABELS = _tuple_of(str | int | float, "texts or numbers, as ('a', 'b')")
INTEGERS = _tuple_of(int, "whole numbers, as (0, 1)")
NUMBERS = Check(
  "finite numbers, as (1.0, 0.5)",
  lambda value: all(
    isinstance(item, int | float) and math.isfinite(item) for item in value
  ),
)
PATH = ANY._replace(is_path=True)
PATHS = NAMES._replace(is_path=True)
# The largest integer of an array of int32.
_LARGEST = 2**31 - 1


def _is_usable(value: int | float) -> bool:
  """Returns whether a number is finite and, if whole, an int32."""
  if isinstance(value, int):
    return abs(value) <= _LARGEST
  return math.isfinite(value)


FINITE = Check("a finite number", _is_usable)
POSITIVE = Check("more than 0", lambda value: _is_usable(value) and value > 0)
NOT_NEGATIVE = Check(
  "0 or more", lambda value: _is_usable(value) and value >= 0
)
MESH_SIZE = Check(
  "more than 0, or -1 for the rest",
  lambda value: value == -1 or POSITIVE.accepts(value),
)
_NUMBERS = (FINITE, POSITIVE, NOT_NEGATIVE, MESH_SIZE)


def one_of(*choices: str) -> Check:
  """Returns the check of a field that takes one of several names."""
  named = ", ".join(choice or "''" for choice in choices)
  return Check(f"one of {named}", choices.__contains__, choices)


def some_of(*choices: str) -> Check:
  """Returns the check of a field that takes any of several names."""
  return Check(
    f"some of {', '.join(choices)}, as ('{choices[0]}',)",
    lambda value: all(item in choices for item in value),
    choices,
  )


def integer(smallest: int, largest: int) -> Check:
  """Returns the check of a field that takes a whole number of a range."""
  return Check(
    f"a whole number from {smallest} to {largest}",
    lambda value: smallest <= value <= largest,
  )
