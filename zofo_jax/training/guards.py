"""What ends a run before its end: signals, broken steps, growing losses."""

import math
import signal
from collections.abc import Sequence
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Losses that the start of a run is the mean of, and the memory of its average.
_START = 10


class InterruptedRun(Exception):
  """A signal ended a run, whose state is saved; its text is for people.

  Attributes:
    code: exit code, 128 and the signal's number: 143 or 130.
  """

  def __init__(self, number: int, text: str):
    """Remembers the signal."""
    super().__init__(f"stopped by {signal.Signals(number).name} {text}")
    self.code = 128 + number


class Signals:
  """Notes SIGTERM and SIGINT in a `with` statement; a second one kills.

  Several processes must stop at one step: there JAX's own service, which has
  SIGTERM, finds it.
  """

  def __init__(self) -> None:
    """Changes nothing yet."""
    self._number: int | None = None
    self._before: dict[int, Any] = {}

  def __enter__(self) -> Self:
    """Takes the signals over, where this is the main thread."""
    if jax.process_count() > 1:
      return self
    try:
      for number in SIGNALS:
        self._before[number] = signal.signal(number, self._note)
    except ValueError:  # not the main thread: they are not ours
      pass
    return self

  def __exit__(self, *unused: object) -> None:
    """Gives the signals back."""
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _note(self, number: int, frame: FrameType | None) -> None:
    del frame
    self._number = number
    signal.signal(number, signal.SIG_DFL)

  def preemption_requested(self, step: int) -> int | None:
    """Returns the signal after which a run should end with this step, if any.

    Args:
      step: number of the iteration; every process asks at every one.
    """
    if jax.process_count() == 1:
      return self._number
    stop = multihost_utils.reached_preemption_sync_point(step)
    return signal.SIGTERM if stop else None


class Guard:
  """Counts steps that are not finite, and compares losses with their start.

  Attributes:
    memory: all that it remembers; JSON, kept in the checkpoints.
  """

  def __init__(
    self, memory: dict[str, Any], *, max_nonfinite: int, max_loss_ratio: float
  ):
    """Goes on from a memory.

    Args:
      memory: of the run so far; {} at its start.
      max_nonfinite: steps in a row that end a run; 0 for no limit.
      max_loss_ratio: a moving average of the loss, above this many times the
        mean of the first ten, ends a run; 0 for no limit.
    """
    self.state: dict[str, Any] = {
      "nonfinite": 0,
      "in_a_row": 0,
      "losses": [],
    } | memory
    self._max_nonfinite = max_nonfinite
    self._max_loss_ratio = max_loss_ratio

  def update(self, losses: Sequence[float], dropped: bool) -> str:
    """Looks at a step.

    Args:
      losses: all that were found; the last is compared with its start.
      dropped: whether none of the directions was finite.

    Returns:
      Why the run should end; "" if it should not.
    """
    memory = self.state
    if dropped or not all(map(math.isfinite, losses)):
      memory["nonfinite"] += 1
      memory["in_a_row"] += 1
      if 0 < self._max_nonfinite <= memory["in_a_row"]:
        return (
          f"{memory['in_a_row']} steps in a row were not finite and were "
          "skipped (config.train.max_nonfinite); expected smaller learning "
          "rates or zo.eps"
        )
      return ""
    memory["in_a_row"] = 0
    return self._compare(losses[-1]) if self._max_loss_ratio else ""

  def _compare(self, loss: float) -> str:
    memory = self.state
    if len(memory["losses"]) < _START:
      memory["losses"].append(loss)
      return ""
    start = sum(memory["losses"]) / _START
    average = memory.get("average", start)
    average += (loss - average) / _START
    memory["average"] = average
    if average <= self._max_loss_ratio * start:
      return ""
    return (
      f"the loss on D_f is {average:.3g} on average, above "
      f"{self._max_loss_ratio:g} times the {start:.3g} of its start "
      "(config.train.max_loss_ratio); expected smaller learning rates"
    )
