"""What a run leaves for people: metrics as JSON lines, tables, a picture.

`metrics.jsonl` has one dictionary a line. Those of training have `step`,
`lower_loss` and `upper_loss`, and some of them `selection_accuracy` or
`selection_token_f1` (of adapter p); `plot_curves` reads these names. Of
several processes only the first writes anything.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any, Self

import numpy as np
from etils import epath

from zofo_jax import errors, processes


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
    if not processes.is_first():
      return
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
    if not processes.is_first():
      return
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


def write_lines(path: epath.PathLike, rows: Iterable[Any]) -> None:
  """Writes a JSON line for each row, all of them or none."""
  lines = "".join(_dumps(row) + "\n" for row in rows)
  _replace(epath.Path(path), lines)


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
  if not processes.is_first():
    return
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
  """Draws the losses and, beside them, the score on the selection rows.

  That is the accuracy, or token F1. Without either in the file the second panel
  shows the size of the zeroth-order coefficients.

  Raises:
    UserError: if the file has no row with a step.
  """
  if not processes.is_first():
    return
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
  scores = {"selection_accuracy": "accuracy", "selection_token_f1": "token F1"}
  known = [name for name in scores if any(name in row for row in rows)]
  if known:
    steps, values = _series(rows, known[0])
    other.plot(
      steps, values, "o-", color="tab:orange", label="adapter p", markersize=4
    )
    other.set_ylabel(f"{scores[known[0]]} on the selection rows")
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
  if not processes.is_first():
    return
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
