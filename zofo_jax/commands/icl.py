"""What a backbone does on a task without Bilevel-ZOFO, for comparison.

In-context learning (zero-shot without demonstrations), a linear probe, and a
new head. Each reads the config of a run, answers the same test rows, and may
learn from the rows of D_p and D_f together.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from zofo_jax import errors, report, tasks
from zofo_jax.builders import algorithm, data, demonstrations, model
from zofo_jax.builders import run as run_lib
from zofo_jax.core import losses
from zofo_jax.data import batching
from zofo_jax.evaluation import calibration, in_context, scoring
from zofo_jax.evaluation import linear_probe as linear_probe_lib
from zofo_jax.models import apply
from zofo_jax.report import progress as progress_lib
from zofo_jax.sharding import dispatch


def icl(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
  """Answers the test rows with demonstrations before each; trains nothing.

  Writes `icl.json` and, for the first set of demonstrations, `icl.jsonl`.

  Args:
    config: the run's config; `config.icl` is this mode's.
    workdir: folder to write into; local or gs://.

  Returns:
    What is in `icl.json`: means over the sets of demonstrations, and each.

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
    each = [result.metrics() for result in results]
    for name in each[0]:
      figures[name] = float(np.mean([one[name] for one in each]))
      figures[f"worst_{name}"] = min(one[name] for one in each)
    figures["sets"] = each
  else:
    figures |= {**results[0].metrics(), **results[0].intervals()}
  return _write(run, workdir, "icl", results[0], figures)


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
  """Takes off what questions without content score, if so configured."""
  if not nulls:
    return result
  # Where the options are fixed all rows without content are one and the same.
  null_scores = []
  for one in nulls:
    distinct = list({example.rows: example for example in one}.values())
    place = {example.rows: i for i, example in enumerate(distinct)}
    # No answers: calibration is for options.
    found: Any = demonstrations.answer(run, base, distinct, "calibrate")
    chosen = [place[example.rows] for example in one]
    null_scores.append(found.scores[chosen])
  if run.config.icl.calibration == "contextual":
    scores = calibration.contextual(result.scores, np.stack(null_scores))
  else:
    counts = calibration.lengths(result.examples)
    scores = calibration.domain(result.scores, np.stack(null_scores), counts)
  return run.score_predictions(result.examples, scores)


def linear_probe(
  config: ml_collections.ConfigDict, workdir: str
) -> dict[str, Any]:
  """Fits a logistic regression on the last hidden state before the answer.

  Writes `probe.json` and `probe.jsonl`.

  Args:
    config: the run's config; `config.probe` is this mode's.
    workdir: folder to write into; local or gs://.

  Returns:
    What is in `probe.json`.

  Raises:
    UserError: the task's options are not the same for every row, or something
      in the config or the files is wrong.
  """
  run = run_lib.make_run(config)
  if run.task.kind != "classification":
    raise errors.UserError(
      f"config.data.task: a linear probe needs the same options for every "
      f"row; task {run.task.name} is {run.task.kind}."
    )
  examples = data.load_examples(config, run.model, run.task)
  known = [*examples.lower, *examples.upper]
  labels = [example.label for example in known]
  if len(set(labels)) < 2:
    raise errors.UserError(
      f"Task {run.task.name}: a linear probe needs rows of two labels at "
      f"least; all {len(known)} have label {labels[0]}."
    )
  base = model.load_base(config, run.model, run.mesh)
  hidden_fn = dispatch.jit_on_batches(
    apply.make_hidden_fn(run.model.module), run.mesh, 1
  )

  def features(some):
    # The first position of the first row is the last token of the prompt.
    return _hidden(run, hidden_fn, base, some)[:, 0, 0]

  test: Any = examples.test  # no questions, in a task with options
  score = linear_probe_lib.fit_logistic(
    features(known),
    labels,
    c=config.probe.c,
    num_options=len(test[0].options),
  )
  result = run.score_predictions(test, score(features(test)))
  figures = {**result.metrics(), **result.intervals()}
  return _write(run, workdir, "probe", result, figures)


def head(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
  """Trains the rows of the head, by Adam, on a backbone that stands still.

  A head that is tied to the embedding becomes one of its own. Writes
  `head.json` and `head.jsonl`.

  Args:
    config: the run's config; `config.head` is this mode's.
    workdir: folder to write into; local or gs://.

  Returns:
    What is in `head.json`.

  Raises:
    UserError: the task has no options, or something in the config or the files
      is wrong.
  """
  run = run_lib.make_run(config)
  if run.generate_fn is not None:
    raise errors.UserError(
      f"config.data.task: the head is trained on options; task {run.task.name} "
      "is answered by generating text."
    )
  examples = data.load_examples(config, run.model, run.task)
  known = [*examples.lower, *examples.upper]
  base = model.load_base(config, run.model, run.mesh)
  module = run.model.module
  hidden_fn = dispatch.jit_on_batches(apply.make_hidden_fn(module), run.mesh, 1)
  hidden = _hidden(run, hidden_fn, base, known)
  table = apply.head_table(module, base)
  tokens = (
    None if config.head.rows == "all" else linear_probe_lib.label_tokens(known)
  )
  trained = _train_head(run, table, tokens, known, hidden)
  untied, base = apply.untie(
    module, base, linear_probe_lib.with_head_rows(table, tokens, trained)
  )
  score_fn = dispatch.jit_on_batches(
    scoring.make_score_fn(apply.make_log_probs_fn(untied)), run.mesh, 2
  )
  result = run.evaluate(base, {}, examples.test, "test", score_fn=score_fn)
  figures = {**result.metrics(), **result.intervals()}
  return _write(run, workdir, "head", result, figures)


def _train_head(run, table, tokens, known, hidden):
  """Takes the steps of `config.head`; returns the rows, float32."""
  config = run.config
  loss_fn = {
    "likelihood": losses.likelihood,
    "classification": losses.classification,
  }[config.loss]
  tx = algorithm.make_optimizer("adam", config.head.learning_rate)
  table = jnp.asarray(table, jnp.float32)
  trained = table if tokens is None else table[tokens]
  opt_state = tx.init(trained)
  step_fn = jax.jit(
    linear_probe_lib.make_head_step(loss_fn, tx, tokens), donate_argnums=(0, 1)
  )
  if tokens is None:
    # Donated and read in one call: two arrays.
    trained = jnp.array(trained, copy=True)
  shape = batching.shape_of(known)
  total = config.head.num_steps
  with progress_lib.Progress(total, "head") as progress:
    for step in range(total):
      chosen = batching.batch_indices(
        config.seed, len(known), config.head.batch_size, step
      )
      batch = batching.collate(
        [known[i] for i in chosen], shape, pad=run.model.pad
      )
      trained, opt_state, loss = step_fn(
        trained, opt_state, table, hidden[chosen], batch
      )
      if (step + 1) % 20 == 0 or step + 1 == total:
        progress.update(step + 1, loss=float(loss))
  return trained


def _hidden(run, hidden_fn, base, examples):
  return linear_probe_lib.hidden_states(
    hidden_fn,
    base,
    examples,
    batch_size=run.config.eval.batch_size,
    pad=run.model.pad,
  )


def _write(
  run: run_lib.Run,
  workdir: str,
  name: str,
  result: scoring.Result,
  figures: dict[str, Any],
) -> dict[str, Any]:
  """Writes a mode's figures and predictions, and prints the figures."""
  outcome = {
    "task": run.task.name,
    "model": run.config.model.name,
    "mode": name,
    "num_test_rows": len(result.examples),
    **figures,
  }
  folder = epath.Path(workdir)
  report.write_json(folder / f"{name}.json", outcome)
  report.write_lines(folder / f"{name}.jsonl", result.to_records())
  plain = {k: v for k, v in outcome.items() if k != "sets"}
  report.results_table([plain], title=f"{folder}")
  return outcome
