"""Answers the test rows by in-context learning, for comparison.

The demonstrations are rows of D_p and D_f; --config.icl.num_shots=0 is
zero-shot. Nothing is trained.

  zofo icl --config=opt:task=rte --workdir=runs/icl
"""

import functools
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
from etils import epath

from zofo_jax import errors, tasks
from zofo_jax.builders import demonstrations, model
from zofo_jax.builders import run as run_lib
from zofo_jax.checkpoints import inputs, lock
from zofo_jax.commands import arguments as arguments_lib
from zofo_jax.commands import results as results_lib
from zofo_jax.data import encode_options, fingerprints
from zofo_jax.evaluation import calibration, in_context, metrics


@lock.locked
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
  splits = run.row_source.load(run.task)
  inputs.check(
    run, epath.Path(workdir), fingerprints.of_splits(splits._asdict())
  )
  pool = [*splits.lower, *splits.upper]
  queries = encode_options.rows_of(
    splits.test, run.encoder.encode_eval(run.task, splits.test)
  )
  encoded = [
    _icl_examples(
      run,
      pool,
      queries,
      config.data.seed + number,
      num_shots=config.icl.num_shots,
      balanced=config.icl.balanced,
      separator=config.icl.separator,
      calibration_name=config.icl.calibration,
    )
    for number in range(config.icl.num_sets if config.icl.num_shots else 1)
  ]
  base = model.load_base(run.model, run.mesh)
  results = [
    _calibrated(
      run,
      base,
      demonstrations.answer(run, base, examples, "icl"),
      content_free,
      config.icl.calibration,
    )
    for examples, content_free in encoded
  ]
  figures: dict[str, Any] = {
    "num_shots": config.icl.num_shots,
    "calibration": config.icl.calibration,
  }
  if len(results) > 1:
    sets = [result.metrics() for result in results]
    for name in sets[0]:
      values = [figures_of_set[name] for figures_of_set in sets]
      figures[name] = float(np.mean(values))
      worst = max if name in metrics.LOWER_IS_BETTER else min
      figures[f"worst_{name}"] = worst(values)
    figures["sets"] = sets
  else:
    figures |= {**results[0].metrics(), **results[0].intervals()}
  return results_lib.write(run, workdir, "icl", results[0], figures)


def _icl_examples(
  run: run_lib.Run,
  pool: list[tasks.Row],
  queries: list[tasks.Row],
  seed: int,
  *,
  num_shots: int,
  balanced: bool,
  separator: str,
  calibration_name: str,
) -> tuple[list[Any], list[list[Any]]]:
  """Encodes the test rows, and the same without content for calibration."""
  task, version = run.task, run.encoder.version
  encode = functools.partial(
    demonstrations.encode,
    task,
    run.encoder,
    in_context.draw(task, pool, num_shots, seed, balanced=balanced),
    queries,
    separator=separator,
  )
  content_free = [
    encode(
      [calibration.null_prompt(task, row, text, version) for row in queries]
    )
    for text in calibration.INPUTS.get(calibration_name, ())
  ]
  return encode(), content_free


def _calibrated(run, base, result, content_free, name):
  """Calibrates scores by those of prompts without content, if configured."""
  if not content_free:
    return result
  null_scores = []
  for examples in content_free:
    # If the options are fixed, all rows without content are the same.
    distinct = list({example.rows: example for example in examples}.values())
    place = {example.rows: i for i, example in enumerate(distinct)}
    # Scores of options, never generated answers.
    scored: Any = demonstrations.answer(run, base, distinct, "calibrate")
    indices = [place[example.rows] for example in examples]
    null_scores.append(scored.scores[indices])
  if name == "contextual":
    scores = calibration.contextual(result.scores, np.stack(null_scores))
  else:
    counts = calibration.lengths(result.examples)
    scores = calibration.domain(result.scores, np.stack(null_scores), counts)
  return run.score_predictions(result.examples, scores)


def main(arguments: Sequence[str]) -> None:
  """Runs the command."""
  arguments_lib.run_config(arguments, "icl", __doc__)
