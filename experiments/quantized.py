"""Accuracy of quantized weights against float32, zero-shot and with LoRA.

  python experiments/quantized.py --data DIR [--tasks cr sst2] [--print]

Every way of storing weights answers the same rows: without training, and with
an adapter trained by configs/compare.py (`method=peft`) on the same rows in the
same order. --results has a line for each cell, with what was right of each
row. Cells that it has are skipped; --print prints the table of those it has.
"""

import argparse
import collections
import json
import pathlib
import random
import subprocess
import sys
from typing import Any

import numpy as np
import single_task

from zofo_jax import report, tasks
from zofo_jax.commands import sweep

ROOT = pathlib.Path(__file__).parents[1]
ZERO_SHOT = "zero-shot"
TRAINED = "LoRA"
# Where the model without training is above chance, and where rows are short.
TASKS = {
  ZERO_SHOT: ("cr", "ag_news", "tweet_eval_emotion"),
  TRAINED: ("mpqa", "trec", "cr"),
}
KINDS = ("", "int8", "int4", "nf4")
# Of the runs with LoRA, which take minutes on one core: the longest training
# rows in tokens, and more.
LENGTHS = {"mpqa": 16, "trec": 16}
SHORT = {
  "train.num_steps": 60,
  "train.eval_every_steps": 60,
  "lower.batch_size": 4,
  "data.num_selection": 8,
  "data.num_test": 8,
}


def write_rows(
  data: pathlib.Path, folder: pathlib.Path, num_rows: int
) -> pathlib.Path:
  """Writes a folder of rows to learn from and rows to answer.

  Args:
    data: folder of a task's files.
    folder: to write.
    num_rows: to answer, drawn from `test.jsonl`, or `validation.jsonl` if there
      is none.

  Returns:
    The file of the rows to answer.
  """
  path = folder / "validation.jsonl"
  if not path.exists():
    folder.mkdir(parents=True)
    (folder / "train.jsonl").symlink_to((data / "train.jsonl").resolve())
    source = data / "test.jsonl"
    if not source.exists():
      source = data / "validation.jsonl"
    lines = source.read_text().splitlines(keepends=True)
    path.write_text("".join(random.Random(0).sample(lines, num_rows)))
  return path


def zero_shot(folder: pathlib.Path) -> list[bool]:
  """Returns what `zofo icl` had right, in the order of the file."""
  records = report.read_jsonl(folder / "icl.jsonl")
  line = lambda record: int(record["where"].rpartition(" ")[2])
  return [
    record["prediction"] in record["right"]
    for record in sorted(records, key=line)
  ]


def trained(folder: pathlib.Path, path: pathlib.Path, task: str) -> list[bool]:
  """Answers the rows with a run, and returns what was right."""
  answers = folder / "answers.jsonl"
  if not answers.exists():
    command = [sys.executable, "-m", "zofo_jax.main", "predict"]
    command += [f"--workdir={folder}", f"--input={path}"]
    subprocess.run(command, check=True)
  column = str(tasks.get(task).label)
  return [
    int(np.argmax(answer["scores"])) == answer[column]
    for answer in report.read_jsonl(answers)
  ]


def make_cell(
  given: argparse.Namespace,
  data: pathlib.Path,
  task: str,
  kind: str,
  seed: int | None,
) -> sweep.SweepRun:
  """Returns a run: with LoRA, or zero-shot if there is no seed."""
  choice = {"size": "smollm2-135m", "task": task, "seed": seed or 0}
  fields: dict[str, Any] = {"model.quantize": kind}
  if seed is None:
    choice["method"] = single_task.IN_CONTEXT
    fields |= {"icl.num_shots": 0, "data.num_test": given.rows}
  else:
    choice["method"] = "peft"
    fields |= SHORT | {"lower.learning_rate": given.rate}
    fields["data.max_length"] = LENGTHS.get(task, 24)
  return single_task.make_cell(given.out, str(data), choice, fields)


def table(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Returns a row for each task, with or without training, and kind.

  The interval is of the mean difference over the rows: 95 %, by their standard
  error, the mean over seeds counting as one.
  """
  cells: dict[Any, dict[int, np.ndarray]] = collections.defaultdict(dict)
  for line in lines:
    right = np.array([c == "1" for c in line["right"]], float)
    mode = line["mode"], line["rate"]
    cells[line["task"], mode, line["kind"]][line["seed"]] = right
  rows = []
  for (task, mode, kind), seeds in sorted(cells.items(), key=_place):
    plain = cells.get((task, mode, ""), seeds)
    common = sorted(seeds.keys() & plain.keys())
    apart = np.stack([seeds[seed] - plain[seed] for seed in common])
    mean = apart.mean(axis=0)
    error = 1.96 * mean.std(ddof=1) / len(mean) ** 0.5
    rows.append(
      {
        "task": task,
        "": mode[0],
        "rate": mode[1] or "",
        "weights": kind or "float32",
        "accuracy": f"{np.mean([*seeds.values()]):.3f}",
        "minus float32": f"{mean.mean():+.4f} ± {error:.4f}" if kind else "",
        "each seed": " ".join(f"{x:+.3f}" for x in apart.mean(axis=1))
        if kind and len(common) > 1
        else "",
        "rows": len(mean),
      }
    )
  return rows


def _place(item: tuple[tuple[str, Any, str], Any]) -> tuple[Any, ...]:
  (task, (mode, rate), kind), _ = item
  return mode == TRAINED, task, rate, KINDS.index(kind)


def main() -> None:
  """Runs missing cells, writes their lines and prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  single_task.add_common(parser, ROOT / "runs/quantized")
  parser.add_argument(
    "--results",
    type=pathlib.Path,
    default=ROOT / "experiments/results/quantized.jsonl",
  )
  parser.add_argument("--tasks", nargs="+", help="all by default")
  parser.add_argument("--kinds", nargs="+", default=KINDS)
  parser.add_argument("--modes", nargs="+", default=TASKS)
  parser.add_argument("--rows", type=int, default=500)
  parser.add_argument("--rate", type=float, default=1e-3, help="of LoRA")
  parser.add_argument("--print", action="store_true", help="run nothing")
  given = parser.parse_args()
  lines = report.read_jsonl(given.results) if given.results.exists() else []
  wanted = [
    (mode, task, kind, seed)
    for mode in given.modes
    for task in given.tasks or TASKS[mode]
    for kind in given.kinds
    for seed in ((None,) if mode == ZERO_SHOT else given.seeds)
  ]
  for mode, task, kind, seed in () if given.print else wanted:
    cell_name = {"task": task, "mode": mode, "kind": kind, "seed": seed or 0}
    cell_name["rate"] = 0.0 if seed is None else given.rate
    if any(cell_name.items() <= line.items() for line in lines):
      continue
    rows = given.out / f"rows-{given.rows}" / task
    path = write_rows(pathlib.Path(given.data) / task, rows, given.rows)
    cell = make_cell(given, rows, task, kind, seed)
    [outcome] = single_task.run([cell], given)
    if "failed" in outcome:
      sys.exit(f"{cell.folder}: {outcome['failed']}")
    right = (
      zero_shot(cell.folder)
      if seed is None
      else trained(cell.folder, path, task)
    )
    lines.append(
      cell_name
      | {"accuracy": np.mean(right), "right": "".join("01"[r] for r in right)}
      | json.loads((cell.folder / "machine.json").read_text())
    )
    report.write_lines(given.results, lines)
  rows = table(lines)
  print(f"| {' | '.join(rows[0])} |\n|{' --- |' * len(rows[0])}")
  for row in rows:
    print(f"| {' | '.join(map(str, row.values()))} |")


if __name__ == "__main__":
  main()
