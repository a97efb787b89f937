"""First-order tuning of adapters on a few rows of new tasks.

An adapter for every (target task, seed), all of them one batched program.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from zofo_jax import errors, tasks
from zofo_jax.builders import algorithm
from zofo_jax.builders import data as data_lib
from zofo_jax.builders import model as model_lib
from zofo_jax.builders import run as run_lib
from zofo_jax.core import inner
from zofo_jax.core import tree as tree_lib
from zofo_jax.data import batching, encode_options
from zofo_jax.data import splits as splits_lib
from zofo_jax.report import progress as progress_lib
from zofo_jax.training.meta import task_sets


class Target(NamedTuple):
  """A new task.

  Attributes:
    member: the task.
    support_rows: the few training rows of each seed.
    support_examples: the same, encoded.
    query_rows: the test rows.
    query_examples: the same, encoded.
  """

  member: task_sets.TaskSource
  support_rows: list[list[tasks.Row]]
  support_examples: list[list[encode_options.Example]]
  query_rows: list[tasks.Row]
  query_examples: list[encode_options.Example]


def load_targets(
  config: ml_collections.ConfigDict,
  model: model_lib.Model,
  members: Sequence[task_sets.TaskSource],
) -> list[Target]:
  """Draws and encodes the few rows and the test rows of every task.

  Raises:
    UserError: names the file and row that is wrong, or the rows are too few.
  """
  targets = []
  for member in members:
    task, splits = member.task, task_sets.load_rows(config, member)
    pool = [*splits.lower, *splits.upper]
    support = [
      _few(config, member, pool, seed) for seed in range(config.adapt.num_seeds)
    ]
    encoded = [
      data_lib.encode_train(config, model, task, few) for few in support
    ]
    test = data_lib.encode_eval(config, model, task, splits.test)
    targets.append(Target(member, support, encoded, splits.test, test))
  return targets


def _few(
  config: ml_collections.ConfigDict,
  member: task_sets.TaskSource,
  pool: list[tasks.Row],
  seed: int,
) -> list[tasks.Row]:
  """Draws the rows of a seed: of each label, or in all where options vary."""
  task, count = member.task, config.adapt.shots
  if task.kind == "classification":
    return splits_lib.k_shot(task, pool, count, seed)
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
  return tree_lib.stack(trees)


def _starts(run: run_lib.Run, found: Backbone, num_targets: int) -> Any:
  """Returns adapters to start from, leaves [targets * seeds, ...]."""
  config, key = run.config, jax.random.key(run.config.seed)
  each = [
    found.start
    or model_lib.init_adapter(
      config, run.model, jax.random.fold_in(key, seed), found.base
    )
    for seed in range(config.adapt.num_seeds)
  ]
  return _stack(each * num_targets)


def tune(run: run_lib.Run, found: Backbone, targets: Sequence[Target]) -> Any:
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
  tx = algorithm.make_optimizer(options.optimizer, options.learning_rate)
  loss_fn = model_lib.make_loss_fn(config.loss, run.model.module)
  few = [shots for target in targets for shots in target.support_examples]
  shape = batching.shape_of([e for shots in few for e in shots], multiple=8)

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
        chosen = batching.batch_indices(config.seed, len(shots), size, number)
        batch = batching.collate(
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
