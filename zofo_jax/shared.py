"""Training on the mean loss of many tasks, with nothing that is a task's own.

What meta-training is compared with: one adapter for all tasks by first-order
steps, all weights by first-order steps (as MetaICL), all weights by
zeroth-order steps (MeZO). Each is an (init, step) pair like Bilevel-ZOFO's, on
the same batches of tasks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from zofo_jax import bilevel, inner, moves, outer, zo
from zofo_jax import sampler as sampler_lib


class SharedInfo(NamedTuple):
  """What an iteration tells a logger.

  Attributes:
    upper_loss: the tasks' mean loss at every update, float32 [updates].
    coefficients: directional derivatives, float32 [Q]; Q = 0 without any.
    move: what was added to theta; None if it was not added in place.
  """

  upper_loss: jax.Array
  coefficients: jax.Array
  move: moves.Move | None = None


def mean_loss(loss_fn: inner.LossFn, weights: jax.Array | None) -> inner.LossFn:
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


def _start(key, base, upper, base_opt=(), upper_opt=()):
  """Returns a state without s."""
  return bilevel.BilevelState(
    step=jnp.zeros([], jnp.int32),
    base=base,
    upper=upper,
    lower={},
    base_opt=base_opt,
    upper_opt=upper_opt,
    lower_opt=(),
    key=key,
  )


def make_first_order_step(
  loss_fn: inner.LossFn,
  tx: optax.GradientTransformation,
  *,
  whole: bool = False,
) -> bilevel.BilevelAlgorithm:
  """Makes first-order training of one adapter, or of all weights.

  An iteration takes T steps, on the batches `batch.lower`, leaves [M, T, ...].

  Args:
    loss_fn: loss of one task's batch.
    tx: optax transformation of what moves.
    whole: move the backbone, with no adapter; else the adapter alone.

  Returns:
    The algorithm: init(key, base, adapter), and step.
  """

  def init(key, base, adapter):
    if whole:
      return _start(key, base, {}, base_opt=tx.init(base))
    return _start(key, base, adapter, upper_opt=tx.init(adapter))

  def step(state, batch, hparams):
    del hparams
    loss = mean_loss(loss_fn, batch.weights)
    rows = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), batch.lower)
    key = jax.random.fold_in(state.key, state.step)
    if whole:
      base, base_opt, losses = inner.minimize(
        lambda adapter, base, *rest: loss(base, adapter, *rest),
        {},
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
    info = SharedInfo(losses, jnp.zeros([0], jnp.float32))
    return state._replace(step=state.step + 1), info

  return bilevel.BilevelAlgorithm(init, step)


def make_zeroth_order_step(
  loss_fn: inner.LossFn,
  *,
  base_tx: outer.OuterTransform | optax.GradientTransformation,
  sampler: sampler_lib.Sampler = sampler_lib.Sampler(),
  estimator: zo.Estimator = zo.central,
  num_directions: int = 1,
  frame_steps: int = 1,
) -> bilevel.BilevelAlgorithm:
  """Makes MeZO over tasks: theta alone, along one estimate of the mean loss.

  An iteration takes one step, on the batch `batch.upper`, leaves [M, ...].

  Args:
    loss_fn: loss of one task's batch.
    base_tx: as for `bilevel_step`, and so are the others.
    sampler: which weights are probed and along what directions.
    estimator: `zo.central`, `zo.forward` or `zo.exact`.
    num_directions: Q, averaged.
    frame_steps: iterations for which directions share their frame.

  Returns:
    The algorithm: init(key, base, adapter), the adapter unused, and step.
  """
  transform = outer.as_outer(base_tx)

  def init(key, base, adapter):
    del adapter
    return _start(key, base, {}, base_opt=transform.init(base))

  def step(state, batch, hparams):
    loss = mean_loss(loss_fn, batch.weights)
    keys = moves.step_keys(state.key, state.step, frame_steps)
    objective = lambda base: loss(base, {}, batch.upper, None)
    estimate = zo.estimate(
      objective,
      state.base,
      keys.direction,
      hparams.zo_eps,
      sampler=sampler,
      estimator=estimator,
      num_directions=num_directions,
      frame_key=keys.frame,
    )
    base, base_opt, move = outer.take(
      transform,
      state.base,
      state.base_opt,
      estimate,
      sampler,
      objective,
      keys.rounding,
    )
    info = SharedInfo(
      jnp.mean(estimate.values, axis=-1), estimate.coefficients, move
    )
    state = state._replace(base=base, base_opt=base_opt, step=state.step + 1)
    return state, info

  return bilevel.BilevelAlgorithm(init, step)
