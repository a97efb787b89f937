"""One outer iteration of Bilevel-ZOFO (arXiv 2502.03604, Algorithm 2).

With theta the backbone, p the adapter that is kept and s an auxiliary one,
minimise over (theta, p) and maximise over s

  G(theta, p, s) = L(theta, p; D_f) + lam (L(theta, p; D_p) - L(theta, s; D_p)).

An iteration takes T first-order steps on s, one first-order step on p, and one
zeroth-order step on theta; p and theta move together, from the same point.

Over several tasks each has its own p and s, stacked on a leading axis, and
theta descends the mean of their G along one estimate.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from zofo_jax.core import inner, loss_terms, outer, zo
from zofo_jax.core import keys as keys_lib
from zofo_jax.core import sampler as sampler_lib
from zofo_jax.core.types import (
  BilevelAlgorithm,
  BilevelBatch,
  BilevelHParams,
  BilevelInfo,
  BilevelState,
  LossFn,
)


def _over_tasks(fn: Callable[..., Any], num_tasks: int | None) -> Any:
  """Maps a function over the tasks' axis of its arguments, if there is one.

  A single task is computed without the axis, so that the results are those of a
  step without it, bit for bit.
  """
  if num_tasks is None:
    return fn
  if num_tasks > 1:
    return jax.vmap(fn)

  def call(*args):
    result = fn(*jax.tree.map(lambda leaf: leaf[0], args))
    return jax.tree.map(lambda leaf: leaf[None], result)

  return call


def bilevel_step(
  state: BilevelState,
  batch: BilevelBatch,
  hparams: BilevelHParams = BilevelHParams(),
  *,
  lower_loss_fn: LossFn,
  upper_loss_fn: LossFn,
  probe_loss_fn: LossFn | None = None,
  lower_tx: optax.GradientTransformation,
  upper_tx: optax.GradientTransformation,
  base_tx: outer.OuterTransform | optax.GradientTransformation,
  sampler: sampler_lib.Sampler = sampler_lib.Sampler(),
  estimator: zo.Estimator = zo.central,
  num_directions: int = 1,
  per_example: bool = False,
  frame_steps: int = 1,
  over_tasks: bool = False,
  map_fn: zo.MapFn = jax.lax.map,
) -> tuple[BilevelState, BilevelInfo]:
  """Takes one outer iteration; a pure function, to be jitted by the caller.

  Donate `state` for the update of theta to happen in place.

  Args:
    state: where the run stands.
    batch: the rows of this iteration.
    hparams: radius eps and penalty lam, traced.
    lower_loss_fn: L on D_p, (base, adapter, batch, key) -> scalar. The key is
      None in the zeroth-order evaluations, which must be deterministic.
    upper_loss_fn: L on D_f; pass the same function to share evaluations.
    probe_loss_fn: what the step on theta measures in both losses' stead; need
      not be differentiable, unless the estimator is `zo.exact`.
    lower_tx: optax transformation of s.
    upper_tx: optax transformation of p.
    base_tx: transformation of theta: `outer.sgd` (in place), or any optax one.
    sampler: which weights of theta are probed and along what directions.
    estimator: `zo.central`, `zo.forward` or `zo.exact`.
    num_directions: Q, averaged.
    per_example: give every example a direction of its own instead, for
      `directions.PerExample`; the outer batches must be of one size.
    frame_steps: outer iterations for which directions share their frame, such
      as the subspace of `directions.LowRank`.
    over_tasks: p, s, their optimizer states and the batch have a leading axis
      of M tasks. Each task takes its own first-order steps; theta, which all
      share, moves along one estimate of the tasks' mean (weighted by
      `batch.weights`) of G. One task takes the operations of the step without
      the axis, bit for bit.
    map_fn: how directions are evaluated; see `zo.estimate`.

  Returns:
    The new state and what to log.
  """
  keys = keys_lib.step_keys(state.key, state.step, frame_steps)
  penalty = jnp.asarray(hparams.penalty, jnp.float32)

  num_tasks = None
  adapter_keys = (keys.lower, keys.upper)
  if over_tasks:
    num_tasks = jax.tree.leaves(batch.upper)[0].shape[0]
    adapter_keys = jax.tree.map(
      lambda key: (
        jax.random.split(key, num_tasks) if num_tasks > 1 else key[None]
      ),
      adapter_keys,
    )

  def move_adapters(upper, upper_opt, lower, lower_opt, rows, adapter_keys):
    lower_key, upper_key = adapter_keys
    lower, lower_opt, lower_loss = inner.minimize(
      lower_loss_fn,
      state.base,
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
    losses, grads = loss_terms.loss_gradients(
      upper_terms, state.base, jax.random.split(upper_key, 2)
    )
    grads = jax.tree.map(lambda f, g: (f + penalty * g).astype(f.dtype), *grads)
    upper, upper_opt, norm = inner.apply_gradients(
      grads, upper_opt, upper, tx=upper_tx
    )
    metrics = (lower_loss, losses[0], losses[1], norm)
    return upper, upper_opt, lower, lower_opt, metrics

  upper, upper_opt, lower, lower_opt, adapter_metrics = _over_tasks(
    move_adapters, num_tasks
  )(
    state.upper,
    state.upper_opt,
    state.lower,
    state.lower_opt,
    batch._replace(weights=None),
    adapter_keys,
  )
  lower_loss, upper_loss, penalty_loss, upper_grad_norm = adapter_metrics

  def penalized(base, rows=batch.upper, penalty_rows=batch.penalty):
    upper_fn = probe_loss_fn or upper_loss_fn
    lower_fn = probe_loss_fn or lower_loss_fn

    def of_task(upper, lower, rows, penalty_rows):
      terms = (
        (upper_fn, upper, rows),
        (lower_fn, upper, penalty_rows),
        (lower_fn, lower, penalty_rows),
      )
      upper_loss, penalty_loss, lower_loss = loss_terms.evaluate_losses(
        terms, base, None
      )
      return upper_loss + penalty * (penalty_loss - lower_loss)

    # Within the tasks' axis theta has none: a weight is perturbed once for all.
    values = _over_tasks(of_task, num_tasks)(
      state.upper, lower, rows, penalty_rows
    )
    return jnp.average(values, weights=batch.weights) if over_tasks else values

  estimate_fn = functools.partial(
    zo.estimate_per_example if per_example else zo.estimate,
    key=keys.direction,
    eps=hparams.zo_eps,
    sampler=sampler,
    estimator=estimator,
    subspace_key=keys.subspace,
  )
  if per_example:
    # Behind the tasks' axis; an example is then one row of every task.
    axis = int(over_tasks)
    one_row = lambda leaf: jnp.expand_dims(leaf, axis)
    estimate = estimate_fn(
      lambda base, rows: penalized(base, *jax.tree.map(one_row, rows)),
      state.base,
      jax.tree.map(
        lambda leaf: jnp.moveaxis(leaf, axis, 0), (batch.upper, batch.penalty)
      ),
    )
  else:
    estimate = estimate_fn(
      penalized, state.base, num_directions=num_directions, map_fn=map_fn
    )
  # p and theta move together: a broken gradient of p drops every direction. It
  # also tells the compiler that p's passes end before theta is written; not
  # knowing, it copies all layers' weights.
  estimate = estimate.mask_nonfinite(jnp.all(jnp.isfinite(upper_grad_norm)))
  base, base_opt, move = outer.apply_transform(
    outer.to_outer_transform(base_tx),
    state.base,
    state.base_opt,
    estimate,
    sampler,
    penalized,
    keys.rounding,
  )

  new_state = BilevelState(
    step=state.step + 1,
    base=base,
    upper=upper,
    lower=lower,
    base_opt=base_opt,
    upper_opt=upper_opt,
    lower_opt=lower_opt,
    key=state.key,
  )
  info = BilevelInfo(
    lower_loss=lower_loss,
    upper_loss=upper_loss,
    penalty_loss=penalty_loss,
    objective=jnp.mean(estimate.values),
    coefficients=estimate.coefficients,
    num_nonfinite=estimate.num_nonfinite,
    upper_grad_norm=upper_grad_norm,
    move=move,
  )
  return new_state, info


def make_bilevel_step(
  lower_loss_fn: LossFn,
  upper_loss_fn: LossFn | None = None,
  *,
  probe_loss_fn: LossFn | None = None,
  lower_tx: optax.GradientTransformation,
  upper_tx: optax.GradientTransformation,
  base_tx: outer.OuterTransform | optax.GradientTransformation,
  sampler: sampler_lib.Sampler = sampler_lib.Sampler(),
  estimator: zo.Estimator = zo.central,
  num_directions: int = 1,
  per_example: bool = False,
  frame_steps: int = 1,
  over_tasks: bool = False,
  map_fn: zo.MapFn = jax.lax.map,
) -> BilevelAlgorithm:
  """Binds losses and optimizers into an (init, step) pair.

  Arguments as for `bilevel_step`; `upper_loss_fn` is `lower_loss_fn` unless
  given.

  Returns:
    The algorithm. `step` is not jitted.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> import zofo_jax as zofo
    >>> def loss(base, adapter, batch, key):
    ...   return jnp.mean((base["w"] + adapter - batch) ** 2)
    >>> algorithm = zofo.make_bilevel_step(
    ...     loss, lower_tx=optax.adam(1e-2), upper_tx=optax.adam(1e-2),
    ...     base_tx=zofo.outer.sgd(1e-3))
    >>> state = algorithm.init(
    ...     jax.random.key(0), {"w": jnp.zeros(4)}, jnp.zeros(4), jnp.zeros(4))
    >>> batch = zofo.BilevelBatch(
    ...     lower=jnp.ones((3, 4)), penalty=jnp.ones(4), upper=jnp.ones(4))
    >>> step = jax.jit(algorithm.step, donate_argnums=0)
    >>> state, info = step(state, batch, zofo.BilevelHParams(penalty=10.0))
    >>> int(state.step), info.lower_loss.shape
    (1, (3,))
  """
  upper_loss_fn = upper_loss_fn or lower_loss_fn
  base_transform = outer.to_outer_transform(base_tx)
  map_tasks = jax.vmap if over_tasks else lambda fn: fn

  def init(key, base, upper, lower):
    return BilevelState(
      step=jnp.zeros([], jnp.int32),
      base=base,
      upper=upper,
      lower=lower,
      base_opt=base_transform.init(base),
      upper_opt=map_tasks(upper_tx.init)(upper),
      lower_opt=map_tasks(lower_tx.init)(lower),
      key=key,
    )

  step = functools.partial(
    bilevel_step,
    lower_loss_fn=lower_loss_fn,
    upper_loss_fn=upper_loss_fn,
    probe_loss_fn=probe_loss_fn,
    lower_tx=lower_tx,
    upper_tx=upper_tx,
    base_tx=base_transform,
    sampler=sampler,
    estimator=estimator,
    num_directions=num_directions,
    per_example=per_example,
    frame_steps=frame_steps,
    over_tasks=over_tasks,
    map_fn=map_fn,
  )
  return BilevelAlgorithm(init, step)
