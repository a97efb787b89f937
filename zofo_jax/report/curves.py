"""Plots of a run, from its `metrics.jsonl`.

Rows of training have `step`, `lower_loss` and `upper_loss`; some rows have
`selection_accuracy` or `selection_token_f1` (of adapter p).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from zofo_jax import errors
from zofo_jax.report.jsonl import read_jsonl
from zofo_jax.sharding import multihost


def plot_curves(
  metrics_path: epath.PathLike,
  out_png: epath.PathLike,
) -> None:
  """Draws the losses and, in a second panel, the score on the selection rows.

  That is the accuracy, or token F1. If the file has neither, the second panel
  shows the size of the zeroth-order coefficients.

  Args:
    metrics_path: `metrics.jsonl` of a run.
    out_png: the file to write.

  Raises:
    UserError: the file has no row with a step.
  """
  if not multihost.is_primary():
    return
  from matplotlib import figure, ticker  # slow to import

  rows = [row for row in read_jsonl(metrics_path) if "step" in row]
  if not rows:
    raise errors.UserError(f"'{metrics_path}' has no row with a step to draw.")
  # Not pyplot: no global state and no display.
  fig = figure.Figure(figsize=(10, 3.8), layout="constrained")
  losses, other = fig.subplots(1, 2)
  for name, text, colour in (
    ("lower_loss", "lower level, adapter s", "tab:blue"),
    ("upper_loss", "upper level, adapter p", "tab:orange"),
  ):
    steps, values = series(rows, name)
    losses.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
    losses.plot(steps, smooth(values), color=colour, label=text)
  losses.set_ylabel("loss on the batch")
  scores = {"selection_accuracy": "accuracy", "selection_token_f1": "token F1"}
  score = next((s for s in scores if any(s in row for row in rows)), None)
  if score:
    steps, values = series(rows, score)
    other.plot(
      steps, values, "o-", color="tab:orange", label="adapter p", markersize=4
    )
    other.set_ylabel(f"{scores[score]} on the selection rows")
    other.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
  else:
    steps, values = series(rows, "coefficients")
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


def series(
  rows: Iterable[Mapping[str, Any]], name: str
) -> tuple[list[int], list[float]]:
  """Returns (steps, values) of a field; of a list its root mean square."""
  steps, values = [], []
  for row in rows:
    value = row.get(name)
    if isinstance(value, list):
      finite = [v for v in value if v is not None]
      value = math.sqrt(sum(v * v for v in finite) / max(len(finite), 1))
    if value is not None:
      steps.append(row["step"])
      values.append(value)
  return steps, values


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
  """Returns exponential moving averages, corrected for the start at zero."""
  average, total, smoothed = 0.0, 0.0, []
  for value in values:
    average = weight * average + (1 - weight) * value
    total = weight * total + (1 - weight)
    smoothed.append(average / total)
  return smoothed
