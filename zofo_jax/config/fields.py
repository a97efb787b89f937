"""A field of the config and its check; the table is `defaults._ROWS`."""

from collections.abc import Callable
from typing import Any, NamedTuple

from zofo_jax import errors


class Check(NamedTuple):
  """A condition on the value of one field.

  Attributes:
    expected: what completes "expected ..." in an error, "" if anything goes.
    accepts: whether a value meets the condition.
    choices: all valid values, where they can be listed.
  """

  expected: str
  accepts: Callable[[Any], bool]
  choices: tuple[str, ...] = ()


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

  def validate(self, value: Any) -> None:
    """Raises a UserError if the value does not meet the field's check."""
    check = self.check
    if check.accepts(value):
      return
    # Names are quoted, numbers are not.
    text = f"'{value}'" if check.choices else f"{value}"
    raise errors.UserError(
      f"config.{self.name}: expected {check.expected}; found {text}."
      f"{errors.nearest(str(value), check.choices)}"
    )


ANY = Check("", lambda _: True)
# Written so that NaN fails.
POSITIVE = Check("more than 0", lambda value: value > 0)
NOT_NEGATIVE = Check("0 or more", lambda value: value >= 0)


def one_of(*choices: str) -> Check:
  """Returns the check of a field that takes one of several names."""
  return Check(f"one of {', '.join(choices)}", choices.__contains__, choices)
