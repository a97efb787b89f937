"""Progress of long work: a bar, or lines, with rate, time left and memory."""

import functools
import math
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import IO, Any, Self

from zofo_jax.report import memory
from zofo_jax.sharding import multihost


class Progress:
  """Displays progress: a bar on a terminal, else a line from time to time."""

  def __init__(
    self,
    total: int,
    label: str = "train",
    *,
    unit: str = "steps",
    start: int = 0,
    stream: IO[str] | None = None,
    seconds_between_lines: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Prepares the display; it appears with the first update.

    Args:
      total: the number of steps at the end.
      label: the name of the work.
      unit: of a step, in the plural.
      start: steps done so far, by the run that is resumed.
      stream: where to write; None for standard error.
      seconds_between_lines: how often to write when it is not a terminal.
      clock: the time in seconds.
    """
    self._total = total
    self._label = label
    self._unit = unit
    self._stream = sys.stderr if stream is None else stream
    self._every = seconds_between_lines
    self._clock = clock
    self._last_line = -math.inf
    # The rate is that of the last updates. The first step, which includes
    # compilation, is left out as soon as there is another.
    self._times = deque([(start, clock())], maxlen=30)
    self._first = True
    self._is_primary = multihost.is_primary()
    self._bar: Any = None
    self._task: Any = None

  def __enter__(self) -> Self:
    """Returns itself."""
    return self

  def __exit__(self, *unused: object) -> None:
    """Leaves the last state of the bar on the screen."""
    if self._bar is not None:
      self._bar.stop()

  def update(self, step: int, **values: float) -> None:
    """Shows that `step` steps are done, with numbers such as lower=0.31."""
    if not self._is_primary:
      return
    now = self._clock()
    if self._first and len(self._times) == 2:
      self._times.popleft()
      self._first = False
    self._times.append((step, now))
    old_step, old_time = self._times[0]
    rate = (step - old_step) / (now - old_time) if now > old_time else 0.0
    left = (self._total - step) / rate if rate > 0 else math.inf
    in_use = [_gigabytes(memory.rss_bytes())]
    if (device := memory.device_bytes()) is not None:
      in_use.append(f"device {_gigabytes(device)}")
    texts = [f"{name} {value:.4g}" for name, value in values.items()]
    texts += [f"{rate:.3g} {self._unit}/s", f"{_duration(left)} left", *in_use]
    if self._stream.isatty():
      self._show_bar(step, "  ".join(texts))
    elif now - self._last_line >= self._every or step >= self._total:
      self._last_line = now
      self.write_line(
        "  ".join([f"{self._label} {step}/{self._total}", *texts])
      )

  def write_line(self, text: str) -> None:
    """Writes a line, above the bar if there is one."""
    if not self._is_primary:
      return
    if self._bar is not None:
      self._bar.console.print(text, markup=False, highlight=False)
    else:
      print(text, file=self._stream, flush=True)

  def _show_bar(self, step: int, text: str) -> None:
    from rich import progress  # not needed by a run in a pod

    if self._bar is None:
      column = progress.TextColumn
      self._bar = progress.Progress(
        column("{task.description}", markup=False),
        progress.BarColumn(bar_width=16),
        column("{task.completed:.0f}/{task.total:.0f}"),
        column("{task.fields[text]}", markup=False),
        console=_terminal(self._stream),
        refresh_per_second=4,
      )
      self._task = self._bar.add_task(self._label, total=self._total, text="")
      self._bar.start()
    self._bar.update(self._task, completed=step, text=text)


@functools.cache
def _terminal(stream: IO[str]) -> Any:
  """Returns the only console of a stream: bars can then be nested."""
  from rich import console

  return console.Console(file=stream)


def _duration(seconds: float) -> str:
  if not math.isfinite(seconds):
    return "?"
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  text = f"{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
  return f"{hours}:{text}" if hours else text


def _gigabytes(number: int) -> str:
  return f"{number / 1e9:.2f} GB"
