"""A config run many times, its fields changed: here, or as commands to submit.

  python -m zofo_jax.sweep --sweep=configs/sweeps/theta.py --workdir=runs/sweep

A sweep is a Python file with CONFIG, what `--config` would be, and
`get_sweep()`, which yields a dictionary of fields for each run. Each run has a
folder of its own; one that has ended is not run again, one that has not goes
on.
"""

import argparse
import importlib.util
import json
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

from zofo_jax import errors, report
from zofo_jax.config import defaults
from zofo_jax.report import progress as progress_lib


class SweepRun(NamedTuple):
  """A run of a sweep.

  Attributes:
    folder: its own, named after its fields.
    fields: what differs from the sweep's config.
    command: what runs it.
    summary: the file in its folder by which it has ended.
  """

  folder: pathlib.Path
  fields: dict[str, Any]
  command: list[str]
  summary: str = "summary.json"


def load(
  path: str, workdir: str, arguments: Sequence[str] = ()
) -> list[SweepRun]:
  """Reads a sweep.

  Args:
    path: the Python file.
    workdir: folder that the runs' own folders are made in.
    arguments: for every run as they are.

  Raises:
    UserError: no such file, it lacks CONFIG or get_sweep, a field is unknown,
      or two runs are the same.
  """
  module = _module(path)
  known = defaults.flat(defaults.base_config())
  cells: dict[pathlib.Path, SweepRun] = {}
  for fields in module.get_sweep():
    for name in fields:
      if name not in known:
        raise errors.UserError(
          f"--sweep: {path} names the field '{name}', which there is not."
          f"{errors.nearest(name, known)}"
        )
    name = ",".join(f"{k.split('.')[-1]}={v}" for k, v in fields.items())
    folder = pathlib.Path(workdir) / name.replace("/", "_")
    if folder in cells:
      raise errors.UserError(f"--sweep: {path} has the run '{name}' twice.")
    command = [
      *(sys.executable, "-m", "zofo_jax.main"),
      *(f"--config={module.CONFIG}", f"--workdir={folder}"),
      *(f"--config.{k}={v}" for k, v in fields.items()),
      *arguments,
    ]
    cells[folder] = SweepRun(folder, dict(fields), command)
  if not cells:
    raise errors.UserError(f"--sweep: {path} yields no run.")
  return list(cells.values())


def _module(path: str) -> Any:
  spec = importlib.util.spec_from_file_location("zofo_jax_sweep", path)
  if not pathlib.Path(path).is_file() or spec is None or spec.loader is None:
    raise errors.UserError(f"--sweep: expected a Python file; found '{path}'.")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  for name in ("CONFIG", "get_sweep"):
    if not hasattr(module, name):
      raise errors.UserError(f"--sweep: {path} lacks {name}.")
  return module


def run(cells: Sequence[SweepRun], jobs: int) -> list[dict[str, Any]]:
  """Runs what has not ended, several at a time.

  Returns:
    A row for each: its fields, and the numbers of its summary, or `failed` with
    the last line that it said.
  """
  open_cells = [cell for cell in cells if not _summary(cell)]
  failed: dict[pathlib.Path, str] = {}
  with (
    futures.ThreadPoolExecutor(jobs) as pool,
    progress_lib.Progress(
      len(cells), "sweep", unit="runs", start=len(cells) - len(open_cells)
    ) as bar,
  ):
    bar.update(len(cells) - len(open_cells))
    ends = {pool.submit(_run_one, cell): cell for cell in open_cells}
    for count, end in enumerate(futures.as_completed(ends), 1):
      if said := end.result():
        failed[ends[end].folder] = said
      bar.update(len(cells) - len(open_cells) + count)
  return [_row(cell, failed.get(cell.folder)) for cell in cells]


def _run_one(cell: SweepRun) -> str:
  """Runs one; returns what it said last if it failed."""
  cell.folder.mkdir(parents=True, exist_ok=True)
  with (cell.folder / "log.txt").open("ab") as log:
    code = subprocess.run(
      cell.command, stdout=log, stderr=log, check=False
    ).returncode
  if code == 0:
    return ""
  lines = (cell.folder / "log.txt").read_text(errors="replace").split("\n")
  return next((x for x in reversed(lines) if x.strip()), f"exit code {code}")


def _summary(cell: SweepRun) -> Mapping[str, Any]:
  path = cell.folder / cell.summary
  if not path.exists():
    return {}
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise errors.UserError(
      f"'{path}' is no JSON ({errors.first_line(error)}); without it the run "
      "would be taken again."
    ) from error


def _row(cell: SweepRun, failed: str | None) -> dict[str, Any]:
  numbers = {
    name: value
    for name, value in _summary(cell).items()
    if isinstance(value, int | float)
  }
  said = {"failed": failed} if failed else {}
  return {**cell.fields, **numbers, **said}


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs a sweep, or prints its commands; returns the exit code."""
  parser = argparse.ArgumentParser(
    "python -m zofo_jax.sweep",
    description="Runs a config many times with other fields; what it does not "
    "know, such as --config.train.num_steps=100, goes to every run.",
  )
  parser.add_argument("--sweep", required=True, help="Python file of the sweep")
  parser.add_argument("--workdir", required=True, help="folder for the runs")
  parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
  parser.add_argument(
    "--print",
    action="store_true",
    help="only print the commands, one a line, for a SLURM array or xpk",
  )
  given, rest = parser.parse_known_args(arguments)
  try:
    if given.jobs < 1:
      raise errors.UserError(
        f"--jobs: expected 1 or more runs at a time; found {given.jobs}."
      )
    cells = load(given.sweep, given.workdir, rest)
    if given.print:
      for cell in cells:
        print(shlex.join(["python", *cell.command[1:]]))
      return 0
    rows = run(cells, given.jobs)
  except errors.UserError as error:
    print(f"zofo_jax: {error}", file=sys.stderr)
    return 2
  report.write_json(pathlib.Path(given.workdir) / "sweep.json", rows)
  shown = ("test_accuracy", "test_token_f1", "train_seconds", "failed")
  report.results_table(
    [
      {k: v for k, v in row.items() if k in (*cell.fields, *shown)}
      for cell, row in zip(cells, rows, strict=True)
    ],
    title=f"{given.sweep}: all numbers in {given.workdir}/sweep.json",
  )
  return 2 if any("failed" in row for row in rows) else 0


if __name__ == "__main__":
  sys.exit(main())
