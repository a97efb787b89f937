"""Reasons to end a run early: signals, non-finite steps, growing losses."""

import math
import signal
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Signals that follow the first one within this time are the same request.
SAME_SECONDS = 1.0
# Losses whose mean is that of the start, and the time constant of the average.
_WINDOW = 10


class Signals:
  """Records SIGTERM and SIGINT in a `with` statement; another one kills.

  A second one within a second of the first is ignored: programs that start
  others, such as `uv run`, pass on a Ctrl-C that the terminal has sent to all
  of them. A third kills in any case.

  Several processes must stop at the same step, which JAX's preemption service
  finds; it handles SIGTERM itself.
  """

  def __init__(self) -> None:
    """Initializes; handlers are installed by the `with` statement."""
    self._number: int | None = None
    self._first_time = 0.0
    self._before: dict[int, Any] = {}

  def __enter__(self) -> Self:
    """Installs the handlers, if this is the main thread."""
    if jax.process_count() > 1:
      return self
    try:
      for number in SIGNALS:
        self._before[number] = signal.signal(number, self._note)
    except ValueError:  # not the main thread
      pass
    return self

  def __exit__(self, *unused: object) -> None:
    """Restores the previous handlers, once a second signal would be new."""
    if self._number is not None:
      passed = time.monotonic() - self._first_time
      time.sleep(max(0.0, SAME_SECONDS - passed))
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _note(self, number: int, frame: FrameType | None) -> None:
    del frame
    now = time.monotonic()
    if self._number is None:
      self._number, self._first_time = number, now
      return
    # Not left to Python, which handles a signal only between two instructions.
    for other in SIGNALS:
      signal.signal(other, signal.SIG_DFL)
    if now - self._first_time > SAME_SECONDS:
      signal.raise_signal(number)

  def preemption_requested(self, step: int) -> int | None:
    """Returns the signal because of which a run should end now, if any.

    Args:
      step: its number; every process asks after every step.
    """
    if jax.process_count() == 1:
      return self._number
    stop = multihost_utils.reached_preemption_sync_point(step)
    return signal.SIGTERM if stop else None


class Guard:
  """Counts steps that are not finite, and compares losses with the first ones.

  Attributes:
    state: counts and averages; JSON, saved with the checkpoints.
  """

  def __init__(
    self, state: dict[str, Any], *, max_nonfinite: int, max_loss_ratio: float
  ):
    """Initializes the guard.

    Args:
      state: of the run so far; {} at its start.
      max_nonfinite: consecutive non-finite steps that end a run; 0 for no
        limit.
      max_loss_ratio: a run ends if the moving average of the loss exceeds this
        many times the mean of the first ten; 0 for no limit.
    """
    self.state: dict[str, Any] = {
      "nonfinite": 0,
      "in_a_row": 0,
      "losses": [],
    } | state
    self._max_nonfinite = max_nonfinite
    self._max_loss_ratio = max_loss_ratio

  def update(self, losses: Sequence[float], skipped: bool) -> str:
    """Takes the losses of a step into account.

    Args:
      losses: of the step; the last is judged by those of the first steps.
      skipped: whether none of the directions was finite.

    Returns:
      Why the run should end; "" if it should not.
    """
    state = self.state
    if skipped or not all(map(math.isfinite, losses)):
      state["nonfinite"] += 1
      state["in_a_row"] += 1
      if 0 < self._max_nonfinite <= state["in_a_row"]:
        return (
          f"{state['in_a_row']} steps in a row were not finite and were "
          "skipped (config.train.max_nonfinite); expected smaller learning "
          "rates or zo.eps"
        )
      return ""
    state["in_a_row"] = 0
    return self._compare(losses[-1]) if self._max_loss_ratio else ""

  def _compare(self, loss: float) -> str:
    """Returns why the run should end because of its average loss, or ""."""
    state = self.state
    if len(state["losses"]) < _WINDOW:
      state["losses"].append(loss)
      return ""
    start = sum(state["losses"]) / _WINDOW
    average = state.get("average", start)
    average += (loss - average) / _WINDOW
    state["average"] = average
    if average <= self._max_loss_ratio * start:
      return ""
    return (
      f"the loss on D_f is {average:.3g} on average, above "
      f"{self._max_loss_ratio:g} times the {start:.3g} of its start "
      "(config.train.max_loss_ratio); expected smaller learning rates"
    )
