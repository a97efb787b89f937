"""Answers new rows with a trained run, at its best checkpoint.

zofo predict --workdir=runs/opt --input=ROWS.jsonl --output=ANSWERS.jsonl
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from etils import epath

from zofo_jax import errors, report, tasks
from zofo_jax.builders import run as run_lib
from zofo_jax.checkpoints import inputs
from zofo_jax.commands import arguments as arguments_lib
from zofo_jax.commands import evaluate
from zofo_jax.config import paths
from zofo_jax.data import files, sources
from zofo_jax.evaluation import results
from zofo_jax.sharding import multihost


def predict(
  workdir: str,
  source: str | None,
  target: str | None,
  may_change: Collection[str] = (),
) -> None:
  """Answers the rows of a file, which need no labels.

  Args:
    workdir: folder of the run.
    source: JSON, CSV, TSV or Parquet file with the task's columns.
    target: JSONL file to write; `WORKDIR/answers.jsonl` if None. Each line has
      the columns of a row, in the order of the file, and `prediction` (the
      option's text or the generated one), with `scores` where there are
      options. A row that cannot be answered has the prediction null and an
      `error` instead. Columns of these names are replaced. Of a chat, the
      messages end in the answer.
    may_change: see `inputs.check`.

  Raises:
    UserError: there is no run or no file, the output is the input, or no row
      can be answered.
  """
  if not source:
    raise errors.UserError("--input: expected a file of rows; found nothing.")
  folder = epath.Path(workdir)
  path = epath.Path(target) if target else folder / "answers.jsonl"
  with multihost.raise_on_all_processes():
    _check_input(source, path)
    run = evaluate.load_run(folder)
    report.check_output(path, "--output" if target else "--workdir")
    inputs.check(run, folder, may_change=may_change)
    items = sources.read(run.task, source, "train", labelled=False)
    encoded = _encode(run, items)
    examples = [e for e in encoded if not isinstance(e, errors.RowError)]
    if not examples:
      raise errors.UserError(
        f"None of {len(items)} rows can be answered; the first: {encoded[0]}"
      )
  state = evaluate.restore(run, folder)
  result = run.evaluate(
    state.base, run.selected_adapter(state), examples, "predict"
  )
  rows = [
    item
    for item, outcome in zip(items, encoded, strict=True)
    if isinstance(item, tasks.Row) and not isinstance(outcome, errors.RowError)
  ]
  answers = iter(_answers(run, rows, result))
  report.write_lines(
    path,
    [
      {**_columns(item), "prediction": None, "error": str(outcome)}
      if isinstance(outcome, errors.RowError)
      else {**_columns(item), **next(answers)}
      for item, outcome in zip(items, encoded, strict=True)
    ],
  )
  if multihost.is_primary():
    print(f"{len(examples)} answers in {path}.")
    if num_errors := len(items) - len(examples):
      print(
        f"{num_errors} of {len(items)} rows have no answer; 'error' says why."
      )


def _check_input(source: str, target: epath.Path) -> None:
  """Checks that the input is no folder, nor the file to be written."""
  path = epath.Path(source)
  if path.is_dir():
    raise errors.UserError(
      f"--input: {path} is a folder; expected a file of rows."
    )
  if path.exists() and paths.resolve(source) == paths.resolve(str(target)):
    raise errors.UserError(
      f"--output: {target} is the file of --input, which would be replaced; "
      "expected another file."
    )


def _encode(run: run_lib.Run, items: Sequence[files.Item]) -> list[Any]:
  """Encodes the rows; errors keep their places."""
  rows = [item for item in items if isinstance(item, tasks.Row)]
  encoded = iter(run.encoder.encode_unlabelled(run.task, rows))
  return [
    next(encoded) if isinstance(item, tasks.Row) else item for item in items
  ]


def _answers(
  run: run_lib.Run, rows: Sequence[tasks.Row], result: results.Result
) -> Iterator[dict[str, Any]]:
  """Yields the columns that hold the answer of each row."""
  if isinstance(result, results.GeneratedAnswers):
    answered = run.task.answered or (lambda fields, text: {})
    for row, text in zip(rows, result.texts, strict=True):
      yield {**answered(row.fields, text), "prediction": text}
    return
  for row, record in zip(rows, result.to_records(), strict=True):
    options = run.task.options(row, run.encoder.version)
    answer = options[record["prediction"]].strip()
    yield {"prediction": answer, "scores": record["scores"]}


def _columns(item: files.Item) -> dict[str, Any]:
  """Returns the columns of a row that are not columns of the output."""
  added = ("prediction", "scores", "error")
  return {k: v for k, v in (item.fields or {}).items() if k not in added}


def main(arguments: Sequence[str]) -> None:
  """Runs the command."""
  parser = arguments_lib.make_parser("predict", __doc__)
  parser.add_argument(
    "--input",
    metavar="FILE",
    type=paths.expand,
    help="rows: JSON, CSV, TSV or Parquet; labels unread",
  )
  parser.add_argument(
    "--output",
    metavar="FILE",
    type=paths.expand,
    help="JSONL; else WORKDIR/answers.jsonl",
  )
  arguments_lib.add_may_change(parser)
  arguments_lib.add_run(parser)
  options = parser.parse(arguments)
  workdir = arguments_lib.require_workdir(options)
  arguments_lib.start_processes(options, "predict", {})
  predict(workdir, options.input, options.output, options.may_change)
