"""Tables, pictures and claims from the results of single_task.py.

  python experiments/report.py [--results experiments/results]

Reads `single_task.jsonl` and writes `table.md`, `curves.png`, `memory.png` and
`claims.json` to the same folder. Of `guided.jsonl`, `guided_long.jsonl`,
`guided_few.jsonl` and `guided_meta.json`, if they are there, `guided.md` and
further claims.
"""

import argparse
import collections
import json
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import claims
import numpy as np
from claims import Cell, score_name
from matplotlib import figure

from zofo_jax import report

ROOT = pathlib.Path(__file__).parents[1]
BUDGETS = {
  "seconds": "seconds of training",
  "forward_equivalents": "forward-equivalents (rows)",
}
# Endings of scores besides that of the adapter that is kept.
OTHERS = {"p": "p", "s": "s", "base": "θ alone"}


def _names(cells: Iterable[Cell], name: str) -> list[str]:
  return list(dict.fromkeys(cell[name] for cell in cells))


def read(path: pathlib.Path) -> list[Cell]:
  """Reads cells; other adapters than LoRA count as methods of their own."""
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


def _timed(cells: Sequence[Cell]) -> list[Cell]:
  """Returns the cells of each task from the machine with most of them."""
  trained = [cell for cell in cells if "train_seconds" in cell]
  machines: dict[str, collections.Counter[str]] = {}
  for cell in trained:
    counts = machines.setdefault(cell["task"], collections.Counter())
    counts[cell.get("processor", "")] += 1
  most = {task: count.most_common(1)[0][0] for task, count in machines.items()}
  return [c for c in trained if c.get("processor", "") == most[c["task"]]]


def _complete(cells: Sequence[Cell]) -> list[Cell]:
  """Returns the cells of methods that have every task."""
  tasks = _names(cells, "task")
  complete = [
    method
    for method in _names(cells, "method")
    if all(_group(cells, task, method) for task in tasks)
  ]
  return [cell for cell in cells if cell["method"] in complete]


def tables(cells: Sequence[Cell]) -> str:
  """Returns the methods that have every task, then all of the others' tasks."""
  complete = _complete(cells)
  others = {c["task"] for c in cells if c not in complete}
  parts = [complete, [c for c in cells if c["task"] in others]]
  return "\n".join(table(part) for part in parts if part)


def table(cells: Sequence[Cell]) -> str:
  """Returns test scores as Markdown: mean ± spread over seeds, by method.

  The row of Bilevel-ZOFO is for the adapter that is kept; the other one, and
  theta without an adapter, have separate rows. Seconds and memory are from the
  machine on which most cells of a task ran.
  """
  timed = _timed(cells)
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
      (f"{method}, {text}", method, "test_{}_" + ending)
      for ending, text in OTHERS.items()
      if any(f"test_accuracy_{ending}" in cell for cell in group)
    ]
  for text, method, pattern in rows:
    texts, means, used = [], [], []
    for task in tasks:
      group = _group(cells, task, method)
      named = [(c, pattern.format(score_name(c))) for c in group]
      scores = [c[name] for c, name in named if name in c]
      if not scores:
        texts.append("")
        continue
      means.append(statistics.fmean(scores))
      spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
      several = f"{spread} ({len(scores)})" if method else ""
      texts.append(f"{means[-1]:.3f}{several}")
      used += group
    mean = f"{statistics.fmean(means):.3f}" if len(means) == len(tasks) else ""
    cost = ["", ""]
    used = [c for c in used if c in timed]
    if method and used:
      cost = [
        f"{statistics.median(c['train_seconds'] for c in used):.0f}",
        f"{statistics.median(c['peak_rss_bytes'] for c in used) / 1e9:.2f}",
      ]
    lines.append(f"| {text} | {' | '.join([*texts, mean, *cost])} |")
  return "\n".join(lines) + "\n"


def _look(axes: Any) -> None:
  axes.grid(alpha=0.25)
  axes.spines[["top", "right"]].set_visible(False)


def draw_curves(cells: Sequence[Cell], path: pathlib.Path) -> None:
  """Plots scores on the selection rows over seconds and forward passes."""
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
  """Plots memory over time, one point per cell."""
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
  """Writes all tables, plots and claims."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  default = ROOT / "experiments/results"
  parser.add_argument("--results", type=pathlib.Path, default=default)
  folder = parser.parse_args().results
  cells = read(folder / "single_task.jsonl")
  if not cells:
    raise SystemExit(f"report.py: {folder}/single_task.jsonl has no cells.")
  answers = claims.answers(cells)
  if (path := folder / "guided.jsonl").exists():
    guided = read(path)
    answers["published_gain_over_lora"] = answers["accuracy_gain_over_lora"]
    answers |= claims.guided_answers(guided)
    with_20 = "bilevel_all20"
    answers["guided_with_20_inner_steps"] = claims.guided_answers(
      guided, with_20
    )
    parts = [tables(guided)]
    for name, method in (("long", claims.ALL), ("few", with_20)):
      if (path := folder / f"guided_{name}.jsonl").exists():
        more = read(path)
        parts.append(tables(more))
        answers[f"guided_{name}"] = claims.guided_answers(more, method)
    (folder / "guided.md").write_text("\n".join(parts))
  if (path := folder / "guided_meta.json").exists():
    answers |= claims.meta_answers(json.loads(path.read_text()))
  report.write_json(folder / "claims.json", answers)
  (folder / "table.md").write_text(tables(cells))
  timed = _timed(_complete(cells))
  draw_curves(timed, folder / "curves.png")
  draw_memory(timed, folder / "memory.png")
  print(tables(cells))
  print(json.dumps(answers, indent=2))


if __name__ == "__main__":
  main()
