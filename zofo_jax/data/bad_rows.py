"""What happens to rows that cannot be used."""

import logging
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from zofo_jax import errors

Policy = Literal["error", "drop"]
_T = TypeVar("_T")


class BadRows:
  """A run's policy, and the rows that it has left out.

  Attributes:
    policy: "error" stops at a row that cannot be used, "drop" leaves it out.
    dropped: reason of each row that was left out, by its file and row.
  """

  def __init__(self, policy: Policy = "error"):
    """Initializes the policy; nothing is left out yet."""
    self.policy = policy
    self.dropped: dict[str, str] = {}

  def record(self, rejected: Sequence[errors.RowError]) -> None:
    """Adds rows that are left out, whatever the policy."""
    self.dropped |= {error.source: error.reason for error in rejected}

  def keep(
    self,
    items: Sequence[_T | errors.RowError],
    name: str,
    is_known: Callable[[errors.RowError], bool] = lambda error: False,
  ) -> list[_T]:
    """Returns what can be used, and reports how much is left out.

    Args:
      items: rows, or what became of them.
      name: of the data, for messages.
      is_known: whether a row is left out even if the policy is "error".

    Raises:
      UserError: the policy is "error", or no row can be used.
    """
    usable: list[_T] = []
    rejected: list[errors.RowError] = []
    for item in items:
      if not isinstance(item, errors.RowError):
        usable.append(item)
        continue
      if self.policy == "error" and not is_known(item):
        if all(isinstance(other, errors.RowError) for other in items):
          raise item
        raise errors.RowError(
          item.source,
          f"{item.reason} Set data.bad_rows to 'drop' to leave such rows out.",
        ) from item
      rejected.append(item)
    self.record(rejected)
    if not rejected:
      return usable
    if not usable:
      raise errors.UserError(
        f"{name}: none of {len(items)} rows can be used; the first: "
        f"{rejected[0]}"
      )
    logging.getLogger("zofo_jax").warning(
      "%s: %d of %d rows are left out; the first: %s",
      *(name, len(rejected), len(items), rejected[0]),
    )
    return usable
