"""The parts of an outer iteration, which `bilevel.bilevel_step` puts together.

First-order steps on s and p, a zeroth-order step on theta along random
directions, and a step on theta along what s has learned.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from zofo_jax.core import guided, inner, loss_terms, outer, population
from zofo_jax.core import keys as keys_lib
from zofo_jax.core import zo as zo_lib
from zofo_jax.core.types import BilevelBatch, BilevelState, LossFn, Params
from zofo_jax.core.zeroth_order import ZerothOrder


class Adapters(NamedTuple):
  """p and s after their steps, and what these steps measured."""

  upper: Params
  upper_opt: Any
  lower: Params
  lower_opt: Any
  lower_loss: jax.Array
  upper_loss: jax.Array
  penalty_loss: jax.Array
  upper_grad_norm: jax.Array
  aux: Any


class Theta(NamedTuple):
  """Theta after its step, and what this step measured; see `BilevelInfo`."""

  base: Params
  base_opt: Any
  move: Any
  values: jax.Array
  coefficients: jax.Array
  num_nonfinite: jax.Array
  lengths: Any = None
  history: Any = None
  earlier: Any = None


def first_order_steps(
  state: BilevelState,
  read_base: Params,
  batch: BilevelBatch,
  keys: keys_lib.StepKeys,
  penalty: jax.Array,
  losses: tuple[LossFn, LossFn],
  lower_value_fn: LossFn,
  *,
  lower_tx: optax.GradientTransformation,
  upper_tx: optax.GradientTransformation,
  has_aux: bool,
  num_tasks: int | None,
) -> Adapters:
  """Takes T steps on s and one on p, for each task.

  `read_base` is theta as losses read it; see `outer.OuterTransform`.
  """
  lower_loss_fn, upper_loss_fn = losses

  def steps_of_a_task(upper, upper_opt, lower, lower_opt, rows, adapter_keys):
    lower_key, upper_key = adapter_keys
    lower, lower_opt, lower_loss = inner.minimize(
      lower_value_fn,
      read_base,
      lower,
      lower_opt,
      rows.lower,
      lower_key,
      tx=lower_tx,
    )
    upper_terms = (
      (upper_loss_fn, upper, rows.upper),
      (lower_loss_fn, upper, rows.penalty),
    )
    losses, grads, aux = loss_terms.loss_gradients(
      upper_terms, read_base, jax.random.split(upper_key, 2), has_aux=has_aux
    )
    grads = jax.tree.map(lambda f, g: (f + penalty * g).astype(f.dtype), *grads)
    upper, upper_opt, norm = inner.apply_gradients(
      grads, upper_opt, upper, tx=upper_tx
    )
    metrics = (lower_loss, losses[0], losses[1], norm, aux[0])
    return Adapters(upper, upper_opt, lower, lower_opt, *metrics)

  adapter_keys = (keys.lower, keys.upper)
  if num_tasks is not None:
    adapter_keys = jax.tree.map(
      lambda key: (
        jax.random.split(key, num_tasks) if num_tasks > 1 else key[None]
      ),
      adapter_keys,
    )
  return loss_terms.over_tasks(steps_of_a_task, num_tasks)(
    state.upper,
    state.upper_opt,
    state.lower,
    state.lower_opt,
    batch._replace(weights=None, probe=None, scores=None),
    adapter_keys,
  )


def zeroth_order_step(
  state: BilevelState,
  read_base: Params,
  batch: BilevelBatch,
  keys: keys_lib.StepKeys,
  lower: Params,
  objective_fn: Callable[..., jax.Array],
  may_move: jax.Array,
  *,
  eps: jax.typing.ArrayLike,
  base_tx: outer.OuterTransform,
  zo: ZerothOrder,
  shaping: population.Shaping,
  axis: int,
) -> Theta:
  """Moves theta along random directions, at p before its step and s after."""
  rows = (batch.upper, batch.penalty)

  def objective_on(base, rows):
    return objective_fn(base, state.upper, lower, rows)

  if batch.scores is None:
    objective_of_base = lambda base: objective_on(base, rows)
    estimate = zo_lib.estimate_on_batch(
      objective_on,
      read_base,
      rows,
      keys.direction,
      eps,
      zo,
      axis=axis,
      subspace_key=keys.subspace,
    )
  else:
    objective_of_base = population.no_objective
    estimate = population.estimate(batch.scores, keys, eps, shaping)
  estimate = estimate.mask_nonfinite(may_move)
  base, base_opt, move = outer.apply_transform(
    base_tx,
    state.base,
    state.base_opt,
    estimate,
    zo.sampler,
    objective_of_base,
    keys.rounding,
  )
  return Theta(
    base,
    base_opt,
    move,
    estimate.values,
    estimate.coefficients,
    estimate.num_nonfinite,
  )


def guided_step(
  state: BilevelState,
  batch: BilevelBatch,
  keys: keys_lib.StepKeys,
  theta: Theta,
  adapters: Adapters,
  objective_fn: Callable[..., jax.Array],
  may_move: jax.Array,
  *,
  guide: guided.Guide,
  lower_tx: optax.GradientTransformation,
  num_tasks: int | None,
) -> tuple[Theta, Adapters]:
  """Moves theta along what s has learned, and s back by as much."""

  def objective_of_base(base, index):
    rows = batch.upper
    if batch.probe is not None:
      rows = jax.tree.map(
        lambda leaf: jnp.take(leaf, index, axis=int(num_tasks is not None)),
        batch.probe,
      )
    return objective_fn(
      base, state.upper, None, (rows, batch.penalty), guide.penalty
    )

  shares = None
  if num_tasks is not None:
    weights = batch.weights
    weights = jnp.ones(num_tasks) if weights is None else weights
    shares = weights / jnp.sum(weights)
  followed = guided.follow(
    guide,
    objective_of_base,
    theta.base,
    state.lower,
    adapters.lower,
    guided.step_key(keys),
    allowed=may_move,
    shares=shares,
    history=state.history,
  )
  theta = theta._replace(
    base=followed.base,
    values=jnp.concatenate([theta.values.ravel(), followed.values]),
    num_nonfinite=theta.num_nonfinite + followed.num_nonfinite,
    lengths=followed.lengths,
    history=followed.history,
    earlier=followed.earlier,
  )
  lower_opt = adapters.lower_opt
  if guide.reset:  # moments of zero, other numbers unchanged
    lower_opt = optax.tree.map_params(
      lower_tx.init, jnp.zeros_like, adapters.lower_opt
    )
  return theta, adapters._replace(lower=followed.lower, lower_opt=lower_opt)
