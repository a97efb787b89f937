"""Writes the results of the baseline commands: icl, probe, head."""

from typing import Any

from etils import epath

from zofo_jax import report
from zofo_jax.builders import run as run_lib
from zofo_jax.evaluation import results


def write(
  run: run_lib.Run,
  workdir: str,
  name: str,
  result: results.Result,
  figures: dict[str, Any],
) -> dict[str, Any]:
  """Writes metrics and predictions, and prints the metrics.

  Args:
    run: the run.
    workdir: folder to write `{name}.json` and `{name}.jsonl` into.
    name: of the command.
    result: predictions of the test rows.
    figures: metrics, and what else belongs into the file.

  Returns:
    The content of `{name}.json`.
  """
  outcome = {
    "task": run.task.name,
    "model": run.model.name,
    "mode": name,
    "num_test_rows": len(result.examples),
    **figures,
  }
  folder = epath.Path(workdir)
  report.write_json(folder / f"{name}.json", outcome)
  report.write_lines(folder / f"{name}.jsonl", result.to_records())
  run.write_dropped(folder)
  plain = {k: v for k, v in outcome.items() if k != "sets"}
  report.results_table([plain], title=f"{folder}")
  return outcome
