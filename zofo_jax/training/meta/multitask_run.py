"""A run over many tasks: its algorithm, its state, and what it answers.

Meta-training, or what that is compared with: one adapter for all tasks, or all
weights, trained on the tasks' mean loss.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from zofo_jax import errors
from zofo_jax.builders import algorithm as algorithm_lib
from zofo_jax.builders import model as model_lib
from zofo_jax.builders import run as run_lib
from zofo_jax.checkpoints import state_store
from zofo_jax.config import methods
from zofo_jax.core.types import PER_TASK_FIELDS, BilevelState
from zofo_jax.data import batching
from zofo_jax.evaluation import objectives
from zofo_jax.sharding import mesh as mesh_lib
from zofo_jax.sharding import rules
from zofo_jax.training.meta import task_sets


class MultitaskRun(NamedTuple):
  """A run over many tasks.

  Attributes:
    run: of the first task; its algorithm is that of all.
    members: the tasks that are trained on.
  """

  run: run_lib.Run
  members: list[task_sets.TaskSource]

  @property
  def config(self) -> ml_collections.ConfigDict:
    """The resolved config."""
    return self.run.config

  @property
  def model(self) -> model_lib.Model:
    """The model without weights."""
    return self.run.model

  @property
  def mesh(self) -> mesh_lib.AnyMesh:
    """The grid of devices."""
    return self.run.mesh

  def init(self, base: Any) -> BilevelState:
    """Starts a state at a backbone; every p and s begins independently."""
    config, init = self.config, self.run.algorithm.init
    upper_key, lower_key, step_key = jax.random.split(
      jax.random.key(config.seed), 3
    )

    def adapter(key, i):
      key = jax.random.fold_in(key, i)
      return model_lib.init_adapter(config, self.run.model, key, base)

    if config.method != "bilevel":
      has_adapter = methods.METHODS[config.method].updates_adapter
      return init(step_key, base, adapter(upper_key, 0) if has_adapter else {})

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
      parts = {name: getattr(state, name) for name in PER_TASK_FIELDS}
      return jax.device_get(parts) if config.meta.on_host else parts

    state = alone(0)
    parts = [stacks(state)]
    parts += [stacks(alone(i)) for i in range(1, len(self.members))]
    join = np.concatenate if config.meta.on_host else jnp.concatenate
    joined = jax.tree.map(lambda *leaves: join(leaves), *parts)
    return state._replace(**joined)

  def on_device(self) -> BilevelState:
    """Returns the shapes and shardings of a state that is all on the devices.

    Stacks are whole everywhere, of however many tasks they are.
    """
    base = model_lib.abstract_base(self.config, self.model)
    config = self.config.copy_and_resolve_references()
    config.meta.on_host = False
    family = self._replace(run=self.run._replace(config=config))
    state = jax.eval_shape(family.init, base)
    places = rules.state_shardings(
      self.mesh, state, self.model.family.SHARDINGS
    )
    return rules.with_shardings(state, places)

  def abstract_state(self) -> BilevelState:
    """Returns the shapes and shardings of a state; reads no weights."""
    state = self.on_device()
    if not self.config.meta.on_host:
      return state
    stacks = {
      name: jax.tree.map(
        lambda leaf: np.empty(leaf.shape, leaf.dtype), getattr(state, name)
      )
      for name in PER_TASK_FIELDS
    }
    return state._replace(**stacks)

  def adapter(self, state: BilevelState, task: int) -> Any:
    """Returns the adapter that a trained task is answered with."""
    if self.config.method != "bilevel":
      return state.upper
    return jax.tree.map(lambda leaf: leaf[task], state.upper)

  def mean_adapter(self, state: BilevelState) -> Any:
    """Returns what a new task may start from; {} where there is no adapter."""
    if self.config.method != "bilevel":
      return state.upper
    return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), state.upper)

  def evaluate(
    self,
    state: BilevelState,
    rows: Sequence[Sequence[Any]],
    label: str,
    *,
    bare: bool = False,
  ) -> list[dict[str, float]]:
    """Returns what each trained task's rows say, all of one shape."""
    shape = task_sets.common_shape([batching.shape_of(each) for each in rows])
    return [
      self.run._replace(task=member.task)
      .evaluate(
        state.base,
        {} if bare else self.adapter(state, i),
        rows[i],
        f"{label} {member.task.name}",
        shape=shape,
      )
      .metrics()
      for i, member in enumerate(self.members)
    ]


def make_family(config: ml_collections.ConfigDict) -> MultitaskRun:
  """Checks a config and makes what does not need rows or weights.

  Raises:
    UserError: a task is unknown, or cannot be of the family.
  """
  members = task_sets.resolve_tasks(
    config, config.meta.train, "train", "meta.train"
  )
  if config.meta.num_tasks > len(members):
    raise errors.UserError(
      f"config.meta.num_tasks: expected at most the {len(members)} tasks of "
      f"meta.train; found {config.meta.num_tasks}."
    )
  if config.meta.target:
    targets = task_sets.resolve_tasks(
      config, config.meta.target, "target", "meta.target"
    )
    task_sets.check_held_out(members, targets)
  run = run_lib.make_run(config, members[0].task)
  module, tokenizer = run.model.module, run.model.tokenizer
  algorithm = algorithm_lib.make_algorithm(
    config,
    model_lib.make_loss_fn(config.loss, module),
    objectives.make_probe_loss_fn(config.zo.objective, module, tokenizer),
    over_tasks=True,
  )
  return MultitaskRun(run._replace(algorithm=algorithm), members)


def load(workdir: str) -> tuple[MultitaskRun, BilevelState]:
  """Reads a run's config and its best checkpoint.

  Raises:
    UserError: there is no such run.
  """
  folder = epath.Path(workdir)
  family = make_family(run_lib.read_config(folder))
  with state_store.open_store(
    family.run, folder, abstract_state=family.abstract_state
  ) as store:
    state, _ = store.best()
  return family, state
