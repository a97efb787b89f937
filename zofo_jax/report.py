"""What a run tells people: progress, metrics as JSON lines, tables, a picture.

`metrics.jsonl` has one dictionary a line. Those of training have `step`,
`lower_loss` and `upper_loss`, and some of them `selection_accuracy` (adapter p)
and `selection_accuracy_s`; `plot_curves` reads these names.
"""

import functools
import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO, Any, Self

import numpy as np
from etils import epath

from zofo_jax import errors


class JsonlWriter:
  """Appends dictionaries to a file, one a line, each flushed at once."""

  def __init__(self, path: epath.PathLike):
    """Remembers the path; the file is made by the first write."""
    self.path = epath.Path(path)
    self._file: IO[Any] | None = None

  def __enter__(self) -> Self:
    """Returns itself."""
    return self

  def __exit__(self, *unused: object) -> None:
    """Closes the file."""
    self.close()

  def write(self, row: Mapping[str, Any]) -> None:
    """Appends one row; NumPy and JAX values become numbers and lists."""
    if self._file is None:
      self.path.parent.mkdir(parents=True, exist_ok=True)
      self._file = self.path.open("a")
    self._file.write(_dumps(row) + "\n")
    self._file.flush()

  def truncate_after(self, step: int) -> None:
    """Drops what a resumed run will write again.

    Rows of steps later than `step` go, and so does a last line without its end;
    rows without a step stay. The file is replaced in one piece.

    Raises:
      UserError: if a whole line is no JSON dictionary.
    """
    self.close()
    rows = [r for r in read_jsonl(self.path) if r.get("step", step) <= step]
    _replace(self.path, "".join(_dumps(row) + "\n" for row in rows))

  def close(self) -> None:
    """Closes the file; a later write opens it again."""
    if self._file is not None:
      self._file.close()
      self._file = None


def read_jsonl(path: epath.PathLike) -> list[dict[str, Any]]:
  """Reads the rows but for a torn last line; none where there is no file.

  Raises:
    UserError: if a whole line is no JSON dictionary.
  """
  path = epath.Path(path)
  if not path.exists():
    return []
  # Bytes, split at b"\n" alone: the tear may be inside a character.
  *lines, _ = path.read_bytes().split(b"\n")
  rows = []
  for number, line in enumerate(lines, 1):
    try:
      row = json.loads(line)
    except ValueError:
      row = None
    if not isinstance(row, dict):
      raise errors.UserError(
        f"'{path}' line {number}: expected a JSON dictionary, found "
        f"{line[:40]!r}."
      )
    rows.append(row)
  return rows


def write_json(path: epath.PathLike, obj: Any) -> None:
  """Writes a JSON file in one piece: the old one or the new one, never half."""
  _replace(epath.Path(path), _dumps(obj, indent=2) + "\n")


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


def results_table(
  rows: Sequence[Mapping[str, Any]],
  *,
  title: str | None = None,
  stream: IO[str] | None = None,
) -> None:
  """Prints a table whose columns are the names in the rows.

  Args:
    rows: one mapping a row; a name that a row lacks is left blank. Numbers with
      a fraction get three digits after the point.
    title: printed above.
    stream: where to write; None for standard output.
  """
  from rich import console, table  # not needed by a run in a pod

  names = list(dict.fromkeys(name for row in rows for name in row))
  numeric = (int, float, np.number)
  shown = table.Table(title=title, title_justify="left")
  for name in names:
    right = any(isinstance(row.get(name), numeric) for row in rows)
    shown.add_column(name, justify="right" if right else "left")
  for row in rows:
    shown.add_row(*(_cell(row.get(name, "")) for name in names))
  console.Console(file=stream).print(shown, markup=False, highlight=False)


def plot_curves(
  metrics_path: epath.PathLike,
  out_png: epath.PathLike,
) -> None:
  """Draws the losses and, beside them, the accuracy on the selection rows.

  Without an accuracy in the file the second panel shows the size of the
  zeroth-order coefficients.

  Raises:
    UserError: if the file has no row with a step.
  """
  from matplotlib import figure, ticker  # slow to import

  rows = [row for row in read_jsonl(metrics_path) if "step" in row]
  if not rows:
    raise errors.UserError(f"'{metrics_path}' has no row with a step to draw.")
  # A Figure of its own, not pyplot's: no global state and no display.
  fig = figure.Figure(figsize=(10, 3.8), layout="constrained")
  losses, other = fig.subplots(1, 2)
  for name, text, colour in (
    ("lower_loss", "lower level, adapter s", "tab:blue"),
    ("upper_loss", "upper level, adapter p", "tab:orange"),
  ):
    steps, values = _series(rows, name)
    losses.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
    losses.plot(steps, _smooth(values), color=colour, label=text)
  losses.set_ylabel("loss on the batch")
  accuracies = (
    ("selection_accuracy", "adapter p", "tab:orange"),
    ("selection_accuracy_s", "adapter s", "tab:blue"),
  )
  if any(name in row for row in rows for name, *_ in accuracies):
    for name, text, colour in accuracies:
      steps, values = _series(rows, name)
      other.plot(steps, values, "o-", color=colour, label=text, markersize=4)
    other.set_ylabel("accuracy on the selection rows")
    other.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
  else:
    steps, values = _series(rows, "coefficients")
    other.plot(steps, values, color="tab:green", label="root mean square")
    other.set_ylabel("zeroth-order coefficients")
  for axes in (losses, other):
    axes.set_xlabel("outer step")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
  path = epath.Path(out_png)
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("wb") as file:
    fig.savefig(file, format="png", dpi=150)


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


def device_bytes() -> int | None:
  """Returns the memory used on the fullest local device, if any tells."""
  import jax  # a reader of metrics has no use for devices

  stats = [device.memory_stats() for device in jax.local_devices()]
  used = [s["bytes_in_use"] for s in stats if s and "bytes_in_use" in s]
  return max(used) if used else None


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


def _plain(value: Any) -> Any:
  """Turns arrays and paths into JSON; what is not finite becomes null."""
  if isinstance(value, Mapping):
    return {str(key): _plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  if isinstance(value, float):
    return value if math.isfinite(value) else None  # NaN is not JSON
  if value is None or isinstance(value, str | int):
    return value
  if hasattr(value, "__array__"):
    return _plain(np.asarray(value).tolist())
  return str(value)


def _dumps(obj: Any, indent: int | None = None) -> str:
  return json.dumps(_plain(obj), indent=indent, allow_nan=False)


def _replace(path: epath.Path, text: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  beside = path.with_name(path.name + ".tmp")
  beside.write_text(text)
  beside.replace(path)


def _series(
  rows: Iterable[Mapping[str, Any]], name: str
) -> tuple[list[int], list[float]]:
  """Picks (steps, values); a list of values counts as its root mean square."""
  steps, values = [], []
  for row in rows:
    value = row.get(name)
    if isinstance(value, list):
      known = [v for v in value if v is not None]
      value = math.sqrt(sum(v * v for v in known) / max(len(known), 1))
    if value is not None:
      steps.append(row["step"])
      values.append(value)
  return steps, values


def _smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
  """Averages exponentially, without the bias of a start at zero."""
  average, total, smoothed = 0.0, 0.0, []
  for value in values:
    average = weight * average + (1 - weight) * value
    total = weight * total + (1 - weight)
    smoothed.append(average / total)
  return smoothed


def _cell(value: Any) -> str:
  if isinstance(value, float | np.floating):
    return f"{value:.3f}"
  return str(value)


def _duration(seconds: float) -> str:
  if not math.isfinite(seconds):
    return "?"
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _gigabytes(number: int) -> str:
  return f"{number / 1e9:.2f} GB"
