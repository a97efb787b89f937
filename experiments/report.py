"""Tables, pictures and claims from the results of single_task.py.

  python experiments/report.py [--results experiments/results]

Reads `single_task.jsonl`, and writes `table.md`, `curves.png`, `memory.png` and
`claims.json` beside it. Nothing in those is written by hand.
"""

import argparse
import json
import pathlib
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib import figure

from zofo_jax import report
from zofo_jax.tasks import get

ROOT = pathlib.Path(__file__).parents[1]
Cell = dict[str, Any]
OURS, LORA, MEZO = "bilevel", "peft", "mezo"
BUDGETS = {
  "seconds": "seconds of training",
  "forward_equivalents": "forward-equivalents (rows)",
}


def score_name(cell: Cell) -> str:
  """Returns what a cell's task is measured by."""
  return str(get(cell["task"]).metric)


def key(cell: Cell) -> tuple[str, str, str]:
  """Returns what two methods' cells must share to be compared."""
  return cell["task"], cell["seed"], cell.get("template", "0")


def pairs(
  cells: Iterable[Cell], one: str, other: str
) -> list[tuple[Cell, Cell]]:
  """Returns cells of two methods on the same task, seed and prompt 0."""
  found: dict[str, dict[Any, Cell]] = {one: {}, other: {}}
  for cell in cells:
    if cell["method"] in found and cell.get("template", "0") == "0":
      found[cell["method"]][key(cell)] = cell
  both = sorted(found[one].keys() & found[other].keys())
  return [(found[one][k], found[other][k]) for k in both]


def first_time(curve: Sequence[Cell], name: str, score: float) -> float | None:
  """Returns the seconds after which a curve is at a score, if ever."""
  for point in curve:
    if point[f"selection_{name}"] >= score:
      return float(point["seconds"])
  return None


def time_ratio(ours: Cell, mezo: Cell) -> float:
  """Returns MeZO's seconds to its best over ours to the same; 0 for never."""
  name = score_name(mezo)
  best = max(point[f"selection_{name}"] for point in mezo["curve"])
  theirs, mine = (
    first_time(cell["curve"], name, best) for cell in (mezo, ours)
  )
  assert theirs is not None
  return theirs / mine if mine else 0.0


def gain(ours: Cell, lora: Cell) -> float:
  """Returns the difference of the test scores."""
  name = f"test_{score_name(ours)}"
  return ours[name] - lora[name]


def interval(
  values: Sequence[float], average: Callable[[Any], Any] = np.mean
) -> list[float]:
  """Returns a 95 % bootstrap interval of an average."""
  draw = np.random.RandomState(0).randint(len(values), size=(2000, len(values)))
  means = average(np.asarray(values)[draw], axis=1)
  return [float(x) for x in np.percentile(means, [2.5, 97.5])]


def claim(
  cells: Sequence[Cell],
  other: str,
  measure: Callable[[Cell, Cell], float],
  target: str,
  average: Callable[[Any], Any] = np.mean,
) -> dict[str, Any] | None:
  """Measures ours against another method on all cells that both have.

  Args:
    cells: results.
    other: the method.
    measure: (our cell, its) -> number.
    target: what was hoped for, as ">= 4".
    average: of the numbers.

  Returns:
    The value, its interval, tasks, seeds; None where nothing can be compared.
  """
  both = pairs(cells, OURS, other)
  if not both:
    return None
  values = [measure(*pair) for pair in both]
  value = float(average(np.asarray(values), axis=0))
  sense, _, limit = target.partition(" ")
  met = value >= float(limit) if sense == ">=" else value <= float(limit)
  by_task: dict[str, list[float]] = {}
  for (ours, _), number in zip(both, values, strict=True):
    by_task.setdefault(ours["task"], []).append(round(number, 4))
  return {
    "value": value,
    "interval": interval(values, average),
    "target": target,
    "met": bool(met),
    "tasks": sorted(by_task),
    "seeds": sorted({ours["seed"] for ours, _ in both}),
    "by_task": by_task,
  }


def prompt_spread(cells: Iterable[Cell]) -> dict[str, Any] | None:
  """Compares how far prompts are apart, with ours and with MeZO."""
  scores: dict[tuple[str, str, str], dict[str, float]] = {}
  for cell in cells:
    if cell["method"] in (OURS, MEZO):
      which = (cell["method"], cell["task"], cell["seed"])
      versions = scores.setdefault(which, {})
      versions[cell.get("template", "0")] = cell[f"test_{score_name(cell)}"]
  spreads: dict[str, dict[tuple[str, str], float]] = {OURS: {}, MEZO: {}}
  for (method, task, seed), versions in scores.items():
    if len(versions) > 1:
      apart = max(versions.values()) - min(versions.values())
      spreads[method][task, seed] = apart
  both = sorted(spreads[OURS].keys() & spreads[MEZO].keys())
  if not both:
    return None
  means = [
    statistics.fmean(spreads[method][k] for k in both)
    for method in (OURS, MEZO)
  ]
  value = means[0] / means[1] if means[1] else None
  return {
    "value": value,
    "interval": None,
    "target": "<= 0.5",
    "met": value is not None and value <= 0.5,
    "tasks": sorted({task for task, _ in both}),
    "seeds": sorted({seed for _, seed in both}),
    "spreads": dict(zip((OURS, MEZO), means, strict=True)),
  }


def claims(cells: Sequence[Cell]) -> dict[str, Any]:
  """Answers each claim of the method's from the results."""

  def memory(one: Cell, other: Cell) -> float:
    return one["program_bytes"] / other["program_bytes"]

  def resident(one: Cell, other: Cell) -> float:
    return one["peak_rss_bytes"] / other["peak_rss_bytes"]

  return {
    "time_to_mezo_best_ratio": claim(
      cells, MEZO, time_ratio, ">= 4", np.median
    ),
    "accuracy_gain_over_lora": claim(cells, LORA, gain, ">= 0.01"),
    "peak_memory_over_lora": claim(cells, LORA, memory, "<= 1.05", np.median),
    "peak_memory_over_mezo": claim(cells, MEZO, memory, "<= 1.3", np.median),
    "peak_resident_over_lora": claim(
      cells, LORA, resident, "<= 1.05", np.median
    ),
    "peak_resident_over_mezo": claim(
      cells, MEZO, resident, "<= 1.3", np.median
    ),
    "prompt_spread_over_mezo": prompt_spread(cells),
  }


def _names(cells: Iterable[Cell], name: str) -> list[str]:
  return list(dict.fromkeys(cell[name] for cell in cells))


def read(path: pathlib.Path) -> list[Cell]:
  """Reads cells; those with another adapter are of another method."""
  cells = report.read_jsonl(path)
  for cell in cells:
    if (adapter := cell.get("adapter", "lora")) != "lora":
      cell["method"] = f"{cell['method']}, {adapter}"
  return cells


def _group(cells: Iterable[Cell], task: str, method: str = "") -> list[Cell]:
  """Returns a task's cells with prompt 0, of a method or of all."""
  return [
    cell
    for cell in cells
    if cell["task"] == task
    and cell["method"] == (method or cell["method"])
    and cell.get("template", "0") == "0"
  ]


def table(cells: Sequence[Cell]) -> str:
  """Returns test scores as Markdown: mean ± spread over seeds, a row a method.

  For Bilevel-ZOFO the adapter that is kept, and the other in a row of its own.
  """
  tasks = _names(cells, "task")
  lines = [
    f"| method | {' | '.join(tasks)} | mean | seconds | peak GB |",
    "|" + " --- |" * (len(tasks) + 4),
  ]
  rows: list[tuple[str, str, str]] = [("zero-shot", "", "zero_shot_{}")]
  for method in _names(cells, "method"):
    rows.append((method, method, "test_{}"))
    group = [cell for cell in cells if cell["method"] == method]
    rows += [
      (f"{method}, {letter}", method, "test_{}_" + letter)
      for letter in ("p", "s")
      if any(f"test_accuracy_{letter}" in cell for cell in group)
    ]
  for text, method, pattern in rows:
    shown, means, spent = [], [], []
    for task in tasks:
      group = _group(cells, task, method)
      named = [(c, pattern.format(score_name(c))) for c in group]
      scores = [c[name] for c, name in named if name in c]
      if not scores:
        shown.append("")
        continue
      means.append(statistics.fmean(scores))
      spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
      several = f"{spread} ({len(scores)})" if method else ""
      shown.append(f"{means[-1]:.3f}{several}")
      spent += group
    mean = f"{statistics.fmean(means):.3f}" if len(means) == len(tasks) else ""
    cost = ["", ""]
    spent = [c for c in spent if "train_seconds" in c]
    if method and spent:
      cost = [
        f"{statistics.median(c['train_seconds'] for c in spent):.0f}",
        f"{statistics.median(c['peak_rss_bytes'] for c in spent) / 1e9:.2f}",
      ]
    lines.append(f"| {text} | {' | '.join([*shown, mean, *cost])} |")
  return "\n".join(lines) + "\n"


def _look(axes: Any) -> None:
  axes.grid(alpha=0.25)
  axes.spines[["top", "right"]].set_visible(False)


def draw_curves(cells: Sequence[Cell], path: pathlib.Path) -> None:
  """Draws scores on the selection rows against seconds and forward passes."""
  tasks, methods = _names(cells, "task"), _names(cells, "method")
  fig = figure.Figure(figsize=(3.4 * len(tasks), 6), layout="constrained")
  panels = fig.subplots(len(BUDGETS), len(tasks), squeeze=False, sharey="col")
  for row, (budget, text) in zip(panels, BUDGETS.items(), strict=True):
    for axes, task in zip(row, tasks, strict=True):
      for number, method in enumerate(methods):
        group = _group(cells, task, method)
        if not group:
          continue
        points = [c["curve"] for c in group]
        length = min(map(len, points))
        name = f"selection_{score_name(group[0])}"
        x, y = (
          np.mean([[p[k] for p in c[:length]] for c in points], axis=0)
          for k in (budget, name)
        )
        axes.plot(x, y, "o-", color=f"C{number}", label=method, markersize=3)
      axes.set_xlabel(text)
      axes.set_title(task)
      _look(axes)
  panels[0, 0].set_ylabel("selection rows")
  panels[0, 0].legend(frameon=False)
  fig.savefig(path, dpi=120)


def draw_memory(cells: Sequence[Cell], path: pathlib.Path) -> None:
  """Draws memory against time, a point a cell."""
  fig = figure.Figure(figsize=(6, 4), layout="constrained")
  axes = fig.subplots()
  for number, method in enumerate(_names(cells, "method")):
    group = [c for c in cells if c["method"] == method]
    axes.scatter(
      [c["train_seconds"] for c in group],
      [c["peak_rss_bytes"] / 1e9 for c in group],
      s=[200 * c[f"test_{score_name(c)}"] ** 2 for c in group],
      color=f"C{number}",
      alpha=0.6,
      label=method,
    )
  axes.set_xlabel("seconds of training")
  axes.set_ylabel("peak resident memory, GB")
  axes.set_title("larger: higher test score")
  axes.legend(frameon=False)
  _look(axes)
  fig.savefig(path, dpi=120)


def main() -> None:
  """Writes all of it."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  default = ROOT / "experiments/results"
  parser.add_argument("--results", type=pathlib.Path, default=default)
  folder = parser.parse_args().results
  cells = read(folder / "single_task.jsonl")
  if not cells:
    raise SystemExit(f"report.py: {folder}/single_task.jsonl has no cells.")
  found = claims(cells)
  report.write_json(folder / "claims.json", found)
  (folder / "table.md").write_text(table(cells))
  trained = [cell for cell in cells if "curve" in cell]
  draw_curves(trained, folder / "curves.png")
  draw_memory(trained, folder / "memory.png")
  print(table(cells))
  print(json.dumps(found, indent=2))


if __name__ == "__main__":
  main()
