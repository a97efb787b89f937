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
from typing import Any

import jax
import jax.numpy as jnp
import optax

from zofo_jax.core import checks, guided, inner, loss_terms, outer, population
from zofo_jax.core import keys as keys_lib
from zofo_jax.core import zo as zo_lib
from zofo_jax.core.types import (
  BilevelAlgorithm,
  BilevelBatch,
  BilevelHParams,
  BilevelInfo,
  BilevelState,
  LossFn,
  Params,
)
from zofo_jax.core.zeroth_order import ZerothOrder


def _checked_losses(
  lower_loss_fn: LossFn, upper_loss_fn: LossFn, has_aux: bool
) -> tuple[LossFn, LossFn]:
  """Checks what the losses return; equal functions remain equal."""
  lower_fn = checks.checked_loss(lower_loss_fn, "lower_loss_fn", has_aux)
  if upper_loss_fn == lower_loss_fn:
    return lower_fn, lower_fn
  return lower_fn, checks.checked_loss(upper_loss_fn, "upper_loss_fn", has_aux)


def _copy_shared(tree: Params, other: Params) -> Params:
  """Copies the leaves of a tree that are those of another.

  A buffer that is in a state twice cannot be donated.
  """
  others = {id(leaf) for leaf in jax.tree.leaves(other)}
  return jax.tree.map(
    lambda leaf: leaf.copy() if id(leaf) in others else leaf, tree
  )


def _reset(tx: optax.GradientTransformation, state: Any) -> Any:
  """Returns an optimizer's state with moments of zero and its other numbers."""
  return optax.tree.map_params(tx.init, jnp.zeros_like, state)


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
  zo: ZerothOrder = ZerothOrder(),
  guide: guided.Guide | None = None,
  shaping: population.Shaping = population.unshaped,
  has_aux: bool = False,
  over_tasks: bool = False,
) -> tuple[BilevelState, BilevelInfo]:
  """Takes one outer iteration; a pure function, to be jitted by the caller.

  Donate `state` for the update of theta to happen in place.

  Args:
    state: parameters, optimizer states, step and key.
    batch: rows of this iteration.
    hparams: radius eps and penalty lam, traced.
    lower_loss_fn: L on D_p, (base, adapter, batch, key) -> scalar. The key is
      None in the zeroth-order evaluations, which must be deterministic.
    upper_loss_fn: L on D_f; pass the same function to share evaluations.
    probe_loss_fn: objective of the step on theta, in place of both losses. Need
      not be differentiable, unless the estimator is `zo.exact`.
    lower_tx: optax transformation of s.
    upper_tx: optax transformation of p.
    base_tx: transformation of theta: `outer.sgd` (in place), or any optax one.
    zo: how the gradient of theta is estimated. With `per_example`, all leaves
      of `batch.upper` and `batch.penalty` must have the same number of
      examples, on their first axis (behind that of the tasks).
    guide: how theta follows what the inner steps have changed in s, in place of
      the zeroth-order step along `zo`, or besides; see `guided`. None: it does
      not, as in the paper.
    shaping: of `batch.scores`, if there are any; see `population.estimate`.
    has_aux: whether the lower and the upper loss return (scalar, aux). The aux
      of L(theta, p; D_f), from the step on p, is returned in the info.
    over_tasks: p, s, their optimizer states and the batch have a leading axis
      of M tasks. Each task takes its own first-order steps; theta, which all
      share, moves along one estimate of the tasks' mean (weighted by
      `batch.weights`) of G. With one task, the step is bitwise equal to the
      step without the axis.

  Returns:
    The new state and the metrics of the iteration.

  Raises:
    ValueError: a loss is not a floating-point scalar, `batch.lower` lacks the
      axis of the inner steps, or the batches differ in size with
      `zo.per_example`; there are scores, and `base_tx` evaluates an objective.
  """
  checks.check_lower_batch(batch, axis=int(over_tasks))
  lower_loss_fn, upper_loss_fn = _checked_losses(
    lower_loss_fn, upper_loss_fn, has_aux
  )
  lower_value_fn, upper_value_fn = lower_loss_fn, upper_loss_fn
  if has_aux:
    lower_value_fn, upper_value_fn = loss_terms.without_aux(
      lower_loss_fn, upper_loss_fn
    )
  keys = keys_lib.step_keys(state.key, state.step, zo.subspace_steps)
  base_tx = outer.to_outer_transform(base_tx)
  if guide is not None:
    outer.check_writes(base_tx, "a guided step changes")
  if batch.scores is not None:
    outer.check_writes(base_tx, "scores from outside of the program read")
  read_base = base_tx.read(state.base, state.base_opt, zo.sampler)
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
    return upper, upper_opt, lower, lower_opt, metrics

  upper, upper_opt, lower, lower_opt, adapter_metrics = loss_terms.over_tasks(
    move_adapters, num_tasks
  )(
    state.upper,
    state.upper_opt,
    state.lower,
    state.lower_opt,
    batch._replace(weights=None, probe=None, scores=None),
    adapter_keys,
  )
  lower_loss, upper_loss, penalty_loss, upper_grad_norm, aux = adapter_metrics

  penalized = loss_terms.make_objective(
    probe_loss_fn or upper_value_fn,
    probe_loss_fn or lower_value_fn,
    penalty,
    num_tasks,
    batch.weights,
  )
  rows = (batch.upper, batch.penalty)
  # If p's gradient is not finite, theta does not move either. This data
  # dependency also lets XLA update theta in place: without it, it copies all
  # weights.
  may_move = jnp.all(jnp.isfinite(upper_grad_norm))
  base, base_opt, move = state.base, state.base_opt, None
  values, coefficients = jnp.zeros([0]), jnp.zeros([0])
  num_nonfinite = jnp.zeros([], jnp.int32)
  if guide is None or guide.random:
    if batch.scores is None:
      objective_of_base = lambda base: penalized(base, state.upper, lower, rows)
      estimate = zo_lib.estimate_on_batch(
        lambda base, rows: penalized(base, state.upper, lower, rows),
        read_base,
        rows,
        keys.direction,
        hparams.zo_eps,
        zo,
        axis=int(over_tasks),
        subspace_key=keys.subspace,
      )
    else:
      objective_of_base = population.no_objective
      estimate = population.estimate(
        batch.scores, keys, hparams.zo_eps, shaping
      )
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
    values, coefficients = estimate.values, estimate.coefficients
    num_nonfinite = estimate.num_nonfinite

  lengths = None
  if guide is not None:

    def probed(base, index):
      probe = batch.upper
      if batch.probe is not None:
        probe = jax.tree.map(
          lambda leaf: jnp.take(leaf, index, axis=int(over_tasks)), batch.probe
        )
      return penalized(
        base, state.upper, None, (probe, batch.penalty), guide.penalty
      )

    shares = None
    if over_tasks:
      weights = batch.weights
      weights = jnp.ones(num_tasks) if weights is None else weights
      shares = weights / jnp.sum(weights)
    followed = guided.follow(
      guide,
      probed,
      base,
      state.lower,
      lower,
      guided.step_key(keys),
      allowed=may_move,
      shares=shares,
    )
    base, lower, lengths = followed.base, followed.lower, followed.lengths
    values = jnp.concatenate([values.ravel(), followed.values])
    num_nonfinite += followed.num_nonfinite
    if guide.reset:
      lower_opt = _reset(lower_tx, lower_opt)
  objective = upper_loss + penalty * penalty_loss
  objective = jnp.mean(values if values.size else objective)

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
    objective=objective,
    coefficients=coefficients,
    num_nonfinite=num_nonfinite,
    upper_grad_norm=upper_grad_norm,
    move=move,
    aux=aux if has_aux else None,
    lengths=lengths,
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
  zo: ZerothOrder = ZerothOrder(),
  guide: guided.Guide | None = None,
  shaping: population.Shaping = population.unshaped,
  has_aux: bool = False,
  over_tasks: bool = False,
) -> BilevelAlgorithm:
  """Binds losses and optimizers into an (init, step) pair.

  Arguments are those of `bilevel_step`; `upper_loss_fn` defaults to
  `lower_loss_fn`. In `init(key, base, adapter)`, p and s start from copies of
  the adapter; `init(key, base, upper, lower)` starts them from two.

  Returns:
    The algorithm. `step` is not jitted.

  Raises:
    ValueError: a loss does not take (base, adapter, batch, key); in `init`, the
      parameters are not arrays or do not fit the sampler.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> import zofo_jax as zofo
    >>> def loss(base, adapter, batch, key):
    ...   return jnp.mean((base["w"] + adapter - batch) ** 2)
    >>> algorithm = zofo.make_bilevel_step(
    ...     loss, lower_tx=optax.adam(1e-2), upper_tx=optax.adam(1e-2),
    ...     base_tx=zofo.outer.sgd(1e-3))
    >>> state = algorithm.init(
    ...     jax.random.key(0), {"w": jnp.zeros(4)}, jnp.zeros(4))
    >>> batch = zofo.BilevelBatch(
    ...     lower=jnp.ones((3, 4)), penalty=jnp.ones(4), upper=jnp.ones(4))
    >>> step = jax.jit(algorithm.step, donate_argnums=0)
    >>> state, info = step(state, batch, zofo.BilevelHParams(penalty=10.0))
    >>> int(state.step), info.lower_loss.shape
    (1, (3,))
  """
  upper_loss_fn = upper_loss_fn or lower_loss_fn
  for name, fn in (
    ("lower_loss_fn", lower_loss_fn),
    ("upper_loss_fn", upper_loss_fn),
    ("probe_loss_fn", probe_loss_fn or lower_loss_fn),
  ):
    checks.check_arguments(fn, name, ("base", "adapter", "batch", "key"))
  base_transform = outer.to_outer_transform(base_tx)
  map_tasks = jax.vmap if over_tasks else lambda fn: fn

  def init(key, base, upper, lower=None):
    lower = upper if lower is None else lower
    checks.check_arrays(base, "base")
    checks.check_arrays(upper, "the adapter p")
    checks.check_arrays(lower, "the adapter s")
    checks.check_sampler(zo.sampler, base, "base")
    lower = _copy_shared(lower, upper)
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
    zo=zo,
    guide=guide,
    shaping=shaping,
    has_aux=has_aux,
    over_tasks=over_tasks,
  )
  return BilevelAlgorithm(init, step)
