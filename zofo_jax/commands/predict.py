"""Answers new rows with a trained run, at its best checkpoint.

zofo predict --workdir=runs/opt --input=ROWS.jsonl --output=ANSWERS.jsonl
"""

from collections.abc import Sequence
from typing import Any

from etils import epath

from zofo_jax import errors, report
from zofo_jax.commands import arguments as arguments_lib
from zofo_jax.commands import evaluate
from zofo_jax.data import sources
from zofo_jax.evaluation import results
from zofo_jax.sharding import multihost


def predict(workdir: str, source: str | None, target: str | None) -> None:
  """Answers the rows of a file, which need no labels.

  Args:
    workdir: folder of the run.
    source: JSONL, CSV or Parquet file with the task's columns.
    target: JSONL file to write; `WORKDIR/answers.jsonl` if None. Each line has
      the row's columns, `prediction` (the option's text or the generated
      one) and, where there are options, their `scores`.

  Raises:
    UserError: there is no run or no file, or a row is broken.
  """
  if not source:
    raise errors.UserError("--input: expected a file of rows; found nothing.")
  folder = epath.Path(workdir)
  with multihost.raise_on_all_processes():
    run = evaluate.load_run(folder)
    rows = sources.load(run.task, source, "train", labelled=False)
    encoded = run.encoder.encode_unlabelled(run.task, rows)
  state = evaluate.restore(run, folder)
  result = run.evaluate(
    state.base, run.selected_adapter(state), encoded, "predict"
  )
  if isinstance(result, results.GeneratedAnswers):
    answers: list[dict[str, Any]] = [{"prediction": t} for t in result.texts]
  else:
    answers = []
    for row, line in zip(rows, result.to_records(), strict=True):
      options = run.task.options(row, run.encoder.version)
      answer = options[line["prediction"]].strip()
      answers.append({"prediction": answer, "scores": line["scores"]})
  path = epath.Path(target) if target else folder / "answers.jsonl"
  lines = [
    {**row.fields, **answer} for row, answer in zip(rows, answers, strict=True)
  ]
  path.parent.mkdir(parents=True, exist_ok=True)
  report.write_lines(path, lines)
  if multihost.is_primary():
    print(f"{len(lines)} answers in {path}.")


def main(arguments: Sequence[str]) -> None:
  """Runs the command."""
  parser = arguments_lib.make_parser("predict", __doc__)
  parser.add_argument(
    "--input", metavar="FILE", help="rows: JSONL, CSV or Parquet; labels unread"
  )
  parser.add_argument(
    "--output", metavar="FILE", help="JSONL; else WORKDIR/answers.jsonl"
  )
  arguments_lib.add_run(parser)
  options = parser.parse(arguments)
  workdir = arguments_lib.require_workdir(options)
  arguments_lib.start_processes(options, "predict", {})
  predict(workdir, options.input, options.output)
