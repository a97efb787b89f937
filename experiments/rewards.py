"""What a score does in the place of the loss, on SmolLM2-135M.

  python experiments/rewards.py --data DIR [--tasks words squad financial]

Runs configs/reward.py: `words` by the reward alone; `squad`, whose θ follows
the token F1 of answers, and `financial`, whose θ follows the macro F1, each
against the same adapters with the loss or nothing in that place, of as many
forward-equivalents. DIR holds the folders squad/ and financial_phrasebank/.
SQuAD's contexts are cut to the sentence with the answer, so that a run takes
minutes on one core. --results has a line for each run. Runs that it has are
skipped; --print prints the tables of those it has.
"""

import argparse
import collections
import json
import pathlib
import re
import statistics
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import single_task

from zofo_jax import report
from zofo_jax.commands import sweep

ROOT = pathlib.Path(__file__).parents[1]
# Seeds and what stands in the place of the loss.
RUNS = {
  "words": ((0,), ("reward",)),
  "squad": ((0, 1, 2), ("reward", "none")),
  "financial": ((0, 1, 2), ("macro_f1", "loss")),
}
METRICS = {"words": "reward", "squad": "token_f1", "financial": "macro_f1"}


def write_sentences(source: pathlib.Path, folder: pathlib.Path) -> None:
  """Writes SQuAD's rows, of each context only the sentence with the answer."""
  folder.mkdir(parents=True, exist_ok=True)
  for path in source.glob("*.jsonl"):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
      start = row["answers"]["answer_start"][0]
      ends = [m.end() for m in re.finditer(r"[.!?]\s+", row["context"])]
      first = max((end for end in ends if end <= start), default=0)
      last = min((end for end in ends if end > start), default=None)
      row["context"] = row["context"][first:last].strip()
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / path.name).write_text("".join(lines))


def make_cells(given: argparse.Namespace) -> Iterator[sweep.SweepRun]:
  """Yields the runs, all objectives of one seed after the other."""
  folders = {
    "squad": given.out / "squad_sentences",
    "financial": given.data / "financial_phrasebank",
  }
  if "squad" in given.tasks:
    write_sentences(given.data / "squad", folders["squad"])
  for task in given.tasks:
    seeds, objectives = RUNS[task]
    for seed in seeds:
      for outer in objectives:
        choice = {"task": task, "outer": outer, "seed": seed}
        text = ",".join(f"{name}={value}" for name, value in choice.items())
        folder = given.out / text
        command = [sys.executable, "-m", "zofo_jax.main", f"--workdir={folder}"]
        command += [f"--config={ROOT / 'configs/reward.py'}:{text}"]
        if task in folders:
          command += [f"--config.data.dir={folders[task]}"]
        yield sweep.SweepRun(folder, choice, command)


def result(folder: pathlib.Path) -> dict[str, Any]:
  """Returns a finished run's choice, scores, and rewards by step."""
  choice = dict(part.split("=", 1) for part in folder.name.split(","))
  rows = report.read_jsonl(folder / "metrics.jsonl")
  summary = json.loads((folder / "summary.json").read_text())
  summary["model"] = pathlib.Path(summary["model"]).name
  rewards = [round(row["reward"], 4) for row in rows if "reward" in row]
  path = folder / "samples.jsonl"
  samples = report.read_jsonl(path)[-2:] if path.exists() else []
  for sample in samples:  # a file's name and row, without its folder
    sample["where"] = sample["where"].rpartition("/")[2]
  return {
    "cell": folder.name,
    **summary,
    **choice,
    "rewards": rewards,
    "samples": samples,
    **json.loads((folder / "machine.json").read_text()),
  }


def table(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
  """Returns a row for each task and objective: means over seeds."""
  grouped = collections.defaultdict(list)
  for line in lines:
    grouped[line["task"], line["outer"]].append(line)
  return [
    {
      "task": task,
      "outer objective": outer,
      "score": METRICS[task],
      "before": _mean(runs, f"zero_shot_{METRICS[task]}"),
      "after": _mean(runs, f"test_{METRICS[task]}"),
      "of each seed": [round(r[f"test_{METRICS[task]}"], 3) for r in runs],
      "passes": _mean(runs, "forward_equivalents"),
      "seconds": _mean(runs, "train_seconds"),
    }
    for (task, outer), runs in sorted(grouped.items())
  ]


def _mean(runs: list[dict[str, Any]], name: str) -> float:
  return round(statistics.mean(run[name] for run in runs), 3)


def main() -> None:
  """Runs missing cells and writes the results."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--data", required=True, type=pathlib.Path)
  parser.add_argument("--out", type=pathlib.Path, default=ROOT / "runs/rewards")
  parser.add_argument("--tasks", nargs="+", choices=RUNS, default=[*RUNS])
  parser.add_argument("--outer", nargs="+", help="of RUNS")
  parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
  parser.add_argument("--jobs", type=int, default=1)
  parser.add_argument("--threads", type=int, default=1)
  parser.add_argument(
    "--results",
    type=pathlib.Path,
    default=ROOT / "experiments/results/rewards.jsonl",
  )
  parser.add_argument("--print", action="store_true", help="run nothing")
  given = parser.parse_args()
  finished = single_task.read(given.results)
  if not given.print:
    cells = [
      cell
      for cell in make_cells(given)
      if cell.folder.name not in finished
      and cell.fields["seed"] in given.seeds
      and (not given.outer or cell.fields["outer"] in given.outer)
    ]
    single_task.run(cells, given)
    for cell in cells:
      if (cell.folder / cell.summary).exists():
        finished[cell.folder.name] = result(cell.folder)
    report.write_lines(given.results, finished.values())
  report.results_table(table(finished.values()), title=str(given.results))


if __name__ == "__main__":
  main()
