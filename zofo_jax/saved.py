"""What a saved run answers: its score on the test rows, and new rows.

Both use the best checkpoint on the selection rows, and adapter p.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
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
  run, state = _load(folder)
  examples = experiment.load_examples(run.config, run.model, run.task).test
  result = run.evaluate(state.base, state.upper, examples, "test")
  worth = runs.worth(run.task, result)
  intervals = {
    f"{name}_interval": _interval(name, examples, result) for name in worth
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
      the row's columns, `prediction` (the option's text or the generated
      one) and, where there are options, their `scores`.

  Raises:
    UserError: there is no run or no file, or a row is broken.
  """
  if not source:
    raise errors.UserError("--input: expected a file of rows; found nothing.")
  folder = epath.Path(workdir)
  run, state = _load(folder)
  asked = rows.load(run.task, source, "train", labelled=False)
  find = _choose if run.generate_fn is None else _generate
  answers = find(run, state, asked)
  path = epath.Path(target) if target else folder / "answers.jsonl"
  lines = [
    json.dumps({**row.fields, **answer})
    for row, answer in zip(asked, answers, strict=True)
  ]
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("\n".join(lines) + "\n")
  print(f"{len(lines)} answers in {path}.")


def _choose(
  run: runs.Run, state: bilevel.BilevelState, asked: Sequence[rows.Row]
) -> list[dict[str, Any]]:
  """Answers rows with one of their options each."""
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
  answers = []
  for row, values in zip(asked, scores, strict=True):
    options = run.task.options(row, config.data.template)
    known = [float(value) for value in values[: len(options)]]
    answer = options[int(values.argmax())].strip()
    answers.append({"prediction": answer, "scores": known})
  return answers


def _generate(
  run: runs.Run, state: bilevel.BilevelState, asked: Sequence[rows.Row]
) -> list[dict[str, Any]]:
  """Answers rows with a text each."""
  found = experiment.load_questions(
    run.config, run.model, run.task, asked, labelled=False
  )
  texts = run.generate(state.base, state.upper, found, "predict")
  return [{"prediction": text} for text in texts]


def _interval(
  name: str,
  examples: Sequence[Any],
  result: evaluate.Evaluation | evaluate.Answers,
) -> tuple[float, float]:
  """Returns the bootstrap interval of one score over the rows."""
  if isinstance(result, evaluate.Answers):
    each = getattr(result, name).tolist()
    return metrics.bootstrap_interval(
      lambda values, _: float(np.mean(values)), each, each
    )
  predictions = result.predictions.tolist()
  right = metrics.credit(predictions, [example.right for example in examples])
  return metrics.bootstrap_interval(metrics.METRICS[name], predictions, right)


def _write_predictions(
  path: epath.Path,
  examples: Sequence[Any],
  result: evaluate.Evaluation | evaluate.Answers,
) -> None:
  if isinstance(result, evaluate.Answers):
    lines = [
      {
        "where": question.where,
        "prediction": text,
        "answers": list(question.answers),
        "token_f1": float(f1),
        "exact_match": float(same),
      }
      for question, text, f1, same in zip(examples, *result, strict=True)
    ]
  else:
    lines = [
      {
        "where": example.where,
        "prediction": int(prediction),
        "right": list(example.right),
        "scores": [float(s) for s in scores[: len(example.options)]],
      }
      for example, prediction, scores in zip(
        examples, result.predictions, result.scores, strict=True
      )
    ]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
