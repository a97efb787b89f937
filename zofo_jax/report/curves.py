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
SCORES = (
  *("selection_mean", "selection_reward"),
  *("selection_accuracy", "selection_token_f1"),
)
# Of a panel: the name of its axis; its lines' fields, names and colours.
_LOSSES = (
  "loss on the batch",
  (
    ("lower_loss", "lower level, adapter s", "tab:blue"),
    ("upper_loss", "upper level, adapter p", "tab:orange"),
  ),
)
_REWARDS = (
  "reward on the batch",
  (
    ("reward", "mean of the population", "tab:purple"),
    ("reward_best", "best member", "tab:olive"),
  ),
)


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
  """Draws the losses and, in a last panel, the score on the selection rows.

  If the file has no such score, the last panel shows the size of the
  zeroth-order coefficients. Rewards have a panel of their own; where nothing
  else is learned, the losses have none.

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
  names = {name for row in rows for name in row}
  panels = [_LOSSES] if "reward" not in names or "lower_loss" in names else []
  if "reward" in names:
    panels.append(_REWARDS)
  count = len(panels) + 1
  fig = figure.Figure(figsize=(5 * count, 3.8), layout="constrained")
  *drawn, other = fig.subplots(1, count)
  for axes, (label, lines) in zip(drawn, panels, strict=True):
    for name, text, colour in lines:
      steps, values = series(rows, name)
      axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
      axes.plot(steps, smooth(values), color=colour, label=text)
    axes.set_ylabel(label)
  score = selecting_score(rows, selection_metric)
  if score:
    steps, values = series(rows, score)
    other.plot(
      steps, values, "o-", color="tab:orange", label="adapter p", markersize=4
    )
    text = score.removeprefix("selection_").replace("_", " ")
    other.set_ylabel(f"{text} on the selection rows")
    if score != "selection_reward":
      other.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
  else:
    steps, values = series(rows, "coefficients")
    other.plot(steps, values, color="tab:green", label="root mean square")
    other.set_ylabel("zeroth-order coefficients")
  for axes in (*drawn, other):
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
