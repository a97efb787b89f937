"""Adaptation: new tasks from a few rows each, on a meta-trained backbone.

First-order steps on an adapter for every (target task, seed), all of them one
batched program, on each of several backbones.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from zofo_jax import (
  backbone,
  batches,
  data,
  encode,
  errors,
  evaluate,
  experiment,
  families,
  inner,
  metatrain,
  report,
  rows,
  runs,
)
from zofo_jax import mesh as mesh_lib
from zofo_jax import progress as progress_lib


class Target(NamedTuple):
  """A new task.

  Attributes:
    member: the task.
    shots: the few rows of each seed.
    test: rows to be answered.
  """

  member: families.Member
  shots: list[list[encode.Example]]
  test: list[encode.Example]


def load_targets(
  config: ml_collections.ConfigDict,
  model: backbone.Model,
  members: Sequence[families.Member],
) -> list[Target]:
  """Draws and encodes the few rows and the test rows of every task.

  Raises:
    UserError: names the file and row that is wrong, or the rows are too few.
  """
  targets = []
  for member in members:
    splits = families.load_rows(config, member)

    def encoded(found, mode, member=member):
      return encode.encode_rows(
        member.task,
        found,
        model.tokenizer,
        mode,
        max_length=experiment.row_length(config, model),
        version=config.data.template,
        long_rows="truncate",
      )

    pool = [*splits.lower, *splits.upper]
    shots = [
      encoded(_few(config, member, pool, seed), config.loss)
      for seed in range(config.adapt.num_seeds)
    ]
    test = encoded(splits.test, "classification")
    targets.append(Target(member, shots, test))
  return targets


def _few(
  config: ml_collections.ConfigDict,
  member: families.Member,
  pool: list[rows.Row],
  seed: int,
) -> list[rows.Row]:
  """Draws the rows of a seed: of each label, or in all where options vary."""
  task, count = member.task, config.adapt.shots
  if task.kind == "classification":
    return data.k_shot(task, pool, count, seed)
  if len(pool) < count:
    raise errors.UserError(
      f"Task {task.name}: {count} rows were asked for (adapt.shots); there are "
      f"{len(pool)} to draw from."
    )
  order = np.random.RandomState(seed).permutation(len(pool))
  return [pool[i] for i in order[:count]]


class Backbone(NamedTuple):
  """A backbone to adapt, and what adapters start from.

  Attributes:
    name: of the run, or "base".
    base: its weights.
    start: an adapter; {} for fresh ones.
  """

  name: str
  base: Any
  start: Any


def _stack(trees: Sequence[Any]) -> Any:
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _starts(run: runs.Run, found: Backbone, num_targets: int) -> Any:
  """Returns adapters to start from, leaves [targets * seeds, ...]."""
  config, key = run.config, jax.random.key(run.config.seed)
  each = [
    found.start
    or backbone.init_adapter(
      config, run.model, jax.random.fold_in(key, seed), found.base
    )
    for seed in range(config.adapt.num_seeds)
  ]
  return _stack(each * num_targets)


def tune(run: runs.Run, found: Backbone, targets: Sequence[Target]) -> Any:
  """Tunes an adapter for every target and seed, all at once.

  Args:
    run: gives the model, the loss and `config.adapt`.
    found: the backbone, and what to start from.
    targets: the tasks, all with as many seeds.

  Returns:
    Adapters, leaves [targets, seeds, ...].
  """
  config, pad = run.config, run.model.pad
  options = config.adapt
  tx = runs.make_optimizer(options.optimizer, options.learning_rate)
  loss_fn = backbone.make_loss_fn(config.loss, run.model.module)
  few = [shots for target in targets for shots in target.shots]
  shape = batches.shape_of([e for shots in few for e in shots], multiple=8)

  def one(base, adapter, opt_state, batch, key):
    return inner.minimize(loss_fn, base, adapter, opt_state, batch, key, tx=tx)

  # The backbone has no axis: its products serve every target and seed.
  step = jax.jit(jax.vmap(one, (None, 0, 0, 0, None)), donate_argnums=(1, 2))
  tuned = _starts(run, found, len(targets))
  opt_state = jax.vmap(tx.init)(tuned)
  key = jax.random.key(config.seed)
  with progress_lib.Progress(options.num_steps, f"tune {found.name}") as bar:
    for number in range(options.num_steps):
      each = []
      for shots in few:
        size = min(options.batch_size, len(shots))
        chosen = batches.batch_indices(config.seed, len(shots), size, number)
        batch = batches.collate(
          [shots[i] for i in chosen],
          shape,
          pad=pad,
          batch_size=options.batch_size,
        )
        each.append(jax.tree.map(lambda leaf: leaf[None], batch))
      tuned, opt_state, losses = step(
        found.base,
        tuned,
        opt_state,
        jax.tree.map(lambda *leaves: np.stack(leaves), *each),
        jax.random.fold_in(key, number),
      )
      if (number + 1) % 10 == 0 or number + 1 == options.num_steps:
        bar.update(number + 1, loss=float(losses.mean()))
  seeds = options.num_seeds
  return jax.tree.map(
    lambda leaf: leaf.reshape(len(targets), seeds, *leaf.shape[1:]), tuned
  )


def assess(
  run: runs.Run, found: Backbone, targets: Sequence[Target]
) -> list[dict[str, Any]]:
  """Answers the targets' test rows before and after tuning.

  Args:
    run: gives the model and `config`.
    found: the backbone.
    targets: the tasks.

  Returns:
    For each target its metric, the score of the bare backbone (`zero_shot`),
    of the adapter that is tuned if there is one (`start`), and of each seed.
  """
  adapters = tune(run, found, targets)
  shape = families.common_shape([batches.shape_of(t.test) for t in targets])
  # All seeds of a target answer its rows together: scores [B, O, seeds].
  log_probs_fn = backbone.make_log_probs_fn(run.model.module)
  score_fn = mesh_lib.on_rows(
    jax.vmap(evaluate.make_score_fn(log_probs_fn), (None, 0, None), -1),
    run.mesh,
    2,
  )

  def worth(target, scores):
    task = target.member.task
    judged = run._replace(task=task).judge(target.test, scores)
    return judged.worth()[task.metric]

  def answer(target, adapter, fn, label):
    return evaluate.score_options(
      fn,
      found.base,
      adapter,
      target.test,
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
      "num_test_rows": len(target.test),
      "zero_shot": worth(target, answer(target, {}, run.score_fn, "zero-shot")),
    }
    if found.start:
      scores = answer(target, found.start, run.score_fn, "start")
      row["start"] = worth(target, scores)
    own = jax.tree.map(lambda leaf, i=i: leaf[i], adapters)
    scores = answer(target, own, score_fn, "few-shot")
    row["few_shot"] = [
      worth(target, scores[..., seed])
      for seed in range(run.config.adapt.num_seeds)
    ]
    outcome.append(row)
  return outcome


def _backbones(config: ml_collections.ConfigDict, run: runs.Run):
  """Yields one backbone at a time, the bare model first."""
  yield Backbone("base", backbone.load_base(config, run.model, run.mesh), {})
  for folder in config.adapt.runs:
    family, state = metatrain.load(folder)
    start = {}
    if config.adapt.start == "mean":
      start = family.mean_adapter(state)
    yield Backbone(epath.Path(folder).name, state.base, start)
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
    theirs = runs.read_config(epath.Path(folder))
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

  Writes `adapt.json` and prints (target, backbone) x {zero-shot, few-shot}.

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
  members = families.members(config, names, "target", field)
  _check_runs(config)
  for folder in config.adapt.runs:
    known = runs.read_config(epath.Path(folder))
    trained = families.members(known, known.meta.train, "train", "meta.train")
    families.check_held_out(trained, members)
  run = runs.make_run(config, members[0].task)
  targets = load_targets(config, run.model, members)
  outcome: list[dict[str, Any]] = []
  for found in _backbones(config, run):
    outcome += assess(run, found, targets)
  result = {
    "model": config.model.name,
    "runs": list(config.adapt.runs),
    "start": config.adapt.start,
    "shots": config.adapt.shots,
    "num_seeds": config.adapt.num_seeds,
    "outcome": outcome,
  }
  folder = epath.Path(workdir)
  report.write_json(folder / "adapt.json", result)
  report.results_table(
    table(outcome), title=f"{config.adapt.shots} rows a label, {folder}"
  )
  return result


def table(outcome: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Returns rows (target, backbone) to print, and the means over targets.

  Args:
    outcome: as `assess` gives it, of every backbone.

  Returns:
    Rows by target; few-shot is the mean over seeds, with its standard
    deviation.
  """
  rows = [
    {
      "task": one["task"],
      "backbone": one["backbone"],
      "zero-shot": one["zero_shot"],
      "few-shot": float(np.mean(one["few_shot"])),
      "±": float(np.std(one["few_shot"])),
    }
    for one in outcome
  ]
  names = list(dict.fromkeys(row["task"] for row in rows))
  rows.sort(key=lambda row: names.index(row["task"]))
  for name in dict.fromkeys(row["backbone"] for row in rows):
    own = [row for row in rows if row["backbone"] == name]
    means = {
      column: float(np.mean([row[column] for row in own]))
      for column in ("zero-shot", "few-shot")
    }
    rows.append({"task": "mean", "backbone": name, **means})
  return rows
