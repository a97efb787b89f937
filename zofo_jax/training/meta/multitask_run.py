"""A run over many tasks: its state, its adapters, and its scores.

Meta-training by Bilevel-ZOFO, or one of its baselines: one adapter for all
tasks, or all weights, trained on the tasks' mean loss.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from zofo_jax.builders import model as model_lib
from zofo_jax.builders import run as run_lib
from zofo_jax.core import keys as keys_lib
from zofo_jax.core.types import PER_TASK_FIELDS, BilevelState
from zofo_jax.data import batching
from zofo_jax.sharding import mesh as mesh_lib
from zofo_jax.sharding import rules
from zofo_jax.training.meta import task_sets


class MultitaskRun(NamedTuple):
  """A run over many tasks.

  Attributes:
    run: of the first task, with the algorithm of all.
    sources: the tasks that are trained on.
    per_task: whether every task has its own p and s; else all share one
      adapter, if there is any.
    on_host: whether adapters of tasks that are not sampled stay on the host.
  """

  run: run_lib.Run
  sources: list[task_sets.TaskSource]
  per_task: bool
  on_host: bool = False

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
    """The mesh of devices."""
    return self.run.mesh

  def init(self, base: Any) -> BilevelState:
    """Initializes a state; every p and s is drawn independently."""
    init = self.run.algorithm.init
    upper_key, lower_key, step_key = jax.random.split(
      keys_lib.seed_key(self.run.seed), 3
    )

    def adapter(key, i):
      return self.run.init_adapter(jax.random.fold_in(key, i), base)

    if not self.per_task:
      shared = adapter(upper_key, 0) if self.run.trains_adapter else {}
      return init(step_key, base, shared)

    def init_task(i):
      lift = lambda tree: jax.tree.map(lambda leaf: leaf[None], tree)
      return init(
        step_key,
        base,
        lift(adapter(upper_key, i)),
        lift(adapter(lower_key, i)),
      )

    def stacked_fields(state):
      # One task at a time, so that no more than one need be on the device.
      fields = {name: getattr(state, name) for name in PER_TASK_FIELDS}
      return jax.device_get(fields) if self.on_host else fields

    state = init_task(0)
    parts = [stacked_fields(state)]
    parts += [stacked_fields(init_task(i)) for i in range(1, len(self.sources))]
    concatenate = np.concatenate if self.on_host else jnp.concatenate
    joined = jax.tree.map(lambda *leaves: concatenate(leaves), *parts)
    return state._replace(**joined)

  def abstract_device_state(self) -> BilevelState:
    """Returns the shapes and shardings of a state that is all on the devices.

    Fields with a task axis are replicated, however many tasks there are.
    """
    base = model_lib.abstract_base(self.model)
    state = jax.eval_shape(self._replace(on_host=False).init, base)
    shardings = rules.state_shardings(
      *(self.mesh, state, self.model.family.SHARDINGS, self.model.on_host)
    )
    return rules.with_shardings(state, shardings)

  def abstract_state(self) -> BilevelState:
    """Returns the shapes and shardings of a state; reads no weights."""
    state = self.abstract_device_state()
    if not self.on_host:
      return state
    fields = {
      name: jax.tree.map(
        lambda leaf: np.empty(leaf.shape, leaf.dtype), getattr(state, name)
      )
      for name in PER_TASK_FIELDS
    }
    return state._replace(**fields)

  def adapter(self, state: BilevelState, task: int) -> Any:
    """Returns the adapter that answers a trained task, given its index."""
    if not self.per_task:
      return state.upper
    return jax.tree.map(lambda leaf: leaf[task], state.upper)

  def mean_adapter(self, state: BilevelState) -> Any:
    """Returns what a new task may start from; {} if there is no adapter."""
    if not self.per_task:
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
    """Returns the metrics of every trained task.

    Args:
      state: the state.
      rows: encoded rows of each task; all are batched to one shape.
      label: of the progress display.
      bare: whether to evaluate the backbone without adapters.
    """
    shape = task_sets.common_shape(
      [batching.shape_of(of_task) for of_task in rows]
    )
    return [
      self.run._replace(task=source.task)
      .evaluate(
        state.base,
        {} if bare else self.adapter(state, i),
        rows[i],
        f"{label} {source.task.name}",
        shape=shape,
      )
      .metrics()
      for i, source in enumerate(self.sources)
    ]
