"""Plots of a run, from its `metrics.jsonl`.

Rows of training have `step`, `lower_loss` and `upper_loss`; some rows have
`selection_METRIC`, of the adapter by which checkpoints are selected.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from zofo_jax import errors
from zofo_jax.report.jsonl import read_jsonl
from zofo_jax.sharding import multihost

# Looked for, in this order, in runs whose summary names no `selection_metric`:
# they have not ended, or are of an earlier version.
SCORES = ("selection_mean", "selection_accuracy", "selection_token_f1")


def selecting_score(
  rows: Iterable[Mapping[str, Any]], metric: str | None = None
) -> str | None:
  """Returns the name of the score by which a run selects its checkpoint.

  Args:
    rows: of `metrics.jsonl`.
    metric: `selection_metric` of the run's summary; None if it has none.

  Returns:
    A name in the rows, such as "selection_accuracy"; None if they have none.
  """
  names = {name for row in rows for name in row}
  scores = SCORES if metric is None else (f"selection_{metric}",)
  return next((score for score in scores if score in names), None)


def plot_curves(
  metrics_path: epath.PathLike,
  out_png: epath.PathLike,
  selection_metric: str | None = None,
) -> None:
  """Draws the losses and, in a second panel, the score on the selection rows.

  If the file has no such score, the second panel shows the size of the
  zeroth-order coefficients.

  Args:
    metrics_path: `metrics.jsonl` of a run.
    out_png: the file to write.
    selection_metric: the metric that selects checkpoints, as in the summary.

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
  score = selecting_score(rows, selection_metric)
  if score:
    steps, values = series(rows, score)
    other.plot(
      steps, values, "o-", color="tab:orange", label="adapter p", markersize=4
    )
    text = score.removeprefix("selection_").replace("_", " ")
    other.set_ylabel(f"{text} on the selection rows")
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
