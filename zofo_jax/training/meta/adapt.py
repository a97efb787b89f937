"""Adaptation: new tasks from a few rows each, on meta-trained backbones.

The same rows train an adapter (few-shot) and, up to `icl.num_shots` of them,
are shown to the backbone before a question (in context; nothing is trained).
"""

import statistics
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from zofo_jax import errors, report, tasks
from zofo_jax.builders import data, demonstrations, model
from zofo_jax.builders import run as run_lib
from zofo_jax.data import batching, encode_options
from zofo_jax.evaluation import in_context as in_context_lib
from zofo_jax.evaluation import scoring
from zofo_jax.models import apply
from zofo_jax.sharding import dispatch
from zofo_jax.training.meta import few_shot, multitask_run, task_sets


def assess(
  run: run_lib.Run, found: few_shot.Backbone, targets: Sequence[few_shot.Target]
) -> list[dict[str, Any]]:
  """Answers the targets' test rows before and after tuning.

  Args:
    run: gives the model and `config`.
    found: the backbone.
    targets: the tasks.

  Returns:
    For each target its metric; the score of the bare backbone (`zero_shot`),
    of the bare backbone that is shown each seed's rows (`in_context`), of the
    adapter that is tuned if there is one (`start`), and of each seed's tuned
    adapter (`few_shot`).
  """
  adapters = few_shot.tune(run, found, targets)
  base, seeds = found.base, range(run.config.adapt.num_seeds)
  shape = task_sets.common_shape(
    [batching.shape_of(t.query_examples) for t in targets]
  )
  # All seeds of a target answer its rows together: scores [B, O, seeds].
  log_probs_fn = apply.make_log_probs_fn(run.model.module)
  score_fn = dispatch.jit_on_batches(
    jax.vmap(scoring.make_score_fn(log_probs_fn), (None, 0, None), -1),
    run.mesh,
    2,
  )

  def score(target, scores):
    task = target.member.task
    judged = run._replace(task=task).score_predictions(
      target.query_examples, scores
    )
    return judged.metrics()[task.metric]

  def in_context(target, seed):
    own, icl = run._replace(task=target.member.task), run.config.icl
    few = target.support_rows[seed]
    count = min(len(few), icl.num_shots)
    examples = demonstrations.encode_shown(
      own,
      in_context_lib.draw(own.task, few, count, seed, balanced=icl.balanced),
      target.query_rows,
      [
        _as_cut(own, row, example)
        for row, example in zip(
          target.query_rows, target.query_examples, strict=True
        )
      ],
      # All that the model can read: `data.max_length` is for one row.
      max_length=data.context_length(run.config, run.model),
    )
    label = f"in context {own.task.name}"
    found = demonstrations.answer(own, base, examples, label)
    return found.metrics()[own.task.metric]

  def answer(target, adapter, fn, label):
    return scoring.score_options(
      fn,
      base,
      adapter,
      target.query_examples,
      batch_size=run.config.eval.batch_size,
      pad=run.model.pad,
      label=f"{label} {target.member.task.name}",
      shape=shape,
    )

  outcome = []
  for i, target in enumerate(targets):
    row: dict[str, Any] = {
      "backbone": found.name,
      "task": target.member.task.name,
      "metric": target.member.task.metric,
      "num_test_rows": len(target.query_examples),
      "zero_shot": score(target, answer(target, {}, run.score_fn, "zero-shot")),
      "in_context": [in_context(target, seed) for seed in seeds],
    }
    if found.start:
      scores = answer(target, found.start, run.score_fn, "start")
      row["start"] = score(target, scores)
    own = jax.tree.map(lambda leaf, i=i: leaf[i], adapters)
    scores = answer(target, own, score_fn, "few-shot")
    row["few_shot"] = [score(target, scores[..., seed]) for seed in seeds]
    outcome.append(row)
  return outcome


def _as_cut(
  run: run_lib.Run, row: tasks.Row, example: encode_options.Example
) -> str:
  """Returns a row's prompt as it was cut to `data.max_length`, if it was."""
  prompt = run.task.prompt(row, run.config.data.template)
  first = example.rows[0]
  kept = run.model.tokenizer.decode(
    first.tokens[: min(first.positions) + 1],
    skip_special_tokens=True,
    clean_up_tokenization_spaces=False,
  )
  return kept if prompt.endswith(kept) else prompt


def _backbones(config: ml_collections.ConfigDict, run: run_lib.Run):
  """Yields one backbone at a time, the bare model first."""
  base = model.load_base(config, run.model, run.mesh)
  yield few_shot.Backbone("base", base, {})
  del base
  for folder in config.adapt.runs:
    family, state = multitask_run.load(folder)
    start = {}
    if config.adapt.start == "mean":
      start = family.mean_adapter(state)
    yield few_shot.Backbone(epath.Path(folder).name, state.base, start)
    del state


def _check_runs(config: ml_collections.ConfigDict) -> None:
  """Stops on a run that is not of this model and adapter, or that knows it all.

  Raises:
    UserError: names the field and the run.
  """
  for folder in config.adapt.runs:
    if not (epath.Path(folder) / "config.json").exists():
      raise errors.UserError(
        f"config.adapt.runs: {folder} holds no run; expected a folder with "
        "config.json."
      )
    theirs = run_lib.read_config(epath.Path(folder))
    if theirs.command != "metatrain":
      raise errors.UserError(
        f"config.adapt.runs: {folder} is a run of '{theirs.command}'; expected "
        "one of 'metatrain'."
      )
    fields = ["model.name", "model.dtype"]
    if config.adapt.start == "mean":
      fields += ["adapter.kind", "lora.rank", "prefix.length", "prompt.length"]
    for field in fields:
      section, name = field.split(".")
      ours = config[section][name]
      if theirs[section][name] != ours:
        raise errors.UserError(
          f"config.{field}: expected that of the run {folder}, "
          f"{theirs[section][name]!r}; found {ours!r}."
        )


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
  field = "adapt.tasks" if config.adapt.tasks else "meta.target"
  names = config.adapt.tasks or config.meta.target
  members = task_sets.resolve_tasks(config, names, "target", field)
  _check_runs(config)
  for folder in config.adapt.runs:
    known = run_lib.read_config(epath.Path(folder))
    trained = task_sets.resolve_tasks(
      known, known.meta.train, "train", "meta.train"
    )
    task_sets.check_held_out(trained, members)
  run = run_lib.make_run(config, members[0].task)
  targets = few_shot.load_targets(config, run.model, members)
  folder = epath.Path(workdir)
  result: dict[str, Any] = {
    "model": config.model.name,
    "runs": list(config.adapt.runs),
    "start": config.adapt.start,
    "shots": config.adapt.shots,
    "num_seeds": config.adapt.num_seeds,
    "outcome": [],
  }
  for found in _backbones(config, run):
    result["outcome"] += assess(run, found, targets)
    # After each: what is known outlives a run that is stopped.
    report.write_json(folder / "adapt.json", result)
    del found  # one backbone at a time
  report.results_table(
    table(result["outcome"]),
    title=f"{config.adapt.shots} rows a label, {folder}",
  )
  return result


def table(outcome: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Returns rows (target, backbone) to print, and the means over targets.

  Args:
    outcome: as `assess` gives it, of every backbone.

  Returns:
    Rows by target; start is what is tuned, where a run gives it; in-context
    and few-shot are means over seeds, the latter with their standard deviation
    where there are several.
  """
  rows = [
    {
      "task": one["task"],
      "backbone": one["backbone"],
      "zero-shot": one["zero_shot"],
      "in-context": float(np.mean(one["in_context"])),
      **({"start": one["start"]} if "start" in one else {}),
      "few-shot": float(np.mean(one["few_shot"])),
    }
    for one in outcome
  ]
  for row, one in zip(rows, outcome, strict=True):
    if len(one["few_shot"]) > 1:
      row["±"] = statistics.stdev(one["few_shot"])
  names = list(dict.fromkeys(row["task"] for row in rows))
  rows.sort(key=lambda row: names.index(row["task"]))
  for name in dict.fromkeys(row["backbone"] for row in rows):
    own = [row for row in rows if row["backbone"] == name]
    means: dict[str, float] = {
      column: float(np.mean([row[column] for row in own]))
      for column in ("zero-shot", "in-context", "start", "few-shot")
      if column in own[0]
    }
    rows.append({"task": "mean", "backbone": name, **means})
  return rows
