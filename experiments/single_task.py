"""Tasks x methods x seeds, each cell a run of configs/compare.py.

  python experiments/single_task.py --data DIR [--jobs 2] [--out runs/compare]
  python experiments/single_task.py --data DIR --search
  python experiments/single_task.py --data DIR --print

Finished cells are skipped, unfinished ones resumed. Every cell has `--threads`
threads, so that its numbers and its seconds do not depend on the number of
concurrent runs. Results in --out are merged into --results, one JSON line per
cell; cells that --results has are skipped as well. --print prints the commands
of all others, and runs none.
"""

import argparse
import itertools
import json
import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from bench import timing

from zofo_jax import report, tasks
from zofo_jax.commands import sweep

ROOT = pathlib.Path(__file__).parents[1]
TASKS = ("sst2", "copa", "wic", "trec", "cb", "rte")
TASKS += ("subj", "emotion", "ag_news")
METHODS = ("peft", "bilevel", "mezo")
IN_CONTEXT = "icl"  # a mode of the command line, and no method of training
SEEDS = (0, 1, 2)


def _both(rate: float) -> dict[str, float]:
  """Returns s's and p's rate."""
  return {"lower.learning_rate": rate, "upper.learning_rate": rate}


def _guided(passes: int) -> list[dict[str, float]]:
  """Returns trials of steps of theta along s; `passes`: besides s's."""
  trials = []
  for rate, inner in (
    *((2e-3, 10), (4e-3, 10), (8e-3, 10), (4e-3, 5), (4e-3, 20)),
    *((2e-3, 5), (8e-3, 5), (2e-3, 20), (8e-3, 20)),
  ):
    steps = 960 // (8 * inner + passes)
    trials.append(
      _both(rate)
      | {"lower.num_steps": inner, "train.num_steps": steps}
      | {"train.eval_every_steps": -(-steps // 2)}
    )
  return trials


# Trials of the search. The first five of each method are of a batch of 8 rows,
# T = 1 and p kept; the others have s kept, small batches, or both.
_FIRST = (1e-3, 2e-3, 4e-3, 8e-3, 16e-3)
_ZEROTH = (3e-6, 1e-5, 3e-5, 1e-4, 3e-4)
SEARCH: dict[str, list[dict[str, float]]] = {
  "peft": [
    *({"lower.learning_rate": rate} for rate in _FIRST),
    *(
      {"lower.learning_rate": rate, "lower.batch_size": 4}
      | {"train.num_steps": 120, "train.eval_every_steps": 60}
      for rate in (2e-3, 4e-3, 1e-3)
    ),
    {"lower.learning_rate": 4e-3, "lower.batch_size": 16}
    | {"train.num_steps": 30, "train.eval_every_steps": 15},
  ],
  "bilevel": [
    _both(first) | {"zo.learning_rate": zeroth}
    for first, zeroth in (
      *((2e-3, 1e-6), (4e-3, 1e-6)),
      *((2e-3, 1e-5), (2e-3, 3e-5), (2e-3, 1e-4)),
    )
  ]
  + [
    _both(rate)
    | {"keep": "s", "lower.batch_size": 4, "lower.num_steps": inner}
    | {"train.num_steps": steps, "train.eval_every_steps": -(-steps // 2)}
    | {"zo.learning_rate": zeroth}
    for rate, inner, steps, zeroth in (
      *((2e-3, 10, 8, 1e-6), (4e-3, 10, 8, 1e-6)),
      *((2e-3, 19, 5, 1e-6), (4e-3, 19, 5, 1e-6)),
    )
  ],
  "mezo": [
    *({"zo.learning_rate": rate} for rate in _ZEROTH),
    *(
      {"zo.learning_rate": rate, "upper.batch_size": 8}
      | {"train.num_steps": 60, "train.eval_every_steps": 30}
      for rate in (3e-5, 1e-5)
    ),
    {"zo.learning_rate": 3e-5, "zo.eps": 1e-2},
    {"zo.learning_rate": 1e-4, "zo.num_directions": 4, "upper.batch_size": 8}
    | {"train.num_steps": 15, "train.eval_every_steps": 8},
  ],
  "bilevel_guided": _guided(40),
  "bilevel_all": _guided(16),
  # Of steps of one length, whose rate should need no search.
  "mezo_scaled": [{"zo.learning_rate": rate} for rate in (3e-4, 1e-3, 3e-3)],
}
# Where runs are ten times as long.
LONG_SEARCH: dict[str, list[dict[str, float]]] = {
  "peft": [{"lower.learning_rate": rate} for rate in (1e-3, 2e-3, 4e-3)],
  "bilevel": [
    _both(first) | {"zo.learning_rate": zeroth}
    for first, zeroth in ((1e-3, 1e-6), (2e-3, 1e-6), (2e-3, 1e-5))
  ],
  "mezo": [{"zo.learning_rate": rate} for rate in (3e-6, 1e-5, 3e-5)],
  "bilevel_all": [_both(rate) for rate in (1e-3, 2e-3, 4e-3)],
}
SEARCH_SEED = 100
CURVE = ("step", "seconds", "forward_equivalents", "flops")


def make_cell(
  out: pathlib.Path,
  data: str,
  choice: dict[str, Any],
  fields: dict[str, Any] | None = None,
) -> sweep.SweepRun:
  """Returns a run of configs/compare.py.

  Args:
    out: folder of all runs.
    data: folder of rows.
    choice: what follows the colon in --config.
    fields: of the config, changed.
  """
  fields = fields or {}
  text = ",".join(f"{name}={value}" for name, value in choice.items())
  more = [f"{k.split('.')[-1]}={v}" for k, v in fields.items()]
  folder = out / ",".join([text, *dict.fromkeys(more)])
  mode, summary = [], "summary.json"
  if choice["method"] == IN_CONTEXT:
    mode, summary = [IN_CONTEXT], f"{IN_CONTEXT}.json"
    text = text.replace(f"method={IN_CONTEXT}", "method=peft")  # of no effect
  command = [
    *(sys.executable, "-m", "zofo_jax.main", *mode),
    *(f"--config={ROOT / 'configs/compare.py'}:{text}", f"--workdir={folder}"),
    f"--config.data.dir={data}",
    *(f"--config.{name}={value}" for name, value in fields.items()),
  ]
  return sweep.SweepRun(folder, choice | fields, command, summary)


def of_table(given: argparse.Namespace) -> Iterator[sweep.SweepRun]:
  """Yields the cells of the table, all tasks of one seed after the other."""
  for seed in given.seeds:
    for task in given.tasks:
      for method in given.methods:
        choice = {"size": given.size, "task": task, "method": method}
        choice |= {"adapter": given.adapter, "seed": seed}
        choice |= {"template": given.template}
        if given.shots:
          choice |= {"shots": given.shots}
        yield make_cell(given.out, given.data, choice)


def of_search(given: argparse.Namespace) -> Iterator[sweep.SweepRun]:
  """Yields the trials of the search for learning rates."""
  short = given.size == "smollm2-135m"
  for task in given.tasks:
    for method in given.methods:
      trials = (SEARCH if short else LONG_SEARCH)[method]
      for number, fields in enumerate(trials):
        if given.trials and number not in given.trials:
          continue
        choice = {"size": given.size, "task": task, "method": method}
        choice |= {"adapter": given.adapter, "seed": SEARCH_SEED}
        # Later ones are chosen by more rows, and tested on hardly any.
        if number >= 5 or "lower.num_steps" in fields:
          fields = fields | {"data.num_selection": 128, "data.num_test": 16}
        yield make_cell(given.out, given.data, choice, fields)


def read(path: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Returns the results in a file, if it exists, by cell."""
  lines = report.read_jsonl(path) if path.exists() else []
  return {line["cell"]: line for line in lines}


def result(folder: pathlib.Path) -> dict[str, Any]:
  """Returns a finished cell's choice, numbers and curve."""
  choice = dict(part.split("=", 1) for part in folder.name.split(","))
  by = json.loads((folder / "machine.json").read_text())
  if choice["method"] == IN_CONTEXT:
    scores = json.loads((folder / f"{IN_CONTEXT}.json").read_text())
    model = pathlib.Path(scores.pop("model")).name
    metric = tasks.get(choice["task"]).metric
    scores = {
      f"test_{k}" if k.startswith(metric) else k: v for k, v in scores.items()
    }
    return {"cell": folder.name, **scores, **choice, "model": model, **by}
  rows = report.read_jsonl(folder / "metrics.jsonl")
  latest: dict[str, Any] = {}
  curve = []
  for row in rows:
    latest |= {name: row[name] for name in CURVE if name in row}
    scores = [k for k in row if k.startswith("selection_")]
    if scores:
      curve.append({**latest, **{name: row[name] for name in scores}})
  summary = json.loads((folder / "summary.json").read_text())
  if summary.get("device", "cpu") != "cpu":
    by |= {"processor": summary["device"]}
  return {
    "cell": folder.name,
    **summary,
    **choice,
    "model": pathlib.Path(summary["model"]).name,
    "curve": curve,
    "losses": _losses(rows),
    **by,
  }


def _losses(rows: list[dict[str, Any]]) -> list[float]:
  return [round(r["upper_loss"], 4) for r in rows if "upper_loss" in r]


def machine() -> dict[str, Any]:
  """Returns the commit and the processor that cells run on."""
  git = subprocess.run(
    ["git", "rev-parse", "--short", "HEAD"],
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=False,
  )
  named = timing.machine()
  return {
    "commit": git.stdout.strip(),
    **{name: named[name] for name in ("processor", "cores")},
  }


def add_common(
  parser: argparse.ArgumentParser, out: pathlib.Path | None
) -> None:
  """Adds the flags that every comparison has."""
  parser.add_argument("--data", required=True, help="folder of rows")
  parser.add_argument("--out", type=pathlib.Path, default=out)
  parser.add_argument("--size", default="smollm2-135m")
  parser.add_argument("--adapter", default="lora")
  parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
  parser.add_argument("--jobs", type=int, default=1)
  parser.add_argument("--threads", type=int, default=1)


def run(
  cells: list[sweep.SweepRun], given: argparse.Namespace
) -> list[dict[str, Any]]:
  """Runs unfinished cells; returns a row for each cell."""
  os.environ["NPROC"] = str(given.threads)  # of XLA's pools
  os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(given.out / "cache"))
  for cell in cells:
    cell.folder.mkdir(parents=True, exist_ok=True)
    if not (cell.folder / "machine.json").exists():
      report.write_json(cell.folder / "machine.json", machine())
  return sweep.run(cells, given.jobs)


def main() -> None:
  """Runs missing cells and writes the results."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  add_common(parser, None)
  parser.add_argument("--results", type=pathlib.Path)
  parser.add_argument("--search", action="store_true")
  parser.add_argument("--trials", nargs="+", type=int, help="of the search")
  parser.add_argument("--template", type=int, default=0)
  parser.add_argument("--shots", type=int, help="rows of a label, each level")
  parser.add_argument("--tasks", nargs="+", default=TASKS)
  parser.add_argument("--methods", nargs="+", default=METHODS)
  parser.add_argument("--print", action="store_true", help="run nothing")
  given = parser.parse_args()
  name = "search" if given.search else "single_task"
  given.out = given.out or ROOT / "runs" / name
  results = given.results or ROOT / "experiments/results" / f"{name}.jsonl"
  finished = read(results)
  cells = list((of_search if given.search else of_table)(given))
  missing = [c for c in cells if c.folder.name not in finished]
  if given.print:
    for cell in missing:
      print(shlex.join(["python", *cell.command[1:]]))
    return
  rows = [finished[c.folder.name] for c in cells if c.folder.name in finished]
  rows = [*rows, *run(missing, given)]
  ends = (given.out.glob(f"*/{name}.json") for name in ("summary", IN_CONTEXT))
  for path in itertools.chain(*ends):
    finished[path.parent.name] = result(path.parent)
  report.write_lines(results, [finished[name] for name in sorted(finished)])
  columns = ("task", "method", "seed", "selection_accuracy", "test_accuracy")
  columns += ("train_seconds", "failed", "zo.learning_rate")
  columns += ("lower.learning_rate",)
  report.results_table(
    [{k: row[k] for k in columns if k in row} for row in rows],
    title=f"{len(finished)} cells in {results}",
  )


if __name__ == "__main__":
  main()
