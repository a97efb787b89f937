"""What a saved run answers: its score on the test rows, and new rows.

Both use the best checkpoint on the selection rows, and adapter p.
"""

from collections.abc import Sequence
from typing import Any

from etils import epath

from zofo_jax import errors, report, tasks
from zofo_jax.builders import data
from zofo_jax.builders import run as run_lib
from zofo_jax.checkpoints import state_store
from zofo_jax.core.types import BilevelState
from zofo_jax.data import encode_options, sources
from zofo_jax.evaluation import scoring
from zofo_jax.sharding import multihost


def find(folder: epath.Path) -> run_lib.Run:
  """Reads a run's config.

  Raises:
    UserError: there is no run, or it is one over many tasks.
  """
  config = run_lib.read_config(folder)
  if config.command != "train":
    raise errors.UserError(
      f"--workdir: {folder} is a run of '{config.command}', over many tasks; "
      "expected one of 'train' (--config=configs/adapt.py:run=DIR tunes and "
      "scores new tasks)."
    )
  return run_lib.make_run(config)


def restore(run: run_lib.Run, folder: epath.Path) -> BilevelState:
  """Reads a run's best checkpoint, on whatever devices there are now.

  Raises:
    UserError: there is none.
  """
  with state_store.open_store(run, folder) as states:
    state, _ = states.best()
  return state


def evaluate_run(workdir: str) -> dict[str, Any]:
  """Scores a saved run on its test rows.

  Writes `evaluation.json` (accuracy and the task's metric, or token F1 and
  exact match, with 95 % bootstrap intervals) and `predictions.jsonl` (a line
  for each row) into the run.

  Args:
    workdir: folder of the run.

  Returns:
    What is in `evaluation.json`.

  Raises:
    UserError: there is no run, or its rows are gone.
  """
  folder = epath.Path(workdir)
  with multihost.raise_on_all_processes():
    run = find(folder)
    examples = data.load_examples(run.config, run.model, run.task).test
  state = restore(run, folder)
  result = run.evaluate(
    state.base, run.selected_adapter(state), examples, "test"
  )
  evaluation: dict[str, Any] = {
    "task": run.task.name,
    "step": int(state.step),
    "num_test_rows": len(examples),
    **result.metrics(),
    **result.intervals(),
  }
  report.write_json(folder / "evaluation.json", evaluation)
  report.write_lines(folder / "predictions.jsonl", result.to_records())
  report.results_table(
    [evaluation], title=f"{folder}, adapter {run.config.keep}"
  )
  return evaluation


def predict(workdir: str, source: str | None, target: str | None) -> None:
  """Answers rows of a file that need no labels.

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
    run = find(folder)
    asked = sources.load(run.task, source, "train", labelled=False)
    encoded = _encoded(run, asked)
  state = restore(run, folder)
  result = run.evaluate(
    state.base, run.selected_adapter(state), encoded, "predict"
  )
  if isinstance(result, scoring.GeneratedAnswers):
    answers: list[dict[str, Any]] = [{"prediction": t} for t in result.texts]
  else:
    answers = []
    for row, line in zip(asked, result.to_records(), strict=True):
      options = run.task.options(row, run.config.data.template)
      answer = options[line["prediction"]].strip()
      answers.append({"prediction": answer, "scores": line["scores"]})
  path = epath.Path(target) if target else folder / "answers.jsonl"
  lines = [
    {**row.fields, **answer} for row, answer in zip(asked, answers, strict=True)
  ]
  path.parent.mkdir(parents=True, exist_ok=True)
  report.write_lines(path, lines)
  if multihost.is_primary():
    print(f"{len(lines)} answers in {path}.")


def _encoded(run: run_lib.Run, asked: Sequence[tasks.Row]) -> Sequence[Any]:
  """Encodes rows without labels, for options or for generation."""
  config = run.config
  if run.generate_fn is not None:
    return data.load_questions(
      config, run.model, run.task, asked, labelled=False
    )
  return encode_options.encode_rows(
    run.task,
    asked,
    run.model.tokenizer,
    "classification",
    max_length=data.context_length(config, run.model),
    version=config.data.template,
    long_rows="truncate" if config.data.long_rows == "truncate" else "error",
    labelled=False,
  )
