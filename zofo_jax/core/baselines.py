"""What Bilevel-ZOFO is compared with, as (init, step) pairs like its own.

First order: an adapter, or all weights (over tasks: as MetaICL). Zeroth order:
all weights (MeZO, arXiv 2305.17333, Algorithm 1), or an adapter. And one after
the other. All descend the loss L(theta, p) itself, on one set of rows; over
many tasks the mean of their losses, with nothing that is a task's own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from zofo_jax.core import inner, outer, zo
from zofo_jax.core import keys as keys_lib
from zofo_jax.core import sampler as sampler_lib
from zofo_jax.core.types import (
  BilevelAlgorithm,
  BilevelState,
  InPlaceUpdate,
  LossFn,
)


class BaselineInfo(NamedTuple):
  """What an iteration tells a logger.

  Attributes:
    upper_loss: L(theta, p) at every update, float32 [updates].
    coefficients: directional derivatives, float32 [Q]; Q = 0 without any.
    move: what was added to theta; None if it was not added in place.
  """

  upper_loss: jax.Array
  coefficients: jax.Array
  move: InPlaceUpdate | None = None


def mean_loss(loss_fn: LossFn, weights: jax.Array | None) -> LossFn:
  """Makes the mean over tasks of a loss at one adapter.

  Args:
    loss_fn: loss of one task's batch.
    weights: of the tasks, float32 [M]; None for equal ones.

  Returns:
    loss(base, adapter, batch, key), the batch's leaves [M, ...].
  """

  def mean(base, adapter, batch, key):
    count = jax.tree.leaves(batch)[0].shape[0]
    keys = None if key is None else jax.random.split(key, count)
    axes = (None, None, 0, None if key is None else 0)
    losses = jax.vmap(loss_fn, axes)(base, adapter, batch, keys)
    return jnp.average(losses, weights=weights)

  return mean


def _make_init(opt_init: Callable[[Any], Any], train_base: bool) -> Any:
  """Makes init(key, base, adapter) of what moves one of the two; without s."""

  def init(key, base, adapter, unused=None):
    del unused
    return BilevelState(
      step=jnp.zeros([], jnp.int32),
      base=base,
      upper=adapter,
      lower={},
      base_opt=opt_init(base) if train_base else (),
      upper_opt=() if train_base else opt_init(adapter),
      lower_opt=(),
      key=key,
    )

  return init


def make_first_order_step(
  loss_fn: LossFn,
  tx: optax.GradientTransformation,
  *,
  train_base: bool = False,
  over_tasks: bool = False,
) -> BilevelAlgorithm:
  """Makes first-order training of an adapter, or of all weights.

  An iteration takes T steps, on the batches `batch.lower`.

  Args:
    loss_fn: loss of a batch; over tasks, of one task's.
    tx: optax transformation of what moves.
    train_base: update the backbone and keep the adapter fixed; otherwise update
      the adapter.
    over_tasks: the batch has a leading axis of M tasks: leaves [M, T, ...], not
      [T, ...].

  Returns:
    The algorithm: init(key, base, adapter), and step.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> import zofo_jax as zofo
    >>> loss = lambda base, adapter, batch, key: jnp.mean(
    ...   (base + adapter - batch) ** 2)
    >>> algorithm = zofo.baselines.make_first_order_step(loss, optax.sgd(0.25))
    >>> state = algorithm.init(jax.random.key(0), jnp.zeros(2), jnp.zeros(2))
    >>> batch = zofo.BilevelBatch(lower=jnp.ones((1, 2)), penalty=(),
    ...   upper=())
    >>> state, info = algorithm.step(state, batch, zofo.BilevelHParams())
    >>> state.upper.tolist(), info.upper_loss.tolist()
    ([0.25, 0.25], [1.0])
  """

  def step(state, batch, hparams):
    del hparams
    loss, rows = loss_fn, batch.lower
    if over_tasks:
      loss = mean_loss(loss_fn, batch.weights)
      rows = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), rows)
    key = jax.random.fold_in(state.key, state.step)
    if train_base:
      base, base_opt, losses = inner.minimize(
        lambda adapter, base, *rest: loss(base, adapter, *rest),
        state.upper,
        state.base,
        state.base_opt,
        rows,
        key,
        tx=tx,
      )
      state = state._replace(base=base, base_opt=base_opt)
    else:
      upper, upper_opt, losses = inner.minimize(
        loss, state.base, state.upper, state.upper_opt, rows, key, tx=tx
      )
      state = state._replace(upper=upper, upper_opt=upper_opt)
    info = BaselineInfo(losses, jnp.zeros([0], jnp.float32))
    return state._replace(step=state.step + 1), info

  return BilevelAlgorithm(_make_init(tx.init, train_base), step)


def make_zeroth_order_step(
  loss_fn: LossFn,
  tx: outer.OuterTransform | optax.GradientTransformation,
  *,
  train_base: bool = True,
  over_tasks: bool = False,
  sampler: sampler_lib.Sampler = sampler_lib.Sampler(),
  estimator: zo.Estimator = zo.central,
  num_directions: int = 1,
  frame_steps: int = 1,
  map_fn: zo.MapFn = jax.lax.map,
) -> BilevelAlgorithm:
  """Makes MeZO: one estimate of the loss's gradient, one step along it.

  An iteration takes one step, on the batch `batch.upper`.

  Args:
    loss_fn: loss of a batch; over tasks, of one task's.
    tx: of what moves, as `base_tx` of `bilevel_step`.
    train_base: update the backbone and keep the adapter fixed; otherwise update
      the adapter.
    over_tasks: the batch has a leading axis of M tasks.
    sampler: which weights are probed and along what directions; not a lazy one
      for adapters.
    estimator: `zo.central`, `zo.forward` or `zo.exact`.
    num_directions: Q, averaged.
    frame_steps: iterations for which directions share their frame.
    map_fn: how directions are evaluated; see `zo.estimate`.

  Returns:
    The algorithm: init(key, base, adapter), and step.
  """
  transform = outer.to_outer_transform(tx)

  def step(state, batch, hparams):
    loss = mean_loss(loss_fn, batch.weights) if over_tasks else loss_fn
    keys = keys_lib.step_keys(state.key, state.step, frame_steps)

    def objective(moved):
      base, adapter = (
        (moved, state.upper) if train_base else (state.base, moved)
      )
      return loss(base, adapter, batch.upper, None)

    moved, opt_state = (
      (state.base, state.base_opt)
      if train_base
      else (state.upper, state.upper_opt)
    )
    estimate = zo.estimate(
      objective,
      moved,
      keys.direction,
      hparams.zo_eps,
      sampler=sampler,
      estimator=estimator,
      num_directions=num_directions,
      subspace_key=keys.subspace,
      map_fn=map_fn,
    )
    moved, opt_state, move = outer.apply_transform(
      transform, moved, opt_state, estimate, sampler, objective, keys.rounding
    )
    info = BaselineInfo(
      jnp.mean(estimate.values, axis=-1), estimate.coefficients
    )
    if train_base:
      info = info._replace(move=move)
      state = state._replace(base=moved, base_opt=opt_state)
    else:
      state = state._replace(upper=moved, upper_opt=opt_state)
    return state._replace(step=state.step + 1), info

  return BilevelAlgorithm(_make_init(transform.init, train_base), step)


def two_stage(
  first: BilevelAlgorithm,
  second: BilevelAlgorithm,
  first_stage_steps: int,
) -> BilevelAlgorithm:
  """Joins two algorithms that move different things: the backbone, an adapter.

  Args:
    first: takes the iterations 0 to `first_stage_steps` - 1.
    second: takes all later ones.
    first_stage_steps: how many the first takes.

  Returns:
    The algorithm, in whose info losses are means, of shape [], and an iteration
    without a zeroth-order step has zeros in the place of one.
  """

  def init(key, base, adapter, unused=None):
    one, other = (a.init(key, base, adapter, unused) for a in (first, second))

    def merge_opt_state(name):  # () where an algorithm does not move it
      mine = getattr(one, name)
      unmoved = type(mine) is tuple and not mine
      return getattr(other, name) if unmoved else mine

    return one._replace(
      base_opt=merge_opt_state("base_opt"),
      upper_opt=merge_opt_state("upper_opt"),
    )

  def step(state, batch, hparams):
    infos = [
      jax.eval_shape(one.step, state, batch, hparams)[1]
      for one in (first, second)
    ]
    widest: Any = max(infos, key=lambda info: info.coefficients.size)
    blank = jax.tree.map(
      lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
      (widest.coefficients, widest.move),
    )

    def alike(one):
      def call(state, batch, hparams):
        state, info = one.step(state, batch, hparams)
        moved = (info.coefficients, info.move)
        if not info.coefficients.size:
          moved = blank
        return state, BaselineInfo(jnp.mean(info.upper_loss), *moved)

      return call

    return jax.lax.cond(
      state.step < first_stage_steps,
      alike(first),
      alike(second),
      state,
      batch,
      hparams,
    )

  return BilevelAlgorithm(init, step)
