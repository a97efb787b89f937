"""What a saved run answers: its score on the test rows, and new rows.

Both use the best checkpoint on the selection rows, and adapter p.
"""

import json
from typing import Any

from etils import epath

from zofo_jax import (
  bilevel,
  checkpoint,
  encode,
  errors,
  evaluate,
  experiment,
  metrics,
  report,
  rows,
  runs,
)


def _load(folder: epath.Path) -> tuple[runs.Run, bilevel.BilevelState]:
  """Reads a run's config and its best checkpoint."""
  run = runs.make_run(runs.read_config(folder))
  with checkpoint.Checkpoints(folder / "checkpoints") as checkpoints:
    state, _ = checkpoints.restore(
      run.abstract_state(), checkpoints.best_step()
    )
  return run, state


def evaluate_run(workdir: str) -> dict[str, Any]:
  """Scores a saved run on its test rows.

  Writes `evaluation.json` (accuracy and the task's metric with 95 % bootstrap
  intervals) and `predictions.jsonl` (a line for each row) into the run.

  Args:
    workdir: folder of the run.

  Returns:
    What is in `evaluation.json`.

  Raises:
    UserError: there is no run, or its rows are gone.
  """
  folder = epath.Path(workdir)
  run, state = _load(folder)
  examples = experiment.load_examples(run.config, run.model, run.task).test
  result = run.evaluate(state.base, state.upper, examples, "test")
  right = metrics.credit(
    result.predictions.tolist(), [example.right for example in examples]
  )
  worth: dict[str, float] = {
    "accuracy": result.accuracy,
    run.task.metric: result.metric,
  }
  intervals = {
    f"{name}_interval": metrics.bootstrap_interval(
      metrics.METRICS[name], result.predictions.tolist(), right
    )
    for name in worth
  }
  evaluation: dict[str, Any] = {
    "task": run.task.name,
    "step": int(state.step),
    "num_test_rows": len(examples),
    **worth,
    **intervals,
  }
  report.write_json(folder / "evaluation.json", evaluation)
  _write_predictions(folder / "predictions.jsonl", examples, result)
  report.results_table([evaluation], title=f"{folder}, adapter p")
  return evaluation


def predict(workdir: str, source: str | None, target: str | None) -> None:
  """Answers rows of a file that need no labels.

  Args:
    workdir: folder of the run.
    source: JSONL, CSV or Parquet file with the task's columns.
    target: JSONL file to write; `WORKDIR/answers.jsonl` if None. Each line has
      the row's columns, `prediction` (the option's text) and `scores`.

  Raises:
    UserError: there is no run or no file, or a row is broken.
  """
  if not source:
    raise errors.UserError("--input: expected a file of rows; found nothing.")
  folder = epath.Path(workdir)
  run, state = _load(folder)
  asked = rows.load(run.task, source, "train", labelled=False)
  config = run.config
  examples = encode.encode_rows(
    run.task,
    asked,
    run.model.tokenizer,
    "classification",
    max_length=experiment.context_length(config, run.model),
    version=config.data.template,
    long_rows="truncate" if config.data.long_rows == "truncate" else "error",
    labelled=False,
  )
  scores = evaluate.score_options(
    run.score_fn,
    state.base,
    state.upper,
    examples,
    batch_size=config.eval.batch_size,
    pad=run.model.pad,
    label="predict",
  )
  path = epath.Path(target) if target else folder / "answers.jsonl"
  lines = []
  for row, values in zip(asked, scores, strict=True):
    options = run.task.options(row, config.data.template)
    known = [float(value) for value in values[: len(options)]]
    answer = options[int(values.argmax())].strip()
    lines.append(
      json.dumps({**row.fields, "prediction": answer, "scores": known})
    )
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("\n".join(lines) + "\n")
  print(f"{len(lines)} answers in {path}.")


def _write_predictions(
  path: epath.Path,
  examples: list[encode.Example],
  result: evaluate.Evaluation,
) -> None:
  lines = [
    json.dumps(
      {
        "where": example.where,
        "prediction": int(prediction),
        "right": list(example.right),
        "scores": [float(s) for s in scores[: len(example.options)]],
      }
    )
    for example, prediction, scores in zip(
      examples, result.predictions, result.scores, strict=True
    )
  ]
  path.write_text("\n".join(lines) + "\n")
