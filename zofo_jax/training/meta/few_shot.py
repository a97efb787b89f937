"""First-order tuning of adapters on a few rows of new tasks.

An adapter for every (target task, seed), all in one batched program.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from zofo_jax import errors, tasks
from zofo_jax.builders import data as data_lib
from zofo_jax.builders import encoder as encoder_lib
from zofo_jax.builders import run as run_lib
from zofo_jax.core import inner
from zofo_jax.core import keys as keys_lib
from zofo_jax.core import tree as tree_lib
from zofo_jax.data import batching, encode_options
from zofo_jax.data import splits as splits_lib
from zofo_jax.report import progress as progress_lib
from zofo_jax.training.meta import task_sets


class Target(NamedTuple):
  """A new task, with a few rows of support for each seed.

  Attributes:
    source: the task.
    support_rows: training rows of each seed.
    support_examples: the same, encoded.
    query_rows: test rows.
    query_examples: the same, encoded.
  """

  source: task_sets.TaskSource
  support_rows: list[list[tasks.Row]]
  support_examples: list[list[encode_options.Example]]
  query_rows: list[tasks.Row]
  query_examples: list[encode_options.Example]


def load_targets(
  sources: Sequence[task_sets.TaskSource],
  row_source: data_lib.RowSource,
  encoder: encoder_lib.Encoder,
  *,
  shots: int,
  num_seeds: int,
) -> list[Target]:
  """Draws and encodes the support rows and the test rows of every task.

  Args:
    sources: the tasks.
    row_source: how rows are divided; its folder is not used.
    encoder: encodes the rows.
    shots: support rows of each label; in all where options vary.
    num_seeds: how many sets of support rows are drawn.

  Raises:
    UserError: names the file and row that is wrong, or there are too few rows.
  """
  targets = []
  for source in sources:
    task, splits = source.task, task_sets.load_rows(source, row_source)
    pool = [*splits.lower, *splits.upper]
    support = [_draw(task, pool, shots, seed) for seed in range(num_seeds)]
    encoded = [encoder.encode_train(task, rows) for rows in support]
    queries = encoder.encode_eval(task, splits.test)
    support = [
      encode_options.rows_of(rows, examples)
      for rows, examples in zip(support, encoded, strict=True)
    ]
    query_rows = encode_options.rows_of(splits.test, queries)
    targets.append(Target(source, support, encoded, query_rows, queries))
  return targets


def _draw(
  task: tasks.Task, pool: list[tasks.Row], shots: int, seed: int
) -> list[tasks.Row]:
  """Draws support rows: of each label, or in all where options vary."""
  if task.kind == "classification":
    return splits_lib.k_shot(task, pool, shots, seed)
  if len(pool) < shots:
    raise errors.UserError(
      f"Task {task.name}: {shots} rows were asked for (adapt.shots); there are "
      f"{len(pool)} to draw from."
    )
  order = np.random.RandomState(seed).permutation(len(pool))
  return [pool[i] for i in order[:shots]]


class Backbone(NamedTuple):
  """A backbone to adapt, and the adapter to start from.

  Attributes:
    name: of its run, or "base".
    base: its weights.
    start: an adapter; {} for fresh ones.
  """

  name: str
  base: Any
  start: Any


def _initial_adapters(
  run: run_lib.Run, backbone: Backbone, num_targets: int, num_seeds: int
) -> Any:
  """Returns adapters to start from, leaves [targets * seeds, ...]."""
  key = keys_lib.seed_key(run.seed)
  of_seeds = [
    backbone.start
    or run.init_adapter(jax.random.fold_in(key, seed), backbone.base)
    for seed in range(num_seeds)
  ]
  return tree_lib.stack(of_seeds * num_targets)


def tune(
  run: run_lib.Run,
  backbone: Backbone,
  targets: Sequence[Target],
  *,
  tx: optax.GradientTransformation,
  num_steps: int,
  batch_size: int,
) -> Any:
  """Tunes an adapter for every target and seed, all at once.

  Args:
    run: gives the model, the loss and fresh adapters.
    backbone: the backbone, and the adapter to start from.
    targets: the tasks, all with as many seeds.
    tx: optimizer of the adapters.
    num_steps: of each.
    batch_size: rows of a step; fewer if a target has fewer.

  Returns:
    Adapters, leaves [targets, seeds, ...].
  """
  num_seeds = len(targets[0].support_examples)
  supports = [rows for target in targets for rows in target.support_examples]
  shape = batching.shape_of([e for rows in supports for e in rows], multiple=8)

  def step_one(base, adapter, opt_state, batch, key):
    return inner.minimize(
      run.loss_fn, base, adapter, opt_state, batch, key, tx=tx
    )

  def draw_batch(rows, number):
    size = min(batch_size, len(rows))
    chosen = batching.batch_indices(run.seed, len(rows), size, number)
    batch = batching.collate(
      [rows[i] for i in chosen],
      shape,
      pad=run.model.pad,
      batch_size=batch_size,
    )
    return jax.tree.map(lambda leaf: leaf[None], batch)

  # The backbone has no axis: its products serve every target and seed.
  step = jax.jit(
    jax.vmap(step_one, (None, 0, 0, 0, None)), donate_argnums=(1, 2)
  )
  tuned = _initial_adapters(run, backbone, len(targets), num_seeds)
  opt_state = jax.vmap(tx.init)(tuned)
  key = keys_lib.seed_key(run.seed)
  with progress_lib.Progress(num_steps, f"tune {backbone.name}") as bar:
    for number in range(num_steps):
      batches = [draw_batch(rows, number) for rows in supports]
      tuned, opt_state, losses = step(
        backbone.base,
        tuned,
        opt_state,
        jax.tree.map(lambda *leaves: np.stack(leaves), *batches),
        jax.random.fold_in(key, number),
      )
      if (number + 1) % 10 == 0 or number + 1 == num_steps:
        bar.update(number + 1, loss=float(losses.mean()))
  return jax.tree.map(
    lambda leaf: leaf.reshape(len(targets), num_seeds, *leaf.shape[1:]), tuned
  )
