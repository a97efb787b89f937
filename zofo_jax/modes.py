"""What a backbone does on a task without Bilevel-ZOFO, for comparison.

In-context learning (zero-shot without demonstrations), a linear probe, and a
new head. Each reads the config of a run, answers the same test rows, and may
learn from the rows of D_p and D_f together.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from zofo_jax import (
  batches,
  calibrate,
  encode,
  errors,
  evaluate,
  experiment,
  incontext,
  losses,
  metrics,
  probe,
  report,
  rows,
  runs,
)
from zofo_jax import progress as progress_lib


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
  run = runs.make_run(config)
  splits = experiment.load_rows(config, run.task)
  pool = [*splits.lower, *splits.upper]
  encoded = [
    _icl_examples(run, pool, splits.test, config.data.seed + number)
    for number in range(config.icl.num_sets if config.icl.num_shots else 1)
  ]
  base = experiment.load_base(config, run.model)
  results = []
  for examples, nulls in encoded:
    scores = _score(run, base, examples, "icl")
    results.append((examples, _calibrated(run, base, examples, nulls, scores)))
  sets = [_worth(run, examples, scores) for examples, scores in results]
  worth = sets[0]
  if len(sets) > 1:
    names = ("accuracy", run.task.metric)
    worth = {
      **{name: float(np.mean([one[name] for one in sets])) for name in names},
      **{f"worst_{n}": float(min(one[n] for one in sets)) for n in names},
      "sets": sets,
    }
  return _write(
    run,
    epath.Path(workdir),
    "icl",
    {
      "num_shots": config.icl.num_shots,
      "calibration": config.icl.calibration,
      **worth,
    },
    *results[0],
  )


def _icl_examples(
  run: runs.Run, pool: list[rows.Row], asked: list[rows.Row], seed: int
) -> tuple[list[encode.Example], list[list[encode.Example]]]:
  """Encodes the test rows, and the same without content for calibration."""
  config, task, version = run.config, run.task, run.config.data.template
  shown = incontext.draw(
    task, pool, config.icl.num_shots, seed, balanced=config.icl.balanced
  )

  def encoded(prompts=None):
    return incontext.encode_rows(
      task,
      asked,
      [incontext.demonstration(task, row, version) for row in shown],
      run.model.tokenizer,
      max_length=experiment.row_length(config, run.model),
      version=version,
      separator=config.icl.separator,
      truncate=config.data.long_rows == "truncate",
      prompts=prompts,
    )

  nulls = [
    encoded(
      [calibrate.null_prompt(task, row, content, version) for row in asked]
    )
    for content in calibrate.INPUTS.get(config.icl.calibration, ())
  ]
  return encoded(), nulls


def _calibrated(run, base, examples, nulls, scores):
  """Takes off what questions without content score, if so configured."""
  if not nulls:
    return scores
  # Where the options are fixed all rows without content are one and the same.
  null_scores = []
  for one in nulls:
    distinct = list({example.rows: example for example in one}.values())
    place = {example.rows: i for i, example in enumerate(distinct)}
    found = _score(run, base, distinct, "calibrate")
    null_scores.append(found[[place[example.rows] for example in one]])
  if run.config.icl.calibration == "contextual":
    return calibrate.contextual(scores, np.stack(null_scores))
  counts = calibrate.lengths(examples)
  return calibrate.domain(scores, np.stack(null_scores), counts)


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
  run = runs.make_run(config)
  if run.task.kind != "classification":
    raise errors.UserError(
      f"config.data.task: a linear probe needs the same options for every "
      f"row; task {run.task.name} is {run.task.kind}."
    )
  examples = experiment.load_examples(config, run.model, run.task)
  known = [*examples.lower, *examples.upper]
  labels = [example.label for example in known]
  if len(set(labels)) < 2:
    raise errors.UserError(
      f"Task {run.task.name}: a linear probe needs rows of two labels at "
      f"least; all {len(known)} have label {labels[0]}."
    )
  base = experiment.load_base(config, run.model)
  hidden_fn = jax.jit(probe.make_hidden_fn(run.model.module))

  def features(some):
    # The first position of the first row is the last token of the prompt.
    return _hidden(run, hidden_fn, base, some)[:, 0, 0]

  score = probe.fit_logistic(
    features(known),
    labels,
    c=config.probe.c,
    num_options=len(examples.test[0].options),
  )
  scores = score(features(examples.test))
  worth = _worth(run, examples.test, scores)
  return _write(run, epath.Path(workdir), "probe", worth, examples.test, scores)


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
    UserError: something in the config or the files is wrong.
  """
  run = runs.make_run(config)
  examples = experiment.load_examples(config, run.model, run.task)
  known = [*examples.lower, *examples.upper]
  base = experiment.load_base(config, run.model)
  module = run.model.module
  hidden_fn = jax.jit(probe.make_hidden_fn(module))
  hidden = _hidden(run, hidden_fn, base, known)
  table = probe.head_table(module, base)
  tokens = None if config.head.rows == "all" else probe.label_tokens(known)
  trained = _train_head(run, table, tokens, known, hidden)
  untied, base = probe.untie(
    module, base, probe.put_rows(table, tokens, trained)
  )
  score_fn = jax.jit(
    evaluate.make_score_fn(experiment.make_log_probs_fn(untied))
  )
  scores = _score(run, base, examples.test, "test", score_fn)
  worth = _worth(run, examples.test, scores)
  return _write(run, epath.Path(workdir), "head", worth, examples.test, scores)


def _train_head(run, table, tokens, known, hidden):
  """Takes the steps of `config.head`; returns the rows, float32."""
  config = run.config
  loss_fn = {
    "likelihood": losses.likelihood,
    "classification": losses.classification,
  }[config.loss]
  tx = runs.make_optimizer("adam", config.head.learning_rate)
  table = jnp.asarray(table, jnp.float32)
  trained = table if tokens is None else table[tokens]
  opt_state = tx.init(trained)
  step_fn = jax.jit(
    probe.make_head_step(loss_fn, tx, tokens), donate_argnums=(0, 1)
  )
  if tokens is None:
    # Donated and read in one call: two arrays.
    trained = jnp.array(trained, copy=True)
  shape = batches.shape_of(known)
  total = config.head.num_steps
  with progress_lib.Progress(total, "head") as progress:
    for step in range(total):
      chosen = batches.batch_indices(
        config.seed, len(known), config.head.batch_size, step
      )
      batch = batches.collate(
        [known[i] for i in chosen], shape, pad=run.model.pad
      )
      trained, opt_state, loss = step_fn(
        trained, opt_state, table, hidden[chosen], batch
      )
      if (step + 1) % 20 == 0 or step + 1 == total:
        progress.update(step + 1, loss=float(loss))
  return trained


def _hidden(run, hidden_fn, base, examples):
  return probe.hidden_states(
    hidden_fn,
    base,
    examples,
    batch_size=run.config.eval.batch_size,
    pad=run.model.pad,
  )


def _score(run, base, examples, label, score_fn=None):
  return evaluate.score_options(
    score_fn or run.score_fn,
    base,
    {},
    examples,
    batch_size=run.config.eval.batch_size,
    pad=run.model.pad,
    label=label,
  )


def _worth(
  run: runs.Run, examples: list[encode.Example], scores: np.ndarray
) -> dict[str, Any]:
  """Returns accuracy and the task's metric with their intervals."""
  predictions = scores.argmax(axis=-1).tolist()
  right = metrics.credit(predictions, [example.right for example in examples])
  worth: dict[str, Any] = {}
  for name in dict.fromkeys(("accuracy", run.task.metric)):
    metric = metrics.METRICS[name]
    worth[name] = metric(predictions, right)
    worth[f"{name}_interval"] = metrics.bootstrap_interval(
      metric, predictions, right
    )
  return worth


def _write(run, folder, name, worth, examples, scores) -> dict[str, Any]:
  """Writes a mode's figures and predictions, and prints the figures."""
  outcome = {
    "task": run.task.name,
    "model": run.config.model.name,
    "mode": name,
    "num_test_rows": len(examples),
    **worth,
  }
  folder.mkdir(parents=True, exist_ok=True)
  report.write_json(folder / f"{name}.json", outcome)
  lines = [
    json.dumps(
      {
        "where": example.where,
        "prediction": int(one.argmax()),
        "right": list(example.right),
        "scores": [float(value) for value in one[: len(example.options)]],
      }
    )
    for example, one in zip(examples, scores, strict=True)
  ]
  (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
  plain = {k: v for k, v in outcome.items() if k != "sets"}
  report.results_table([plain], title=f"{folder}")
  return outcome
