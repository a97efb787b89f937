"""Scores a trained run on its test rows, at its best checkpoint.

zofo evaluate --workdir=runs/opt
"""

from collections.abc import Collection, Sequence
from typing import Any

from etils import epath

from zofo_jax import errors, report
from zofo_jax.builders import run as run_lib
from zofo_jax.checkpoints import inputs, state_store
from zofo_jax.commands import arguments as arguments_lib
from zofo_jax.core.types import BilevelState
from zofo_jax.sharding import multihost


def load_run(folder: epath.Path) -> run_lib.Run:
  """Builds the run of a folder from its config.

  Raises:
    UserError: there is no run, it has no checkpoint, or it is over many tasks.
  """
  config = run_lib.read_config(folder)
  if config.command != "train":
    raise errors.UserError(
      f"--workdir: {folder} is a run of '{config.command}', over many tasks; "
      "expected one of 'train' (--config=configs/adapt.py:run=DIR tunes and "
      "scores new tasks)."
    )
  state_store.check_exists(folder)
  return run_lib.make_run(config)


def restore(run: run_lib.Run, folder: epath.Path) -> BilevelState:
  """Restores a run's best checkpoint, on the devices of this process.

  Raises:
    UserError: there is no checkpoint.
  """
  with state_store.open_store(run, folder) as states:
    state, _ = states.best()
  return state


def evaluate_run(
  workdir: str, may_change: Collection[str] = ()
) -> dict[str, Any]:
  """Scores a trained run on its test rows.

  Writes `evaluation.json` (accuracy and the task's metric, or token F1 and
  exact match, with 95 % bootstrap intervals) and `predictions.jsonl` (a line
  for each row) into the folder of the run.

  Args:
    workdir: folder of the run.
    may_change: see `inputs.check`.

  Returns:
    The content of `evaluation.json`.

  Raises:
    UserError: there is no run, or its rows cannot be read or have changed.
  """
  folder = epath.Path(workdir)
  with multihost.raise_on_all_processes():
    run = load_run(folder)
    report.make_folder(folder)
    examples = run.load_examples()
    inputs.check(run, folder, examples.fingerprints, may_change)
  state = restore(run, folder)
  result = run.evaluate(
    state.base, run.selected_adapter(state), examples.test, "test"
  )
  evaluation: dict[str, Any] = {
    "task": run.task.name,
    "step": int(state.step),
    "num_test_rows": len(examples.test),
    **result.metrics(),
    **result.intervals(),
  }
  report.write_json(folder / "evaluation.json", evaluation)
  report.write_lines(folder / "predictions.jsonl", result.to_records())
  report.results_table([evaluation], title=f"{folder}, adapter {run.keep}")
  return evaluation


def main(arguments: Sequence[str]) -> None:
  """Runs the command."""
  parser = arguments_lib.make_parser("evaluate", __doc__)
  arguments_lib.add_may_change(parser)
  arguments_lib.add_run(parser)
  options = parser.parse(arguments)
  workdir = arguments_lib.require_workdir(options)
  arguments_lib.start_processes(options, "evaluate", {})
  evaluate_run(workdir, options.may_change)
