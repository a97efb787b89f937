"""Answers the test rows by in-context learning, for comparison.

The demonstrations are rows of D_p and D_f; --config.icl.num_shots=0 is
zero-shot. Nothing is trained.

  zofo icl --config=opt:task=rte --workdir=runs/icl
"""

from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np

from zofo_jax import errors, tasks
from zofo_jax.builders import data, demonstrations, model
from zofo_jax.builders import run as run_lib
from zofo_jax.commands import arguments as arguments_lib
from zofo_jax.commands import results as results_lib
from zofo_jax.evaluation import calibration, in_context


def icl(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
  """Answers the test rows with demonstrations before each; trains nothing.

  Writes `icl.json` and, for the first set of demonstrations, `icl.jsonl`.

  Args:
    config: the config; `config.icl` is for this command.
    workdir: folder to write into; local or gs://.

  Returns:
    The content of `icl.json`: means over the sets of demonstrations, and the
    metrics of each set.

  Raises:
    UserError: something in the config or the files is wrong.
  """
  run = run_lib.make_run(config)
  if run.generate_fn is not None and config.icl.calibration != "none":
    raise errors.UserError(
      f"config.icl.calibration: task {run.task.name} is answered by generating "
      f"text; expected 'none', found '{config.icl.calibration}'."
    )
  splits = data.load_rows(config, run.task)
  pool = [*splits.lower, *splits.upper]
  encoded = [
    _icl_examples(run, pool, splits.test, config.data.seed + number)
    for number in range(config.icl.num_sets if config.icl.num_shots else 1)
  ]
  base = model.load_base(config, run.model, run.mesh)
  results = [
    _calibrated(
      run, base, demonstrations.answer(run, base, examples, "icl"), nulls
    )
    for examples, nulls in encoded
  ]
  figures: dict[str, Any] = {
    "num_shots": config.icl.num_shots,
    "calibration": config.icl.calibration,
  }
  if len(results) > 1:
    sets = [result.metrics() for result in results]
    for name in sets[0]:
      values = [metrics[name] for metrics in sets]
      figures[name] = float(np.mean(values))
      figures[f"worst_{name}"] = min(values)
    figures["sets"] = sets
  else:
    figures |= {**results[0].metrics(), **results[0].intervals()}
  return results_lib.write(run, workdir, "icl", results[0], figures)


def _icl_examples(
  run: run_lib.Run, pool: list[tasks.Row], asked: list[tasks.Row], seed: int
) -> tuple[list[Any], list[list[Any]]]:
  """Encodes the test rows, and the same without content for calibration."""
  config, task, version = run.config, run.task, run.config.data.template
  shown = in_context.draw(
    task, pool, config.icl.num_shots, seed, balanced=config.icl.balanced
  )
  nulls = [
    demonstrations.encode_shown(
      run,
      shown,
      asked,
      [calibration.null_prompt(task, row, content, version) for row in asked],
    )
    for content in calibration.INPUTS.get(config.icl.calibration, ())
  ]
  return demonstrations.encode_shown(run, shown, asked), nulls


def _calibrated(run, base, result, nulls):
  """Calibrates scores by those of prompts without content, if configured."""
  if not nulls:
    return result
  null_scores = []
  for examples in nulls:
    # If the options are fixed, all rows without content are the same.
    distinct = list({example.rows: example for example in examples}.values())
    place = {example.rows: i for i, example in enumerate(distinct)}
    # Scores of options, never generated answers.
    scored: Any = demonstrations.answer(run, base, distinct, "calibrate")
    indices = [place[example.rows] for example in examples]
    null_scores.append(scored.scores[indices])
  if run.config.icl.calibration == "contextual":
    scores = calibration.contextual(result.scores, np.stack(null_scores))
  else:
    counts = calibration.lengths(result.examples)
    scores = calibration.domain(result.scores, np.stack(null_scores), counts)
  return run.score_predictions(result.examples, scores)


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Runs the command on a config."""
  icl(config, workdir)


def main(arguments: Sequence[str]) -> None:
  """Runs the command."""
  arguments_lib.run_config(arguments, "icl", __doc__)
