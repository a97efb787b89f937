"""A self-contained HTML page that compares runs."""

import html
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath
from flax.traverse_util import flatten_dict

from zofo_jax import errors
from zofo_jax.report import curves
from zofo_jax.report.jsonl import read_jsonl

# Quantities on the x axis, and its labels.
_BUDGETS = {
  "step": "outer step",
  "seconds": "seconds of training",
  "forward_passes": "forward passes over a batch",
}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem;
  margin: 2rem auto; padding: 0 1rem; color: #263238; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; } svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #cfd8dc;
  text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td.text { text-align: left; }
"""


class RunLog(NamedTuple):
  """The files of a run.

  Attributes:
    name: of the run on the page.
    metrics: rows of `metrics.jsonl`.
    summary: `summary.json`; {} if the run has not ended.
    config: `config.json`, flattened to {"zo.eps": 1e-3, ...}.
  """

  name: str
  metrics: list[dict[str, Any]]
  summary: dict[str, Any]
  config: dict[str, Any]


def find(folders: Sequence[str]) -> list[RunLog]:
  """Reads runs.

  Raises:
    UserError: a folder holds no run, or one of its files cannot be read.
  """
  names = _names(folders)
  return list(map(_find, folders, names))


def _find(folder: str, name: str) -> RunLog:
  path = epath.Path(folder)
  metrics = [row for row in read_jsonl(path / "metrics.jsonl") if "step" in row]
  if not metrics:
    raise errors.UserError(
      f"'{folder}' holds no run: expected a folder with metrics.jsonl and at "
      "least one step in it."
    )
  return RunLog(
    name,
    metrics,
    _read(path / "summary.json"),
    flatten_dict(_read(path / "config.json"), sep="."),
  )


def _read(path: epath.Path) -> dict[str, Any]:
  if not path.exists():
    return {}
  try:
    content = json.loads(path.read_text())
  except ValueError as error:
    raise errors.UserError(
      f"'{path}' is not JSON ({errors.first_line(error)})."
    ) from error
  return content if isinstance(content, dict) else {}


def _names(folders: Sequence[str]) -> list[str]:
  """Names runs by their folders' last parts, by all of them where two agree."""
  last = [epath.Path(folder).name for folder in folders]
  return list(folders) if len(set(last)) < len(last) else last


def page(runs: Sequence[RunLog]) -> str:
  """Returns the page of some runs.

  Args:
    runs: as returned by `find`.

  Returns:
    HTML, with its style and its pictures (SVG) inlined: results, the fields of
    the config in which the runs differ, losses and scores on the selection rows
    against steps, seconds and forward passes.
  """
  title = " · ".join(run.name for run in runs)
  parts = [
    f"<h1>{html.escape(title)}</h1>",
    "<h2>Results</h2>",
    _table([{"run": run.name, **_results(run)} for run in runs]),
  ]
  if differing := _differences(runs):
    parts += ["<h2>Where the configs differ</h2>", _table(differing)]
  parts += ["<h2>Loss on D_f</h2>", _picture(runs, "upper_loss")]
  scores = dict.fromkeys(
    curves.selecting_score(run.metrics, run.summary.get("selection_metric"))
    for run in runs
  )
  if pictures := [_picture(runs, score) for score in scores if score]:
    parts += ["<h2>Selection rows</h2>", *pictures]
  body = "\n".join(parts)
  return (
    "<!doctype html>\n"
    f'<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
    f"<body>\n{body}\n</body></html>\n"
  )


def _results(run: RunLog) -> dict[str, Any]:
  """Returns numbers and names of a summary; before the end, the last step."""
  plain = {
    name: value
    for name, value in run.summary.items()
    if isinstance(value, str | int | float)
  }
  return plain or {"ended": "no", "step": run.metrics[-1]["step"]}


def _differences(runs: Sequence[RunLog]) -> list[dict[str, Any]]:
  """Returns a row for each field of the config in which runs differ."""
  names = dict.fromkeys(name for run in runs for name in run.config)
  return [
    {"field": name, **{run.name: run.config.get(name) for run in runs}}
    for name in names
    if len({json.dumps(run.config.get(name)) for run in runs}) > 1
  ]


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
  names = list(dict.fromkeys(name for row in rows for name in row))
  head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
  lines = [
    "<tr>" + "".join(_cell(row.get(name, "")) for name in names) + "</tr>"
    for row in rows
  ]
  return (
    f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'
  )


def _cell(value: Any) -> str:
  if isinstance(value, float):
    return f"<td>{value:.4g}</td>"
  kind = "" if isinstance(value, int) else ' class="text"'
  return f"<td{kind}>{html.escape(str(value))}</td>"


def _picture(runs: Sequence[RunLog], name: str) -> str:
  """Draws a metric against each of the budgets, as SVG."""
  from matplotlib import figure  # slow to import

  fig = figure.Figure(figsize=(12, 3.4), layout="constrained")
  panels = fig.subplots(1, len(_BUDGETS), sharey=True)
  for axes, (budget, text) in zip(panels, _BUDGETS.items(), strict=True):
    for run in runs:
      position: dict[str, float] = {}
      points = []
      for row in run.metrics:
        # Rows of scores lack some budgets: use those of the row before.
        position |= {k: row[k] for k in _BUDGETS if row.get(k) is not None}
        if row.get(name) is not None and budget in position:
          points.append((position[budget], row[name]))
      if points:
        x, y = zip(*points, strict=True)
        smoothed = len(y) > 12
        axes.plot(
          x,
          curves.smooth(y) if smoothed else y,
          "-" if smoothed else "o-",
          label=run.name,
          markersize=4,
        )
    axes.set_xlabel(text)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
  panels[0].set_ylabel(name.replace("_", " "))
  panels[0].legend(frameon=False)
  file = io.StringIO()
  fig.savefig(file, format="svg", metadata={"Date": None})
  drawn = file.getvalue()
  return drawn[drawn.index("<svg") :]
