"""Meta-training: many tasks' adapters, and a backbone that they share.

Or what that is compared with: one adapter for all tasks, or all weights,
trained on the tasks' mean loss.
"""

import functools
import math
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
  bilevel,
  errors,
  experiment,
  families,
  inner,
  loop,
  multitask,
  objectives,
  report,
  runs,
  shared,
)
from zofo_jax import mesh as mesh_lib
from zofo_jax import progress as progress_lib
from zofo_jax import store as store_lib
from zofo_jax import train as train_lib


def make_algorithm(
  config: ml_collections.ConfigDict,
  loss_fn: inner.LossFn,
  probe_loss_fn: inner.LossFn | None = None,
) -> bilevel.BilevelAlgorithm:
  """Makes the (init, step) pair of `config.meta.method`."""
  method = config.meta.method
  if method == "bilevel":
    return runs.make_algorithm(config, loss_fn, probe_loss_fn, over_tasks=True)
  if method == "mezo":
    return shared.make_zeroth_order_step(
      probe_loss_fn or loss_fn,
      base_tx=runs.make_base_tx(config.zo),
      sampler=runs.make_sampler(config.zo),
      estimator=runs.ESTIMATORS[config.zo.estimator],
      num_directions=config.zo.num_directions,
      frame_steps=config.zo.frame_steps,
    )
  tx = runs.make_level_tx(config, "lower")
  return shared.make_first_order_step(loss_fn, tx, whole=method == "full")


def passes(config: ml_collections.ConfigDict) -> tuple[int, int]:
  """Counts an iteration's (forward, backward) passes over a task's batch."""
  count, steps = config.meta.num_tasks, config.lower.num_steps
  if config.meta.method == "bilevel":
    forward, backward = train_lib.passes(config)
    return count * forward, count * backward
  if config.meta.method == "mezo":
    estimator = runs.ESTIMATORS[config.zo.estimator]
    points = config.zo.num_directions * estimator.evaluations
    return count * (estimator.shared + points), 0
  return count * steps, count * steps


class Family(NamedTuple):
  """A run over many tasks.

  Attributes:
    run: of the first task; its algorithm is that of all.
    members: the tasks that are trained on.
  """

  run: runs.Run
  members: list[families.Member]

  @property
  def config(self) -> ml_collections.ConfigDict:
    """The resolved config."""
    return self.run.config

  @property
  def model(self) -> backbone.Model:
    """The model without weights."""
    return self.run.model

  @property
  def mesh(self) -> mesh_lib.AnyMesh:
    """The grid of devices."""
    return self.run.mesh

  def init(self, base: Any) -> bilevel.BilevelState:
    """Starts a state at a backbone; every p and s begins independently."""
    config, init = self.config, self.run.algorithm.init
    upper_key, lower_key, step_key = jax.random.split(
      jax.random.key(config.seed), 3
    )

    def adapter(key, i):
      key = jax.random.fold_in(key, i)
      return backbone.init_adapter(config, self.run.model, key, base)

    if config.meta.method != "bilevel":
      return init(step_key, base, adapter(upper_key, 0))

    def alone(i):
      lift = lambda tree: jax.tree.map(lambda leaf: leaf[None], tree)
      return init(
        step_key,
        base,
        lift(adapter(upper_key, i)),
        lift(adapter(lower_key, i)),
      )

    def stacks(state):
      # A task at a time, so that no more than one need be on the device.
      parts = {name: getattr(state, name) for name in bilevel.OF_TASKS}
      return jax.device_get(parts) if config.meta.on_host else parts

    state = alone(0)
    parts = [stacks(state)]
    parts += [stacks(alone(i)) for i in range(1, len(self.members))]
    join = np.concatenate if config.meta.on_host else jnp.concatenate
    joined = jax.tree.map(lambda *leaves: join(leaves), *parts)
    return state._replace(**joined)

  def on_device(self) -> bilevel.BilevelState:
    """Returns the shapes and shardings of a state that is all on the devices.

    Stacks are whole everywhere, of however many tasks they are.
    """
    base = backbone.abstract_base(self.config, self.model)
    config = self.config.copy_and_resolve_references()
    config.meta.on_host = False
    family = self._replace(run=self.run._replace(config=config))
    state = jax.eval_shape(family.init, base)
    places = mesh_lib.state_shardings(
      self.mesh, state, self.model.family.SHARDINGS
    )
    return mesh_lib.with_shardings(state, places)

  def abstract_state(self) -> bilevel.BilevelState:
    """Returns the shapes and shardings of a state; reads no weights."""
    state = self.on_device()
    if not self.config.meta.on_host:
      return state
    stacks = {
      name: jax.tree.map(
        lambda leaf: np.empty(leaf.shape, leaf.dtype), getattr(state, name)
      )
      for name in bilevel.OF_TASKS
    }
    return state._replace(**stacks)

  def adapter(self, state: bilevel.BilevelState, task: int) -> Any:
    """Returns the adapter that a trained task is answered with."""
    if self.config.meta.method != "bilevel":
      return state.upper
    return jax.tree.map(lambda leaf: leaf[task], state.upper)

  def mean_adapter(self, state: bilevel.BilevelState) -> Any:
    """Returns what a new task may start from; {} where there is no adapter."""
    if self.config.meta.method != "bilevel":
      return state.upper
    return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), state.upper)

  def evaluate(
    self,
    state: bilevel.BilevelState,
    rows: Sequence[Sequence[Any]],
    label: str,
    *,
    bare: bool = False,
  ) -> list[dict[str, float]]:
    """Returns what each trained task's rows say, all of one shape."""
    shape = families.common_shape([batches.shape_of(each) for each in rows])
    return [
      self.run._replace(task=member.task)
      .evaluate(
        state.base,
        {} if bare else self.adapter(state, i),
        rows[i],
        f"{label} {member.task.name}",
        shape=shape,
      )
      .worth()
      for i, member in enumerate(self.members)
    ]


def make_family(config: ml_collections.ConfigDict) -> Family:
  """Checks a config and makes what does not need rows or weights.

  Raises:
    UserError: a task is unknown, or cannot be of the family.
  """
  members = families.members(config, config.meta.train, "train", "meta.train")
  if config.meta.num_tasks > len(members):
    raise errors.UserError(
      f"config.meta.num_tasks: expected at most the {len(members)} tasks of "
      f"meta.train; found {config.meta.num_tasks}."
    )
  if config.meta.target:
    targets = families.members(
      config, config.meta.target, "target", "meta.target"
    )
    families.check_held_out(members, targets)
  if config.ckpt.base_every_steps and config.meta.method in ("lora", "full"):
    raise errors.UserError(
      "config.ckpt.base_every_steps: only meta.method 'bilevel' and 'mezo' can "
      f"be taken again from the ledger; expected 0 with '{config.meta.method}'."
    )
  run = runs.make_run(config, members[0].task)
  module, tokenizer = run.model.module, run.model.tokenizer
  algorithm = make_algorithm(
    config,
    backbone.make_loss_fn(config.loss, module),
    objectives.make_probe_loss_fn(config.zo.objective, module, tokenizer),
  )
  return Family(run._replace(algorithm=algorithm), members)


def load(workdir: str) -> tuple[Family, bilevel.BilevelState]:
  """Reads a run's config and its best checkpoint.

  Raises:
    UserError: there is no such run.
  """
  folder = epath.Path(workdir)
  family = make_family(runs.read_config(folder))
  with store_lib.Store(family, folder) as store:
    state, _ = store.best()
  return family, state


def shared_health(info: shared.SharedInfo) -> tuple[list[float], bool]:
  """Returns an iteration's losses, and whether no direction was finite."""
  losses = [float(loss) for loss in np.ravel(info.upper_loss)]
  return losses, not all(map(math.isfinite, losses))


def _work(family: Family, examples: list[experiment.Examples]) -> loop.Work:
  """Says what the loop does."""
  config, pad = family.config, family.run.model.pad
  meta, step_fn = config.meta, family.run.algorithm.step
  hparams = runs.make_hparams(config)
  sizes = [len(each.lower) + len(each.upper) for each in examples]
  shape = families.common_shape(list(map(experiment.train_shape, examples)))
  of_tasks = meta.method == "bilevel"

  def drawn(number):
    return multitask.sample_tasks(
      config.seed, number, sizes, meta.num_tasks, power=meta.size_power
    )

  def on_device(state, tasks, batch):
    if not of_tasks:
      return step_fn(state, batch, hparams)
    moved, info = step_fn(multitask.take(state, tasks), batch, hparams)
    return multitask.put(state, tasks, moved), info

  places = jax.tree.map(lambda leaf: leaf.sharding, family.on_device())
  everywhere = mesh_lib.everywhere(family.mesh)
  jit = functools.partial(
    jax.jit, donate_argnums=0, out_shardings=(places, everywhere)
  )
  if meta.on_host:
    jitted = jit(step_fn)

    def take_step(state, tasks, batch):
      moved, info = jitted(multitask.take(state, tasks), batch, hparams)
      return multitask.put(state, tasks, moved), info
  else:
    take_step = jit(on_device)

  def step(state, number):
    tasks = drawn(number)
    each = [
      train_lib.iteration_batch(config, examples[i], shape, pad, number)
      for i in tasks
    ]
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
    batch = family.run.put(batch, axis=1)
    if meta.weight_power:
      weights = np.asarray(sizes, np.float32)[tasks] ** meta.weight_power
      batch = batch._replace(weights=weights.astype(np.float32))
    return take_step(state, tasks, batch)

  def told(number, info):
    row = {**info._asdict(), "tasks": drawn(number)}
    del row["move"]  # the ledger's
    for name in ("lower_loss", "upper_loss"):
      if name in row:
        row[name] = float(np.mean(row[name]))
    return row

  def start():
    base = backbone.load_base(config, family.model, family.mesh)
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
    step=step,
    told=told,
    health=train_lib.health if of_tasks else shared_health,
    select=select,
    passes=passes(config),
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
  family = make_family(config)
  folder = epath.Path(workdir)
  store_lib.check_config(config, folder)
  examples = families.load_examples(config, family.run.model, family.members)
  state, record = loop.run(family, folder, _work(family, examples))
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
  forward, backward = passes(config)
  summary: dict[str, Any] = {
    "method": config.meta.method,
    "model": config.model.name,
    **{
      f"{name}_mean": float(np.mean([row[text] for row in table]))
      for name, text in (("zero_shot", "zero-shot"), ("test", "trained"))
    },
    "tasks": table,
    "best_step": int(state.step),
    "num_outer_steps": config.train.num_steps,
    "forward_passes": forward * config.train.num_steps,
    "backward_passes": backward * config.train.num_steps,
    "train_seconds": record["seconds"],
    "peak_rss_bytes": progress_lib.peak_rss_bytes(),
  }
  report.write_json(folder / "summary.json", summary)
  report.plot_curves(folder / "metrics.jsonl", folder / "curves.png")
  report.results_table(
    table, title=f"{config.meta.method}: the tasks trained on, own test rows"
  )
  print(f"In {folder}: summary.json, metrics.jsonl, curves.png, checkpoints/.")
  return summary
