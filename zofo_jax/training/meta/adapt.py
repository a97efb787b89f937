"""Adaptation: new tasks from a few rows each, on meta-trained backbones.

The same rows train an adapter (few-shot) and, up to `icl.num_shots` of them,
are demonstrations before a query (in context; nothing is trained).
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath

from zofo_jax import errors, report, tasks
from zofo_jax.builders import demonstrations as demonstrations_lib
from zofo_jax.builders import encoder as encoder_lib
from zofo_jax.builders import model, optimizers
from zofo_jax.builders import run as run_lib
from zofo_jax.checkpoints import inputs, lock, state_store
from zofo_jax.config import defaults
from zofo_jax.core.types import BilevelState
from zofo_jax.data import batching, encode_options
from zofo_jax.evaluation import in_context as in_context_lib
from zofo_jax.evaluation import scoring
from zofo_jax.models import apply
from zofo_jax.sharding import dispatch
from zofo_jax.training.meta import few_shot, multitask_run, task_sets
from zofo_jax.training.meta import train as meta_train


class Demonstrations(NamedTuple):
  """How support rows are used in context, as in `config.icl`.

  Attributes:
    num_shots: at most so many of a seed's rows come before a query.
    balanced: whether there are as many of each label.
    separator: text after each.
  """

  num_shots: int
  balanced: bool
  separator: str


def assess(
  run: run_lib.Run,
  backbone: few_shot.Backbone,
  targets: Sequence[few_shot.Target],
  adapters: Any,
  demonstrations: Demonstrations,
) -> list[dict[str, Any]]:
  """Scores the targets' test rows before and after tuning.

  Args:
    run: gives the model and the sizes of batches.
    backbone: the backbone.
    targets: the tasks.
    adapters: tuned on this backbone; see `few_shot.tune`.
    demonstrations: how support rows are used in context.

  Returns:
    For each target its metric; the score of the bare backbone (`zero_shot`),
    of the bare backbone with each seed's rows in context (`in_context`), of the
    adapter that was tuned if there is one (`start`), and of each seed's tuned
    adapter (`few_shot`).
  """
  base = backbone.base
  num_seeds = len(targets[0].support_rows)
  shape = task_sets.common_shape(
    [batching.shape_of(t.query_examples) for t in targets]
  )
  # All seeds of a target score its rows at once: scores [B, O, seeds].
  log_probs_fn = apply.make_log_probs_fn(run.model.module)
  score_fn = dispatch.jit_on_batches(
    jax.vmap(scoring.make_score_fn(log_probs_fn), (None, 0, None), -1),
    run.mesh,
    2,
  )

  def metric(target, scores):
    task = target.source.task
    predictions = run._replace(task=task).score_predictions(
      target.query_examples, scores
    )
    return predictions.metrics()[task.metric]

  def in_context(target, seed):
    task = target.source.task
    of_task = run._replace(task=task)
    support = target.support_rows[seed]
    examples = demonstrations_lib.encode(
      task,
      run.encoder,
      in_context_lib.draw(
        task,
        support,
        min(len(support), demonstrations.num_shots),
        seed,
        balanced=demonstrations.balanced,
      ),
      target.query_rows,
      [
        _truncated_prompt(task, run.encoder, row, example)
        for row, example in zip(
          target.query_rows, target.query_examples, strict=True
        )
      ],
      separator=demonstrations.separator,
      # All that the model can read: `data.max_length` is for one row.
      max_length=run.encoder.context_length,
    )
    label = f"in context {task.name}"
    result = demonstrations_lib.answer(of_task, base, examples, label)
    return result.metrics()[task.metric]

  def score(target, adapter, fn, label):
    return scoring.score_options(
      fn,
      base,
      adapter,
      target.query_examples,
      batch_size=run.batch_sizes.eval,
      pad=run.model.pad,
      label=f"{label} {target.source.task.name}",
      shape=shape,
    )

  outcome = []
  for i, target in enumerate(targets):
    zero_shot = score(target, {}, run.score_fn, "zero-shot")
    row: dict[str, Any] = {
      "backbone": backbone.name,
      "task": target.source.task.name,
      "metric": target.source.task.metric,
      "num_test_rows": len(target.query_examples),
      "zero_shot": metric(target, zero_shot),
      "in_context": [in_context(target, seed) for seed in range(num_seeds)],
    }
    if backbone.start:
      scores = score(target, backbone.start, run.score_fn, "start")
      row["start"] = metric(target, scores)
    tuned = jax.tree.map(lambda leaf, i=i: leaf[i], adapters)
    scores = score(target, tuned, score_fn, "few-shot")
    row["few_shot"] = [
      metric(target, scores[..., seed]) for seed in range(num_seeds)
    ]
    outcome.append(row)
  return outcome


def _truncated_prompt(
  task: tasks.Task,
  encoder: encoder_lib.Encoder,
  row: tasks.Row,
  example: encode_options.Example,
) -> str:
  """Returns a row's prompt, as it was truncated to `data.max_length` if so."""
  prompt = task.prompt(row, encoder.version)
  first = example.rows[0]
  truncated = encoder.tokenizer.decode(
    first.tokens[: min(first.positions) + 1],
    skip_special_tokens=True,
    clean_up_tokenization_spaces=False,
  )
  return truncated if prompt.endswith(truncated) else prompt


def load_run(
  workdir: str,
) -> tuple[multitask_run.MultitaskRun, BilevelState]:
  """Reads a meta-trained run's config and its best checkpoint.

  Raises:
    UserError: there is no such run.
  """
  folder = epath.Path(workdir)
  run = meta_train.make_run(run_lib.read_config(folder))
  with state_store.open_store(
    run.run, folder, abstract_state=run.abstract_state
  ) as store:
    state, _ = store.best()
  return run, state


def _backbones(
  run: run_lib.Run, folders: Sequence[str], start: str
) -> Iterator[few_shot.Backbone]:
  """Yields one backbone at a time, the bare model first."""
  base = model.load_base(run.model, run.mesh)
  yield few_shot.Backbone("base", base, {})
  del base
  for folder in folders:
    trained, state = load_run(folder)
    adapter = trained.mean_adapter(state) if start == "mean" else {}
    yield few_shot.Backbone(epath.Path(folder).name, state.base, adapter)
    del state


def _check_runs(folders: Sequence[str], fields: Mapping[str, Any]) -> None:
  """Checks that runs are meta-trained ones of this model and adapter.

  Args:
    folders: of the runs.
    fields: what their configs must say, {"model.name": ..., ...}.

  Raises:
    UserError: names the field and the run.
  """
  for folder in folders:
    if not (epath.Path(folder) / "config.json").exists():
      raise errors.UserError(
        f"config.adapt.runs: {folder} holds no run; expected a folder with "
        "config.json."
      )
    trained = run_lib.read_config(epath.Path(folder))
    if trained.command != "metatrain":
      raise errors.UserError(
        f"config.adapt.runs: {folder} is a run of '{trained.command}'; "
        "expected one of 'metatrain'."
      )
    trained_fields = defaults.flat(trained)
    for name, actual in fields.items():
      expected = trained_fields[name]
      if expected != actual:
        raise errors.UserError(
          f"config.{name}: expected that of the run {folder}, "
          f"{expected!r}; found {actual!r}."
        )


@lock.locked
def adapt(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
  """Tunes adapters on target tasks' few rows, on each backbone.

  Writes `adapt.json` and prints (target, backbone) x {zero-shot, in-context,
  few-shot}.

  Args:
    config: `config.adapt` is this command's; without tasks there, the targets
      are those of `config.meta.target`.
    workdir: folder to write into; local or gs://.

  Returns:
    What is in `adapt.json`.

  Raises:
    UserError: something in the config or the files is wrong.
  """
  options, icl = config.adapt, config.icl
  field = "adapt.tasks" if options.tasks else "meta.target"
  sources = task_sets.resolve_tasks(
    options.tasks or config.meta.target,
    "target",
    field,
    folder=config.data.dir,
    metaicl=config.meta.metaicl,
  )
  same = ["model.name", "model.dtype"]
  if options.start == "mean":
    same += ["adapter.kind", "lora.rank", "prefix.length", "prompt.length"]
  fields = defaults.flat(config)
  _check_runs(options.runs, {name: fields[name] for name in same})
  for folder in options.runs:
    trained = run_lib.read_config(epath.Path(folder))
    trained_sources = task_sets.resolve_tasks(
      trained.meta.train,
      "train",
      "meta.train",
      folder=trained.data.dir,
      metaicl=trained.meta.metaicl,
    )
    task_sets.check_held_out(trained_sources, sources)
  run = run_lib.make_run(config, sources[0].task)
  for folder in options.runs:
    inputs.check(run, epath.Path(folder))
  targets = few_shot.load_targets(
    sources,
    run.row_source,
    run.encoder,
    shots=options.shots,
    num_seeds=options.num_seeds,
  )
  run.write_dropped(epath.Path(workdir))
  path = epath.Path(workdir) / "adapt.json"
  result: dict[str, Any] = {
    "model": config.model.name,
    "runs": list(options.runs),
    "start": options.start,
    "shots": options.shots,
    "num_seeds": options.num_seeds,
    "outcome": [],
  }
  for backbone in _backbones(run, options.runs, options.start):
    adapters = few_shot.tune(
      run,
      backbone,
      targets,
      tx=optimizers.make_optimizer(options.optimizer, options.learning_rate),
      num_steps=options.num_steps,
      batch_size=options.batch_size,
    )
    result["outcome"] += assess(
      run,
      backbone,
      targets,
      adapters,
      Demonstrations(icl.num_shots, icl.balanced, icl.separator),
    )
    # After each backbone, so that a run that is stopped leaves these results.
    report.write_json(path, result)
    del backbone, adapters  # one backbone at a time
  report.results_table(
    table(result["outcome"]), title=f"{options.shots} rows a label, {workdir}"
  )
  return result


def table(outcome: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Returns a table of (target, backbone), and the means over targets.

  Args:
    outcome: of every backbone; see `assess`.

  Returns:
    Rows by target. "start" is the adapter before tuning, if a run gives one;
    "in-context" and "few-shot" are means over seeds, the latter with the
    standard deviation of several.
  """
  rows = [
    {
      "task": scores["task"],
      "backbone": scores["backbone"],
      "zero-shot": scores["zero_shot"],
      "in-context": float(np.mean(scores["in_context"])),
      **({"start": scores["start"]} if "start" in scores else {}),
      "few-shot": float(np.mean(scores["few_shot"])),
    }
    for scores in outcome
  ]
  for row, scores in zip(rows, outcome, strict=True):
    if len(scores["few_shot"]) > 1:
      row["±"] = statistics.stdev(scores["few_shot"])
  names = list(dict.fromkeys(row["task"] for row in rows))
  rows.sort(key=lambda row: names.index(row["task"]))
  for name in dict.fromkeys(row["backbone"] for row in rows):
    of_name = [row for row in rows if row["backbone"] == name]
    means: dict[str, float] = {
      column: float(np.mean([row[column] for row in of_name]))
      for column in ("zero-shot", "in-context", "start", "few-shot")
      if column in of_name[0]
    }
    rows.append({"task": "mean", "backbone": name, **means})
  return rows
