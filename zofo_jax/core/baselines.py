"""Baselines of Bilevel-ZOFO, as (init, step) pairs over the same state.

First order: an adapter, or all weights (over tasks: as MetaICL). Zeroth order:
all weights (MeZO, arXiv 2305.17333, Algorithm 1), or an adapter. Two stages:
one of them after the other. These minimise the loss L(theta, p) itself, on one
set of rows; over many tasks the mean of their losses, with one adapter for all.
Evolution strategies: all weights, or an adapter, by scores from outside.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from zofo_jax.core import checks, es, inner, mezo, outer, population
from zofo_jax.core.types import (
  BilevelAlgorithm,
  BilevelState,
  InPlaceUpdate,
  LossFn,
)
from zofo_jax.core.zeroth_order import ZerothOrder

_LOSS_ARGUMENTS = ("base", "adapter", "batch", "key")


class BaselineInfo(NamedTuple):
  """Metrics of one iteration.

  Attributes:
    upper_loss: L(theta, p) at every update, float32 [updates]; for zeroth
      order, the mean over the points of each direction, [Q].
    coefficients: directional derivatives, float32 [Q]; Q = 0 for first order.
    move: the in-place update of theta; None if there was none.
  """

  upper_loss: jax.Array
  coefficients: jax.Array
  move: InPlaceUpdate | None = None


def mean_loss(loss_fn: LossFn, weights: jax.Array | None) -> LossFn:
  """Returns the mean over tasks of a loss at one adapter.

  Args:
    loss_fn: loss of one task's batch.
    weights: weights of the tasks, float32 [M]; None for equal ones.

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


def _make_init(
  opt_init: Callable[[Any], Any],
  train_base: bool,
  zo: ZerothOrder | None = None,
) -> Any:
  """Returns init(key, base, adapter) for updates of one of the two; without s.

  `zo` is checked against the parameters that it perturbs.
  """

  def init(key, base, adapter, lower=None):
    del lower
    checks.check_arrays(base, "base")
    checks.check_arrays(adapter, "the adapter")
    if zo is not None and train_base:
      checks.check_sampler(zo.sampler, base, "base")
    elif zo is not None:
      checks.check_sampler(zo.sampler, adapter, "the adapter")
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
  """Returns first-order training of an adapter, or of all weights.

  An iteration takes T steps, on the batches `batch.lower`.

  Args:
    loss_fn: loss of a batch; over tasks, of one task's.
    tx: optax transformation of the trained parameters.
    train_base: update the backbone and keep the adapter fixed; otherwise update
      the adapter.
    over_tasks: the batch has a leading axis of M tasks: leaves [M, T, ...], not
      [T, ...].

  Returns:
    The algorithm: init(key, base, adapter), and step.

  Examples:
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
  checks.check_arguments(loss_fn, "loss_fn", _LOSS_ARGUMENTS)

  def step(state, batch, hparams):
    del hparams
    loss, rows = checks.checked_loss(loss_fn, "loss_fn"), batch.lower
    if over_tasks:
      loss = mean_loss(loss, batch.weights)
      rows = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), rows)
    key = jax.random.fold_in(state.key, state.step)
    if train_base:
      base, base_opt, losses = inner.minimize(
        lambda adapter, base, *args: loss(base, adapter, *args),
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
  loss_fn: LossFn | None,
  tx: outer.OuterTransform | optax.GradientTransformation,
  zo: ZerothOrder = ZerothOrder(),
  *,
  train_base: bool = True,
  over_tasks: bool = False,
  shaping: population.Shaping = population.unshaped,
) -> BilevelAlgorithm:
  """Returns MeZO on the backbone, or on an adapter; see `mezo.make_mezo_step`.

  An iteration takes one step, on the batch `batch.upper`; or, without a loss,
  by `batch.scores` (see `es.es_step`).

  Args:
    loss_fn: loss of a batch; over tasks, of one task's; None for scores.
    tx: transformation of the trained parameters: `outer.sgd` (in place), or any
      optax one.
    zo: how the gradient is estimated.
    train_base: update the backbone and keep the adapter fixed; otherwise update
      the adapter.
    over_tasks: the batch has a leading axis of M tasks.
    shaping: of the scores; see `population.estimate`.

  Returns:
    The algorithm: init(key, base, adapter), and step.

  Raises:
    ValueError: `zo.per_example` over tasks; in `init`, the parameters do not
      fit the sampler.
  """
  if loss_fn is not None:
    checks.check_arguments(loss_fn, "loss_fn", _LOSS_ARGUMENTS)
  if over_tasks and zo.per_example:
    raise ValueError(
      "make_zeroth_order_step: expected no per_example over tasks."
    )
  transform = outer.to_outer_transform(tx)

  def take_step(state, other, batch, hparams):
    """Moves the parameters of a state; `other` are those that stay."""
    if loss_fn is None:
      return es.es_step(
        state, batch.scores, hparams, tx=transform, zo=zo, shaping=shaping
      )
    loss = mean_loss(loss_fn, batch.weights) if over_tasks else loss_fn

    def objective(params, rows):
      trees = (params, other) if train_base else (other, params)
      return loss(*trees, rows, None)

    return mezo.mezo_step(
      state, batch.upper, hparams, loss_fn=objective, tx=transform, zo=zo
    )

  def step(state, batch, hparams):
    trained, other = (state.base, state.base_opt), state.upper
    if not train_base:
      trained, other = (state.upper, state.upper_opt), state.base
    after, metrics = take_step(
      mezo.MezoState(state.step, *trained, state.key), other, batch, hparams
    )
    info = BaselineInfo(jnp.mean(metrics.values, axis=-1), metrics.coefficients)
    if train_base:
      info = info._replace(move=metrics.move)
      state = state._replace(base=after.params, base_opt=after.opt_state)
    else:
      state = state._replace(upper=after.params, upper_opt=after.opt_state)
    return state._replace(step=after.step), info

  return BilevelAlgorithm(_make_init(transform.init, train_base, zo), step)


def two_stage(
  first: BilevelAlgorithm,
  second: BilevelAlgorithm,
  first_stage_steps: int,
) -> BilevelAlgorithm:
  """Joins two algorithms, of which one trains the backbone, one the adapter.

  Args:
    first: algorithm of the iterations 0 to `first_stage_steps` - 1.
    second: algorithm of all later iterations.
    first_stage_steps: number of iterations of the first stage.

  Returns:
    The algorithm. In its info the loss is a mean, of shape [], and coefficients
    and move are zeros in the first-order stage.
  """

  def init(key, base, adapter, lower=None):
    first_state, second_state = (
      algorithm.init(key, base, adapter, lower) for algorithm in (first, second)
    )

    def merge_opt_state(name):  # () where an algorithm does not train it
      state = getattr(first_state, name)
      untrained = type(state) is tuple and not state
      return getattr(second_state, name) if untrained else state

    return first_state._replace(
      base_opt=merge_opt_state("base_opt"),
      upper_opt=merge_opt_state("upper_opt"),
    )

  def step(state, batch, hparams):
    infos = [
      jax.eval_shape(algorithm.step, state, batch, hparams)[1]
      for algorithm in (first, second)
    ]
    zeroth_order: Any = max(infos, key=lambda info: info.coefficients.size)
    zeros = jax.tree.map(
      lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
      (zeroth_order.coefficients, zeroth_order.move),
    )

    def same_structure(algorithm):
      """Both branches of a conditional must return the same structure."""

      def call(state, batch, hparams):
        state, info = algorithm.step(state, batch, hparams)
        update = (info.coefficients, info.move)
        if not info.coefficients.size:
          update = zeros
        return state, BaselineInfo(jnp.mean(info.upper_loss), *update)

      return call

    return jax.lax.cond(
      state.step < first_stage_steps,
      same_structure(first),
      same_structure(second),
      state,
      batch,
      hparams,
    )

  return BilevelAlgorithm(init, step)
