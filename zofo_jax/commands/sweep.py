"""Runs a config many times with other fields, or prints the commands.

  zofo sweep --sweep=sweeps/theta --workdir=runs/sweep

A sweep is a Python file with CONFIG, the value of `--config`, and
`get_sweep()`, which yields a dictionary of fields for each run. Each run has a
folder; a run that has ended is not repeated, and one that has not is resumed.
Flags that the command does not know, such as --config.train.num_steps=100, go
to every run.
"""

import json
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

from etils import epath

from zofo_jax import errors, report
from zofo_jax.checkpoints import lock
from zofo_jax.commands import arguments as arguments_lib
from zofo_jax.config import defaults, files, paths
from zofo_jax.report import progress as progress_lib


class SweepRun(NamedTuple):
  """A run of a sweep.

  Attributes:
    folder: folder of the run, named after its fields.
    fields: fields that differ from the sweep's config.
    command: the command line.
    summary: file in the folder that exists once the run has ended.
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
    path: the Python file, or the name of a shipped one.
    workdir: folder for the folders of the runs.
    arguments: passed on to every run.

  Raises:
    UserError: there is no such file, it lacks CONFIG or get_sweep, a field is
      unknown, or two runs are the same.
  """
  module = files.load_module(files.find(path, "--sweep"), "--sweep")
  for name in ("CONFIG", "get_sweep"):
    if not hasattr(module, name):
      raise errors.UserError(f"--sweep: {path} lacks {name}.")
  runs: dict[pathlib.Path, SweepRun] = {}
  for fields in module.get_sweep():
    for name in fields:
      if name not in defaults.FIELDS:
        raise errors.UserError(
          f"--sweep: {path} names the field '{name}', which does not exist."
          f"{errors.nearest(name, defaults.FIELDS)}"
        )
    name = ",".join(f"{k.split('.')[-1]}={v}" for k, v in fields.items())
    folder = pathlib.Path(workdir) / name.replace("/", "_")
    if folder in runs:
      raise errors.UserError(f"--sweep: {path} has the run '{name}' twice.")
    command = [
      *(sys.executable, "-m", "zofo_jax.main"),
      *(f"--config={module.CONFIG}", f"--workdir={folder}"),
      *(f"--config.{k}={v}" for k, v in fields.items()),
      *arguments,
    ]
    runs[folder] = SweepRun(folder, dict(fields), command)
  if not runs:
    raise errors.UserError(f"--sweep: {path} yields no run.")
  return list(runs.values())


def run(runs: Sequence[SweepRun], jobs: int) -> list[dict[str, Any]]:
  """Runs all that have not ended, several at a time.

  Returns:
    A row for each run: its fields and the numbers of its summary, or `failed`
    with the last line of its log.
  """
  pending = [sweep_run for sweep_run in runs if not _summary(sweep_run)]
  failed: dict[pathlib.Path, str] = {}
  with (
    futures.ThreadPoolExecutor(jobs) as pool,
    progress_lib.Progress(
      len(runs), "sweep", unit="runs", start=len(runs) - len(pending)
    ) as bar,
  ):
    bar.update(len(runs) - len(pending))
    folders = {pool.submit(_run_one, item): item.folder for item in pending}
    for count, future in enumerate(futures.as_completed(folders), 1):
      if last_line := future.result():
        failed[folders[future]] = last_line
      bar.update(len(runs) - len(pending) + count)
  return [_row(sweep_run, failed.get(sweep_run.folder)) for sweep_run in runs]


def _run_one(sweep_run: SweepRun) -> str:
  """Runs one; returns the last line of its log if it fails, else ""."""
  sweep_run.folder.mkdir(parents=True, exist_ok=True)
  with (sweep_run.folder / "log.txt").open("ab") as log:
    code = subprocess.run(
      sweep_run.command, stdout=log, stderr=log, check=False
    ).returncode
  if code == 0:
    return ""
  lines = (sweep_run.folder / "log.txt").read_text(errors="replace").split("\n")
  return next((x for x in reversed(lines) if x.strip()), f"exit code {code}")


def _summary(sweep_run: SweepRun) -> Mapping[str, Any]:
  path = sweep_run.folder / sweep_run.summary
  if not path.exists():
    return {}
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise errors.UserError(
      f"'{path}' is not JSON ({errors.first_line(error)}); without it the run "
      "would be repeated."
    ) from error


def _row(sweep_run: SweepRun, failed: str | None) -> dict[str, Any]:
  numbers = {
    name: value
    for name, value in _summary(sweep_run).items()
    if isinstance(value, int | float)
  }
  outcome = {"failed": failed} if failed else {}
  return {**sweep_run.fields, **numbers, **outcome}


def main(arguments: Sequence[str]) -> int:
  """Runs the command; returns 2 if a run failed."""
  parser = arguments_lib.make_parser("sweep", __doc__)
  parser.add_argument("--sweep", required=True, help="Python file of the sweep")
  parser.add_argument(
    "--workdir",
    required=True,
    type=paths.expand,
    help="folder for the runs",
  )
  parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
  parser.add_argument(
    "--print",
    action="store_true",
    help="only print the commands, one a line, for a SLURM array or xpk",
  )
  # Other flags, such as --config.train.num_steps=100, go to every run.
  options, others = parser.parse_known_args(arguments)
  if options.jobs < 1:
    raise errors.UserError(
      f"--jobs: expected 1 or more runs at a time; found {options.jobs}."
    )
  sweep_runs = load(options.sweep, options.workdir, others)
  if options.print:
    for sweep_run in sweep_runs:
      print(shlex.join(["python", *sweep_run.command[1:]]))
    return 0
  folder = epath.Path(options.workdir)
  with lock.hold(folder):
    rows = run(sweep_runs, options.jobs)
    report.write_json(folder / "sweep.json", rows)
  columns = ("test_accuracy", "test_token_f1", "train_seconds", "failed")
  report.results_table(
    [
      {k: v for k, v in row.items() if k in (*sweep_run.fields, *columns)}
      for sweep_run, row in zip(sweep_runs, rows, strict=True)
    ],
    title=f"{options.sweep}: all numbers in {options.workdir}/sweep.json",
  )
  return 2 if any("failed" in row for row in rows) else 0
