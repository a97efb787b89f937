"""Long work shows itself: a bar or lines with rate, time left and memory."""

import functools
import math
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import IO, Any, Self

from zofo_jax.sharding import multihost


class Progress:
  """Shows how long work goes on: a bar on a terminal, else a line at times."""

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
      label: what is done.
      unit: what a step is, in the plural.
      start: steps done before, by the run that is resumed.
      stream: where to write; None for standard error.
      seconds_between_lines: how often to write when it is no terminal.
      clock: the time in seconds.
    """
    self._total = total
    self._label = label
    self._unit = unit
    self._stream = sys.stderr if stream is None else stream
    self._every = seconds_between_lines
    self._clock = clock
    self._last_line = -math.inf
    # The rate is that of the last updates. The first step of all is left out
    # of it as soon as there is another: it holds the compilation.
    self._times = deque([(start, clock())], maxlen=30)
    self._first = True
    self._first_process = multihost.is_primary()
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
    if not self._first_process:
      return
    now = self._clock()
    if self._first and len(self._times) == 2:
      self._times.popleft()
      self._first = False
    self._times.append((step, now))
    old_step, old_time = self._times[0]
    rate = (step - old_step) / (now - old_time) if now > old_time else 0.0
    left = (self._total - step) / rate if rate > 0 else math.inf
    memory = [_gigabytes(rss_bytes())]
    if (device := device_bytes()) is not None:
      memory.append(f"device {_gigabytes(device)}")
    texts = [f"{name} {value:.4g}" for name, value in values.items()]
    texts += [f"{rate:.3g} {self._unit}/s", f"{_duration(left)} left", *memory]
    if self._stream.isatty():
      self._show_bar(step, "  ".join(texts))
    elif now - self._last_line >= self._every or step >= self._total:
      self._last_line = now
      self.say("  ".join([f"{self._label} {step}/{self._total}", *texts]))

  def say(self, text: str) -> None:
    """Writes a line, above the bar where there is one."""
    if not self._first_process:
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


def peak_rss_bytes() -> int:
  """Returns the largest resident memory that this process has had, in bytes."""
  # getrusage also counts what the parent had when it started this process.
  if (high := _proc_status("VmHWM")) is not None:
    return high
  import resource  # not on every system

  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024


def rss_bytes() -> int:
  """Returns the resident memory now, or its peak where only that is known."""
  now = _proc_status("VmRSS")
  return peak_rss_bytes() if now is None else now


def device_bytes(which: str = "bytes_in_use") -> int | None:
  """Returns the memory used on the fullest local device, if any tells.

  Args:
    which: "bytes_in_use", or "peak_bytes_in_use".
  """
  import jax  # a reader of metrics has no use for devices

  stats = [device.memory_stats() for device in jax.local_devices()]
  used = [s[which] for s in stats if s and which in s]
  return max(used) if used else None


def program_bytes(program: Any) -> int | None:
  """Returns what a compiled program needs on a device, if the compiler tells.

  Its arguments, temporaries, and results that take no argument's place.
  """
  found = program.memory_analysis()
  if found is None:
    return None
  return (
    found.argument_size_in_bytes
    + found.temp_size_in_bytes
    + found.output_size_in_bytes
    - found.alias_size_in_bytes
  )


def memory() -> dict[str, int]:
  """Returns what a log line says of memory, in bytes.

  The process's resident size now, and `peaks`.
  """
  found = {"rss_bytes": rss_bytes(), **peaks()}
  # Read after it, the kernel's own peak can be a few pages lower than it was.
  found["peak_rss_bytes"] = max(found["peak_rss_bytes"], found["rss_bytes"])
  return found


def peaks() -> dict[str, int]:
  """Returns the most that the process held and, if it tells, a device."""
  found = {"peak_rss_bytes": peak_rss_bytes()}
  if (peak := device_bytes("peak_bytes_in_use")) is not None:
    found["peak_device_bytes"] = peak
  return found


@functools.cache
def _terminal(stream: IO[str]) -> Any:
  """Gives the one console of a stream, on which a bar may stand in a bar."""
  from rich import console

  return console.Console(file=stream)


def _proc_status(field: str) -> int | None:
  try:
    with open("/proc/self/status") as file:
      for line in file:
        if line.startswith(field + ":"):
          return int(line.split()[1]) * 1024
  except OSError:
    pass
  return None


def _duration(seconds: float) -> str:
  if not math.isfinite(seconds):
    return "?"
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _gigabytes(number: int) -> str:
  return f"{number / 1e9:.2f} GB"
