"""Meta-training: the adapters of many tasks, and a backbone that they share."""

from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from zofo_jax import errors, report
from zofo_jax.builders import algorithm, data, model
from zofo_jax.builders import run as run_lib
from zofo_jax.checkpoints import inputs, lock, run_folder, state_store
from zofo_jax.config import defaults
from zofo_jax.core import multitask
from zofo_jax.evaluation import objectives
from zofo_jax.sharding import dispatch
from zofo_jax.training import fit, summary
from zofo_jax.training import train as train_lib
from zofo_jax.training.meta import multitask_run, task_sets


class _TaskSampler:
  """The tasks and batches of each iteration, a function of its number."""

  def __init__(
    self, family: multitask_run.MultitaskRun, examples: list[data.Examples]
  ):
    self._family, self._examples = family, examples
    self._sizes = [len(rows.lower) + len(rows.upper) for rows in examples]
    self.shape = task_sets.common_shape(list(map(data.train_shape, examples)))

  def tasks(self, step: int) -> np.ndarray:
    """Returns the indices of the tasks that take part in a step."""
    config = self._family.config
    return multitask.sample_tasks(
      config.seed,
      step,
      self._sizes,
      config.meta.num_tasks,
      power=config.meta.size_power,
    )

  def batch(self, step: int) -> Any:
    """Returns the tasks' batches, stacked and on the mesh."""
    config, pad = self._family.config, self._family.run.model.pad
    tasks = self.tasks(step)
    batches = [
      train_lib.iteration_batch(
        config, self._examples[i], self.shape, pad, step
      )
      for i in tasks
    ]
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    batch = self._family.run.shard_batch(batch, axis=1)
    power = config.meta.weight_power
    if power:
      weights = np.asarray(self._sizes, np.float32)[tasks] ** power
      batch = batch._replace(weights=weights.astype(np.float32))
    return batch


def make_run(config: ml_collections.ConfigDict) -> multitask_run.MultitaskRun:
  """Checks a config and makes everything that needs no rows or weights.

  Raises:
    UserError: a task is unknown or cannot be trained on, or the config or the
      files are wrong.
  """
  meta = config.meta
  files = {"folder": config.data.dir, "metaicl": meta.metaicl}
  sources = task_sets.resolve_tasks(meta.train, "train", "meta.train", **files)
  if meta.num_tasks > len(sources):
    raise errors.UserError(
      f"config.meta.num_tasks: expected at most the {len(sources)} tasks of "
      f"meta.train; found {meta.num_tasks}."
    )
  if meta.target:
    targets = task_sets.resolve_tasks(
      meta.target, "target", "meta.target", **files
    )
    task_sets.check_held_out(sources, targets)
  run = run_lib.make_run(config, sources[0].task)
  over_tasks = algorithm.make_algorithm(
    config,
    run.base_update,
    run.loss_fn,
    objectives.make_probe_loss_fn(
      config.zo.objective, run.model.module, run.model.tokenizer
    ),
    over_tasks=True,
  )
  return multitask_run.MultitaskRun(
    run._replace(algorithm=over_tasks),
    sources,
    per_task=config.method == "bilevel",
    on_host=meta.on_host,
  )


def _make_step(
  family: multitask_run.MultitaskRun, sampler: _TaskSampler
) -> fit.Step:
  """Jits a step on the sampled tasks' adapters and the backbone.

  The adapters of all tasks are on the devices, where they are gathered and
  scattered by the program; or in the host's memory, from which those of the
  sampled tasks are copied.
  """
  step_fn, on_host = family.run.algorithm.step, family.on_host

  def on_device(state, tasks, batch, hparams):
    if not family.per_task:
      return step_fn(state, batch, hparams)
    after, info = step_fn(multitask.gather_tasks(state, tasks), batch, hparams)
    return multitask.scatter_tasks(state, tasks, after), info

  def arguments(state, step):
    tasks = sampler.tasks(step)
    inputs = sampler.batch(step), family.run.hparams_fn(step)
    if on_host:
      return multitask.gather_tasks(state, tasks), *inputs
    return state, tasks, *inputs

  def finish(before, step, after):
    if on_host:
      return multitask.scatter_tasks(before, sampler.tasks(step), after)
    return after

  shardings = jax.tree.map(
    lambda leaf: leaf.sharding, family.abstract_device_state()
  )
  jitted = dispatch.jit_step(
    step_fn if on_host else on_device, family.mesh, shardings
  )
  return fit.Step(jitted, arguments, finish, family.run.jit_flush())


@lock.locked
def metatrain(
  config: ml_collections.ConfigDict, workdir: str
) -> dict[str, Any]:
  """Trains on many tasks to the end, from the latest checkpoint if any.

  Args:
    config: the run's config; `config.meta` is this command's.
    workdir: folder of the run; local or gs://.

  Returns:
    What is written to `summary.json`.

  Raises:
    UserError: something in the config, the files or `workdir` is wrong.
  """
  family = make_run(config)
  if jax.process_count() > 1:
    raise errors.UserError(
      f"--distributed: '{config.command}' runs in one process, on all devices "
      f"of it; found {jax.process_count()}."
    )
  folder = epath.Path(workdir)
  run_folder.check_config(defaults.flat(config), folder)
  examples = task_sets.load_examples(
    family.sources, family.run.row_source, family.run.encoder
  )
  rows = {
    f"{source.task.name}/{name}": fingerprint
    for source, of_task in zip(family.sources, examples, strict=True)
    for name, fingerprint in of_task.fingerprints.items()
  }
  rests_on = inputs.check(family.run, folder, rows)
  report.make_folder(folder / "checkpoints")
  family.run.write_dropped(folder)
  sampler = _TaskSampler(family, examples)
  flops_per_row = train_lib.row_flops(family.run, examples[0], sampler.shape)

  def init():
    base = model.load_base(family.model, family.mesh)
    # As a checkpoint is read, so that a resumed run has the same program.
    state = jax.tree.map(
      lambda leaf, like: (
        leaf
        if isinstance(leaf, np.ndarray)
        else jax.device_put(leaf, like.sharding)
      ),
      family.init(base),
      family.abstract_state(),
    )
    rows = [of_task.test for of_task in examples]
    return state, {
      "zero_shot": family.evaluate(state, rows, "zero-shot", bare=True)
    }

  def metrics_row(step, info):
    return {**train_lib.metrics_row(info), "tasks": sampler.tasks(step)}

  def compute_used(num_steps):
    passes = family.run.budget.total(num_steps, config.meta.num_tasks)
    return train_lib.budget_row(passes, flops_per_row)

  def validate(state):
    rows = [of_task.selection for of_task in examples]
    results = family.evaluate(state, rows, "selection")
    scores = {
      source.task.name: metrics[source.task.metric]
      for source, metrics in zip(family.sources, results, strict=True)
    }
    mean = float(np.mean(list(scores.values())))
    return {"mean": mean, **scores}, mean

  with (
    fit.write_errors(folder),
    state_store.open_store(
      family.run,
      folder,
      abstract_state=family.abstract_state,
      inputs=rests_on,
      write=True,
    ) as store,
  ):
    state, run_metadata = fit.fit(
      config,
      folder,
      store,
      _make_step(family, sampler),
      init=init,
      metrics_row=metrics_row,
      budget=compute_used,
      validate=validate,
    )
  results = family.evaluate(state, [rows.test for rows in examples], "test")
  table = []
  for i, source in enumerate(family.sources):
    metric = source.task.metric
    table.append(
      {
        "task": source.task.name,
        "metric": metric,
        "test rows": len(examples[i].test),
        "zero-shot": run_metadata["zero_shot"][i][metric],
        "trained": results[i][metric],
      }
    )
  fields: dict[str, Any] = {
    "method": config.method,
    "model": config.model.name,
    **{
      f"{name}_mean": float(np.mean([row[column] for row in table]))
      for name, column in (("zero_shot", "zero-shot"), ("test", "trained"))
    },
    "tasks": table,
    "selection_metric": "mean",
    "best_step": int(state.step),
    "num_outer_steps": config.train.num_steps,
    **compute_used(config.train.num_steps),
    **summary.cost(run_metadata),
  }
  title = f"{config.method}: the tasks trained on, own test rows"
  summary.write(folder, fields, table, title)
  return fields
