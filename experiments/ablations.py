"""One choice of Bilevel-ZOFO changed at a time, on one task.

  python experiments/ablations.py --data DIR [--task sst2] [--only lambda,T]

Each cell is a run of configs/compare.py with one field changed, for as many
forward-equivalents as the table's; cells that have ended, or are in --results,
are left alone. Writes `ablations.jsonl`, `ablations.md` and `ablations.png` of
all that is known to --results.
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
  """Returns the fields of a cell that costs what the table's runs cost.

  Args:
    choice: of configs/compare.py.
    field: that is changed.
    value: to this; a cell whose value is the config's own changes nothing, and
      is the same for every field.
  """
  compare = runpy.run_path(str(ROOT / "configs/compare.py"))
  text = ",".join(f"{k}={v}" for k, v in choice.items())
  config = compare["get_config"](text)
  if defaults.flat(config)[field] == value:
    return {}
  rows = budget.passes(config, config.method).forward_equivalents
  whole = rows * config.train.num_steps
  with config.unlocked():
    config.update_from_flattened_dict({field: value})
  each = budget.passes(config, config.method).forward_equivalents
  steps = max(1, whole // each)
  every = max(1, round(steps / 4))
  return {
    **{field: value, "train.num_steps": steps},
    "train.eval_every_steps": every,
  }


def scores(
  results: Sequence[dict[str, Any]], name: str
) -> dict[Any, dict[str, list[float]]]:
  """Returns a choice's values -> {"s, kept": test scores, "p": test scores}.

  Nothing where there is but one value.
  """
  found: dict[Any, dict[str, list[float]]] = {}
  for value in FIELDS[name][1]:
    rows = [r for r in results if (r["ablation"], r["value"]) == (name, value)]
    if rows:
      found[value] = {
        label: [r[f"test_{get(r['task']).metric}{ending}"] for r in rows]
        for label, ending in (("s, kept", ""), ("p", "_p"))
      }
  return found if len(found) > 1 else {}


def table(results: Sequence[dict[str, Any]]) -> str:
  """Returns mean test scores and their ranges over seeds as Markdown."""
  lines = ["| choice | value | s, kept | p | seeds |", "|" + " --- |" * 5]
  for name in FIELDS:
    for value, found in scores(results, name).items():
      shown = [
        f"{statistics.fmean(x):.3f}"
        + (f" ({min(x):.3f} to {max(x):.3f})" if len(x) > 1 else "")
        for x in found.values()
      ]
      cells = [name, value, *shown, len(found["p"])]
      lines.append(f"| {' | '.join(map(str, cells))} |")
  return "\n".join(lines) + "\n"


def draw(results: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
  """Draws test scores over each choice, mean and range over seeds.

  Of the adapter that is kept, and of p, dashed.
  """
  of_names = {
    name: found for name in FIELDS if (found := scores(results, name))
  }
  columns = min(5, len(of_names))
  rows = -(-len(of_names) // columns)
  fig = figure.Figure(figsize=(3 * columns, 3 * rows), layout="constrained")
  panels = fig.subplots(rows, columns, squeeze=False, sharey=True).ravel()
  for axes in panels[len(of_names) :]:
    axes.set_axis_off()
  for axes, (name, found) in zip(panels, of_names.items(), strict=False):
    ticks = list(map(str, found))
    for label, look in (("s, kept", "o-"), ("p", "o--")):
      each = [values[label] for values in found.values()]
      means = [statistics.fmean(x) for x in each]
      ranges = [
        [m - min(x) for m, x in zip(means, each, strict=True)],
        [max(x) - m for m, x in zip(means, each, strict=True)],
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
  """Returns (choice, value, seed) -> its cell; some choices share one."""
  found = {}
  for name, seed in itertools.product(names, seeds):
    field, values = FIELDS[name]
    for value in values:
      choice = {"size": given.size, "task": given.task, "method": "bilevel"}
      choice |= {"adapter": given.adapter, "seed": seed}
      found[name, value, seed] = single_task.make_cell(
        given.out, given.data, choice, changes(choice, field, value)
      )
  return found


def main() -> None:
  """Runs what is missing, and writes the results."""
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
  known = single_task.read(path)
  asked = make_cells(given, given.only.split(","), given.seeds)
  left = {c.folder: c for c in asked.values() if c.folder.name not in known}
  single_task.run(list(left.values()), given)
  for folder in left:
    if (folder / "summary.json").exists():
      known[folder.name] = single_task.result(folder)
  report.write_lines(path, [known[name] for name in sorted(known)])
  seeds = sorted({int(line["seed"]) for line in known.values()})
  found = [
    {**known[cell.folder.name], "ablation": name, "value": value}
    for (name, value, _), cell in make_cells(given, FIELDS, seeds).items()
    if cell.folder.name in known
  ]
  if found:
    draw(found, given.results / "ablations.png")
    (given.results / "ablations.md").write_text(table(found))


if __name__ == "__main__":
  main()
