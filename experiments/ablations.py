"""One choice of Bilevel-ZOFO changed at a time, on one task.

  python experiments/ablations.py --data DIR [--task sst2] [--only lambda,T]

Each cell is a run of configs/compare.py with one field changed, for as many
forward-equivalents as the table's; cells that have ended, or are in --results,
are left alone. Writes `ablations.jsonl`, and `ablations.png` of what --only
names, to --results.
"""

import argparse
import pathlib
import runpy
import statistics
from typing import Any

import single_task
from matplotlib import figure

from zofo_jax import budget, report, sweep
from zofo_jax import config as config_lib
from zofo_jax.tasks import get

ROOT = pathlib.Path(__file__).parents[1]
FIELDS: dict[str, tuple[str, tuple[Any, ...]]] = {
  "lambda": ("penalty", (1.0, 10.0, 100.0)),
  "T": ("lower.num_steps", (1, 5, 10, 20)),
  "directions": ("zo.num_directions", (1, 2, 4)),
  "eps": ("zo.eps", (1e-4, 1e-3, 1e-2)),
  "sides": ("zo.estimator", ("central", "forward", "exact")),
  "kind": (
    "zo.direction",
    ("rademacher", "gaussian", "low_rank", "per_example", "sparse"),
  ),
  "update": ("zo.optimizer", ("sgd", "momentum", "adam")),
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
  if config_lib.flat(config)[field] == value:
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


def draw(results: list[dict[str, Any]], path: pathlib.Path) -> None:
  """Draws test scores over each choice, mean and range over seeds.

  Of the adapter that is kept, and of p, dashed.
  """
  names = list(dict.fromkeys(r["ablation"] for r in results))
  fig = figure.Figure(figsize=(3 * len(names), 3), layout="constrained")
  panels = fig.subplots(1, len(names), squeeze=False, sharey=True)[0]
  for axes, name in zip(panels, names, strict=True):
    rows = [r for r in results if r["ablation"] == name]
    values = [v for v in FIELDS[name][1] if any(r["value"] == v for r in rows)]
    for ending, look in (("", "o-"), ("_p", "o--")):
      scores = [
        [
          r[f"test_{get(r['task']).metric}{ending}"]
          for r in rows
          if r["value"] == value
        ]
        for value in values
      ]
      means = [statistics.fmean(each) for each in scores]
      ranges = [
        [m - min(s) for m, s in zip(means, scores, strict=True)],
        [max(s) - m for m, s in zip(means, scores, strict=True)],
      ]
      label = "p" if ending else "s, kept"
      ticks = list(map(str, values))
      axes.errorbar(ticks, means, ranges, fmt=look, capsize=3, label=label)
    axes.set_title(name)
    axes.tick_params(axis="x", rotation=45)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
  panels[0].set_ylabel("test score")
  panels[0].legend(frameon=False)
  fig.savefig(path, dpi=120)


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
  cells: dict[tuple[str, Any, int], sweep.Cell] = {}
  for name in given.only.split(","):
    field, values = FIELDS[name]
    for seed in given.seeds:
      for value in values:
        choice = {"size": given.size, "task": given.task, "method": "bilevel"}
        choice |= {"adapter": given.adapter, "seed": seed}
        cells[name, value, seed] = single_task.make_cell(
          given.out, given.data, choice, changes(choice, field, value)
        )
  path = given.results / "ablations.jsonl"
  known = single_task.read(path)
  single_task.run(
    list(
      {
        c.folder: c for c in cells.values() if c.folder.name not in known
      }.values()
    ),
    given,
  )
  for cell in cells.values():
    if (cell.folder / "summary.json").exists():
      known[cell.folder.name] = single_task.result(cell.folder)
  report.write_lines(path, [known[name] for name in sorted(known)])
  found = [
    {**known[cell.folder.name], "ablation": name, "value": value}
    for (name, value, _), cell in cells.items()
    if cell.folder.name in known
  ]
  if found:
    draw(found, given.results / "ablations.png")


if __name__ == "__main__":
  main()
