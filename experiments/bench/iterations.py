"""Bilevel iterations on random weights, of one task, of several, and guided.

Weights are donated to an iteration and kept between calls, which wait for their
result; the first compiles.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from bench import models, workload

import zofo_jax as zofo
from zofo_jax import adapters
from zofo_jax.builders import model
from zofo_jax.models.decoder import STACKED

_RATE = 1e-7


class Bilevel(NamedTuple):
  """The bilevel iteration.

  Attributes:
    outer: takes an iteration of no inner steps (T = 0).
    iteration: takes an iteration of T inner steps.
    base_bytes: bytes of the backbone.
  """

  outer: Callable[[], Any]
  iteration: Callable[[], Any]
  base_bytes: int


def make_bilevel(work: workload.Work) -> Bilevel:
  """Prepares iterations; each program is compiled at its first call.

  Adam and clipping on s, Adam on p, a central estimate along one Rademacher
  direction and SGD in place on the backbone.

  Args:
    work: the sizes.

  Returns:
    The iteration with and without its inner loop, on one state.
  """
  module = models.opt_module(work.opt)
  base = models.random_base(module, work.dtype)
  base_bytes = models.num_bytes(base)
  run = _iterate(work, module, base)
  without, rows = (
    _iteration_rows(work, work.opt_rows, steps)
    for steps in (0, work.num_inner_steps)
  )
  return Bilevel(
    outer=lambda: run(without),
    iteration=lambda: run(rows),
    base_bytes=base_bytes,
  )


def _iterate(
  work: workload.Work,
  module: Any,
  base: Any,
  num_tasks: int = 0,
  guide: zofo.guided.Guide | None = None,
) -> Callable[[zofo.BilevelBatch], None]:
  """Returns an iteration with its own state; the weights are donated to it.

  If `num_tasks` is not 0, it is over so many tasks, each with its own adapters.
  """
  keys = jax.random.split(jax.random.key(0), 3)

  def make_adapter(key):
    adapter = adapters.init_lora(key, base, rank=work.lora_rank, alpha=16.0)
    if not num_tasks:
      return adapter
    return jax.tree.map(lambda leaf: jnp.stack([leaf] * num_tasks), adapter)

  algorithm = zofo.make_bilevel_step(
    model.make_loss_fn("likelihood", module),
    lower_tx=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-4)),
    upper_tx=optax.adam(1e-4),
    base_tx=zofo.outer.sgd(_RATE),
    zo=zofo.ZerothOrder(
      zofo.Sampler(zofo.directions.Rademacher(), stacked=STACKED, lazy=True)
    ),
    over_tasks=bool(num_tasks),
    guide=guide,
  )
  buffers = {
    "state": algorithm.init(
      keys[0], base, make_adapter(keys[1]), make_adapter(keys[2])
    )
  }
  step = jax.jit(algorithm.step, donate_argnums=0)

  def run(rows):
    hparams = zofo.BilevelHParams(penalty=10.0)
    buffers["state"], info = step(buffers["state"], rows, hparams)
    jax.block_until_ready((buffers["state"].base, info))

  return run


def _iteration_rows(
  work: workload.Work, shape: tuple[int, int], num_steps: int
) -> zofo.BilevelBatch:
  """Makes the rows of an iteration of so many inner steps."""

  def batch(seed):
    return models.make_batch(
      workload.padded_rows(shape, work.opt.vocab_size, seed)
    )

  inner = [batch(seed) for seed in range(max(num_steps, 1))]
  lower = jax.tree.map(lambda *leaves: jnp.stack(leaves)[:num_steps], *inner)
  return zofo.BilevelBatch(lower, penalty=batch(100), upper=batch(101))


class Metatrain(NamedTuple):
  """An iteration over M tasks and one over as many rows of a single task."""

  tasks: Callable[[], Any]
  single: Callable[[], Any]


def make_metatrain(work: workload.Work) -> Metatrain:
  """Prepares both iterations, on separate weights.

  Args:
    work: the sizes; each of `num_tasks` tasks has batches of `opt_rows`.

  Returns:
    The two.
  """
  module, count = models.opt_module(work.opt), work.num_tasks
  rows, length = work.opt_rows
  whole = _iteration_rows(work, (count * rows, length), work.meta_inner_steps)
  # The same rows, divided between the tasks.
  divide = lambda leaf, axis: jnp.moveaxis(
    leaf.reshape(*leaf.shape[:axis], count, rows, *leaf.shape[axis + 1 :]),
    axis,
    0,
  )
  parts = zofo.BilevelBatch(
    lower=jax.tree.map(lambda leaf: divide(leaf, 1), whole.lower),
    penalty=jax.tree.map(lambda leaf: divide(leaf, 0), whole.penalty),
    upper=jax.tree.map(lambda leaf: divide(leaf, 0), whole.upper),
  )
  over_tasks, single = (
    _iterate(work, module, models.random_base(module, work.dtype), num_tasks)
    for num_tasks in (count, 0)
  )
  return Metatrain(lambda: over_tasks(parts), lambda: single(whole))


class Guided(NamedTuple):
  """An iteration whose theta follows s, and the published one."""

  guided: Callable[[], Any]
  published: Callable[[], Any]


def make_guided(work: workload.Work) -> Guided:
  """Prepares both iterations, on separate weights.

  Both evaluate six losses for theta: two on each of three points, and three on
  each of two.

  Args:
    work: the sizes.
  """
  module = models.opt_module(work.opt)
  rows = _iteration_rows(work, work.opt_rows, work.num_inner_steps)
  guide = zofo.guided.Guide(adapters.fold_lora, zofo.guided.parabola())
  guided, published = (
    _iterate(work, module, models.random_base(module, work.dtype), guide=each)
    for each in (guide, None)
  )
  return Guided(lambda: guided(rows), lambda: published(rows))
