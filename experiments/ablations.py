"""Ablations of Bilevel-ZOFO: one choice changed at a time, on one task.

  python experiments/ablations.py --data DIR [--task sst2] [--only lambda,T]

Each cell is a run of configs/compare.py with one field changed and the work of
the main table's runs. Cells that have finished, or are in --results, are
skipped. Writes `ablations.jsonl`, `ablations.md` and `ablations.png` to
--results.
"""

import argparse
import itertools
import pathlib
import runpy
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import single_task
from matplotlib import figure

from zofo_jax import report
from zofo_jax.builders import budget
from zofo_jax.commands import sweep
from zofo_jax.config import defaults
from zofo_jax.tasks import get

ROOT = pathlib.Path(__file__).parents[1]
FIELDS: dict[str, tuple[str, tuple[Any, ...]]] = {
  "lambda": ("penalty", (1.0, 10.0, 100.0)),
  "lambda over time": ("penalty_schedule", ("constant", "linear")),
  "T": ("lower.num_steps", (1, 5, 10, 20)),
  "directions": ("zo.num_directions", (1, 2, 4)),
  "eps": ("zo.eps", (1e-4, 1e-3, 1e-2)),
  "sides": ("zo.estimator", ("central", "forward", "exact")),
  "kind": (
    "zo.direction",
    ("rademacher", "gaussian", "low_rank", "per_example", "sparse"),
  ),
  "update": ("zo.optimizer", ("sgd", "momentum", "adam")),
  "weights": ("zo.select", ("", "attention", "mlp")),
  "rate": ("zo.learning_rate", (0.0, 1e-6, 1e-5, 1e-4)),
  "template": ("data.template", (0, 1)),
}


def changes(choice: dict[str, Any], field: str, value: Any) -> dict[str, Any]:
  """Returns the changed fields of a cell with the work of the table's runs.

  Args:
    choice: arguments of configs/compare.py.
    field: the field to change.
    value: its new value; the config's default value changes nothing, so that
      all fields share this cell.
  """
  compare = runpy.run_path(str(ROOT / "configs/compare.py"))
  text = ",".join(f"{k}={v}" for k, v in choice.items())
  config = compare["get_config"](text)
  if defaults.flat(config)[field] == value:
    return {}
  rows = budget.make_budget(config).passes().forward_equivalents
  total = rows * config.train.num_steps
  with config.unlocked():
    config.update_from_flattened_dict({field: value})
  per_step = budget.make_budget(config).passes().forward_equivalents
  steps = max(1, total // per_step)
  every = max(1, round(steps / 4))
  return {
    **{field: value, "train.num_steps": steps},
    "train.eval_every_steps": every,
  }


def scores(
  results: Sequence[dict[str, Any]], name: str
) -> dict[Any, dict[str, list[float]]]:
  """Returns a choice's values -> {"s, kept": test scores, "p": test scores}.

  Empty if there is only one value.
  """
  by_value: dict[Any, dict[str, list[float]]] = {}
  for value in FIELDS[name][1]:
    rows = [r for r in results if (r["ablation"], r["value"]) == (name, value)]
    if rows:
      by_value[value] = {
        label: [r[f"test_{get(r['task']).metric}{ending}"] for r in rows]
        for label, ending in (("s, kept", ""), ("p", "_p"))
      }
  return by_value if len(by_value) > 1 else {}


def table(results: Sequence[dict[str, Any]]) -> str:
  """Returns mean test scores and their ranges over seeds as Markdown."""
  lines = ["| choice | value | s, kept | p | seeds |", "|" + " --- |" * 5]
  for name in FIELDS:
    for value, by_adapter in scores(results, name).items():
      texts = [
        f"{statistics.fmean(x):.3f}"
        + (f" ({min(x):.3f} to {max(x):.3f})" if len(x) > 1 else "")
        for x in by_adapter.values()
      ]
      cells = [name, value, *texts, len(by_adapter["p"])]
      lines.append(f"| {' | '.join(map(str, cells))} |")
  return "\n".join(lines) + "\n"


def draw(results: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
  """Plots test scores over each choice, mean and range over seeds.

  Solid for the adapter that is kept, dashed for p.
  """
  of_names = {
    name: by_value for name in FIELDS if (by_value := scores(results, name))
  }
  columns = min(5, len(of_names))
  rows = -(-len(of_names) // columns)
  fig = figure.Figure(figsize=(3 * columns, 3 * rows), layout="constrained")
  panels = fig.subplots(rows, columns, squeeze=False, sharey=True).ravel()
  for axes in panels[len(of_names) :]:
    axes.set_axis_off()
  for axes, (name, by_value) in zip(panels, of_names.items(), strict=False):
    ticks = list(map(str, by_value))
    for label, look in (("s, kept", "o-"), ("p", "o--")):
      samples = [by_adapter[label] for by_adapter in by_value.values()]
      means = [statistics.fmean(x) for x in samples]
      ranges = [
        [m - min(x) for m, x in zip(means, samples, strict=True)],
        [max(x) - m for m, x in zip(means, samples, strict=True)],
      ]
      axes.errorbar(ticks, means, ranges, fmt=look, capsize=3, label=label)
    axes.set_title(name)
    axes.tick_params(axis="x", rotation=45)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
  panels[0].set_ylabel("test score")
  panels[0].legend(frameon=False)
  fig.savefig(path, dpi=120)


def make_cells(
  given: argparse.Namespace, names: Iterable[str], seeds: Iterable[int]
) -> dict[tuple[str, Any, int], sweep.SweepRun]:
  """Returns (choice, value, seed) -> cell; some choices share a cell."""
  cells = {}
  for name, seed in itertools.product(names, seeds):
    field, values = FIELDS[name]
    for value in values:
      choice = {"size": given.size, "task": given.task, "method": "bilevel"}
      choice |= {"adapter": given.adapter, "seed": seed}
      cells[name, value, seed] = single_task.make_cell(
        given.out, given.data, choice, changes(choice, field, value)
      )
  return cells


def main() -> None:
  """Runs missing cells and writes the results."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  single_task.add_common(parser, ROOT / "runs/ablations")
  default = ROOT / "experiments/results"
  parser.add_argument("--results", type=pathlib.Path, default=default)
  parser.add_argument("--task", default="sst2")
  parser.add_argument("--only", default=",".join(FIELDS))
  given = parser.parse_args()
  path = given.results / "ablations.jsonl"
  results = single_task.read(path)
  cells = make_cells(given, given.only.split(","), given.seeds)
  missing = {
    c.folder: c for c in cells.values() if c.folder.name not in results
  }
  single_task.run(list(missing.values()), given)
  for folder in missing:
    if (folder / "summary.json").exists():
      results[folder.name] = single_task.result(folder)
  report.write_lines(path, [results[name] for name in sorted(results)])
  seeds = sorted({int(line["seed"]) for line in results.values()})
  rows = [
    {**results[cell.folder.name], "ablation": name, "value": value}
    for (name, value, _), cell in make_cells(given, FIELDS, seeds).items()
    if cell.folder.name in results
  ]
  if rows:
    draw(rows, given.results / "ablations.png")
    (given.results / "ablations.md").write_text(table(rows))


if __name__ == "__main__":
  main()
