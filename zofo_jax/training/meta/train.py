"""Meta-training: many tasks' adapters, and a backbone that they share."""

from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from zofo_jax import errors, report
from zofo_jax.builders import algorithm, budget, data, model
from zofo_jax.checkpoints import state_store
from zofo_jax.core import multitask
from zofo_jax.report import progress as progress_lib
from zofo_jax.sharding import mesh as mesh_lib
from zofo_jax.training import loop
from zofo_jax.training import train as train_lib
from zofo_jax.training.meta import multitask_run, task_sets


def _work(
  family: multitask_run.MultitaskRun, examples: list[data.Examples]
) -> loop.Work:
  """Says what the loop does."""
  config, pad = family.config, family.run.model.pad
  meta, step_fn = config.meta, family.run.algorithm.step
  sizes = [len(each.lower) + len(each.upper) for each in examples]
  shape = task_sets.common_shape(list(map(data.train_shape, examples)))
  of_tasks = config.method == "bilevel"

  def drawn(number):
    return multitask.sample_tasks(
      config.seed, number, sizes, meta.num_tasks, power=meta.size_power
    )

  def on_device(state, tasks, batch, hparams):
    if not of_tasks:
      return step_fn(state, batch, hparams)
    moved, info = step_fn(multitask.gather_tasks(state, tasks), batch, hparams)
    return multitask.scatter_tasks(state, tasks, moved), info

  places = jax.tree.map(lambda leaf: leaf.sharding, family.on_device())
  jitted = mesh_lib.jit_step(
    step_fn if meta.on_host else on_device, family.mesh, places
  )

  def arguments(state, number):
    tasks = drawn(number)
    each = [
      train_lib.iteration_batch(config, examples[i], shape, pad, number)
      for i in tasks
    ]
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
    batch = family.run.shard_batch(batch, axis=1)
    if meta.weight_power:
      weights = np.asarray(sizes, np.float32)[tasks] ** meta.weight_power
      batch = batch._replace(weights=weights.astype(np.float32))
    rest = batch, algorithm.make_hparams(config, number)
    if meta.on_host:
      return multitask.gather_tasks(state, tasks), *rest
    return state, tasks, *rest

  def step(state, number):
    moved, info = jitted(*arguments(state, number))
    if meta.on_host:
      moved = multitask.scatter_tasks(state, drawn(number), moved)
    return moved, info

  def compile_step(state, number):
    return jitted.lower(*arguments(state, number)).compile()

  def told(number, info):
    return {**train_lib.told(info), "tasks": drawn(number)}

  of_row = train_lib.row_flops(family.run, examples[0], shape)

  def spent(count):
    found = budget.spent(config, count, meta.num_tasks)
    return {**found._asdict(), "flops": of_row * found.forward_equivalents}

  def start():
    base = model.load_base(config, family.model, family.mesh)
    # As checkpoints are read, so that both go on with one program.
    state = jax.tree.map(
      lambda leaf, like: (
        leaf
        if isinstance(leaf, np.ndarray)
        else jax.device_put(leaf, like.sharding)
      ),
      family.init(base),
      family.abstract_state(),
    )
    rows = [each.test for each in examples]
    return state, {
      "zero_shot": family.evaluate(state, rows, "zero-shot", bare=True)
    }

  def select(state):
    rows = [each.selection for each in examples]
    found = family.evaluate(state, rows, "selection")
    scores = {
      member.task.name: one[member.task.metric]
      for member, one in zip(family.members, found, strict=True)
    }
    mean = float(np.mean(list(scores.values())))
    return {"mean": mean, **scores}, mean

  return loop.Work(
    start=start,
    compile=compile_step,
    step=step,
    told=told,
    health=train_lib.health,
    select=select,
    spent=spent,
  )


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
  if jax.process_count() > 1:
    raise errors.UserError(
      f"--distributed: '{config.command}' runs in one process, on all devices "
      f"of it; found {jax.process_count()}."
    )
  family = multitask_run.make_family(config)
  folder = epath.Path(workdir)
  state_store.check_config(config, folder)
  examples = task_sets.load_examples(config, family.run.model, family.members)
  work = _work(family, examples)
  state, record = loop.run(family, folder, work)
  found = family.evaluate(state, [each.test for each in examples], "test")
  table = []
  for i, member in enumerate(family.members):
    metric = member.task.metric
    table.append(
      {
        "task": member.task.name,
        "metric": metric,
        "test rows": len(examples[i].test),
        "zero-shot": record["zero_shot"][i][metric],
        "trained": found[i][metric],
      }
    )
  summary: dict[str, Any] = {
    "method": config.method,
    "model": config.model.name,
    **{
      f"{name}_mean": float(np.mean([row[text] for row in table]))
      for name, text in (("zero_shot", "zero-shot"), ("test", "trained"))
    },
    "tasks": table,
    "best_step": int(state.step),
    "num_outer_steps": config.train.num_steps,
    **work.spent(config.train.num_steps),
    "train_seconds": record["seconds"],
    "compile_seconds": record["compile_seconds"],
    "program_bytes": record["program_bytes"],
    "peak_rss_bytes": progress_lib.peak_rss_bytes(),
  }
  report.write_json(folder / "summary.json", summary)
  report.plot_curves(folder / "metrics.jsonl", folder / "curves.png")
  report.results_table(
    table, title=f"{config.method}: the tasks trained on, own test rows"
  )
  print(f"In {folder}: summary.json, metrics.jsonl, curves.png, checkpoints/.")
  return summary
