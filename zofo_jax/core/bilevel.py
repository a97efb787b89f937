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

import jax
import jax.numpy as jnp
import optax

from zofo_jax.core import checks, guided, levels, loss_terms, outer, population
from zofo_jax.core import keys as keys_lib
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
      `zo.per_example`; there are scores, and `base_tx` evaluates an objective;
      `guide` has a history, over tasks.
  """
  checks.check_lower_batch(batch, axis=int(over_tasks))
  losses = _checked_losses(lower_loss_fn, upper_loss_fn, has_aux)
  values = loss_terms.without_aux(*losses) if has_aux else losses
  keys = keys_lib.step_keys(state.key, state.step, zo.subspace_steps)
  base_tx = outer.to_outer_transform(base_tx)
  if guide is not None:
    outer.check_writes(base_tx, "a guided step changes")
    if over_tasks and guide.history > 1:
      raise ValueError(
        f"Guide(history={guide.history}): over tasks, displacements are those "
        "of other tasks in every iteration; expected 1."
      )
  if batch.scores is not None:
    outer.check_writes(base_tx, "scores from outside of the program read")
  read_base = base_tx.read(state.base, state.base_opt, zo.sampler)
  penalty = jnp.asarray(hparams.penalty, jnp.float32)
  num_tasks = None
  if over_tasks:
    num_tasks = jax.tree.leaves(batch.upper)[0].shape[0]

  adapters = levels.first_order_steps(
    *(state, read_base, batch, keys, penalty, losses, values[0]),
    lower_tx=lower_tx,
    upper_tx=upper_tx,
    has_aux=has_aux,
    num_tasks=num_tasks,
  )
  objective_fn = loss_terms.make_objective(
    probe_loss_fn or values[1],
    probe_loss_fn or values[0],
    penalty,
    num_tasks,
    batch.weights,
  )
  # If p's gradient is not finite, theta does not move either. This data
  # dependency also lets XLA update theta in place: without it, it copies all
  # weights.
  may_move = jnp.all(jnp.isfinite(adapters.upper_grad_norm))
  none = jnp.zeros([0])
  theta = levels.Theta(
    state.base, state.base_opt, None, none, none, jnp.zeros([], jnp.int32)
  )
  if guide is None or guide.random:
    theta = levels.zeroth_order_step(
      *(state, read_base, batch, keys, adapters.lower, objective_fn, may_move),
      eps=hparams.zo_eps,
      base_tx=base_tx,
      zo=zo,
      shaping=shaping,
      axis=int(over_tasks),
    )
  if guide is not None:
    theta, adapters = levels.guided_step(
      *(state, batch, keys, theta, adapters, objective_fn, may_move),
      guide=guide,
      lower_tx=lower_tx,
      num_tasks=num_tasks,
    )

  objective = adapters.upper_loss + penalty * adapters.penalty_loss
  new_state = BilevelState(
    step=state.step + 1,
    base=theta.base,
    upper=adapters.upper,
    lower=adapters.lower,
    base_opt=theta.base_opt,
    upper_opt=adapters.upper_opt,
    lower_opt=adapters.lower_opt,
    key=state.key,
    history=theta.history,
  )
  info = BilevelInfo(
    lower_loss=adapters.lower_loss,
    upper_loss=adapters.upper_loss,
    penalty_loss=adapters.penalty_loss,
    objective=jnp.mean(theta.values if theta.values.size else objective),
    coefficients=theta.coefficients,
    num_nonfinite=theta.num_nonfinite,
    upper_grad_norm=adapters.upper_grad_norm,
    move=theta.move,
    aux=adapters.aux if has_aux else None,
    lengths=theta.lengths,
    earlier=theta.earlier,
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
      history=guide.no_history(lower) if guide else None,
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
