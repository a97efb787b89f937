"""One outer iteration of Bilevel-ZOFO (arXiv 2502.03604, Algorithm 2).

With theta the backbone, p the adapter that is kept and s an auxiliary one,
minimise over (theta, p) and maximise over s

  G(theta, p, s) = L(theta, p; D_f) + lam (L(theta, p; D_p) - L(theta, s; D_p)).

An iteration takes T first-order steps on s, one first-order step on p, and one
zeroth-order step on theta; p and theta move together, from the same point.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from zofo_jax import inner, outer, zo
from zofo_jax import sampler as sampler_lib


class BilevelState(NamedTuple):
  """Everything that decides the rest of a run.

  Attributes:
    step: outer iterations done, int32, shape [].
    base: backbone parameters theta.
    upper: adapter p, the one that is kept.
    lower: auxiliary adapter s.
    base_opt: state of the backbone's update.
    upper_opt: optimizer state of p.
    lower_opt: optimizer state of s.
    key: typed PRNG key, shape []; never advanced, folded with `step`.
  """

  step: jax.Array
  base: Any
  upper: Any
  lower: Any
  base_opt: Any
  upper_opt: optax.OptState
  lower_opt: optax.OptState
  key: jax.Array


class BilevelBatch(NamedTuple):
  """Rows of one outer iteration.

  Attributes:
    lower: batches from D_p for the T inner steps; leaves [T, ...].
    penalty: one fresh batch from D_p for the penalty terms.
    upper: one batch from D_f.
  """

  lower: Any
  penalty: Any
  upper: Any


class BilevelHParams(NamedTuple):
  """Numbers that may change without a new compilation; float32, shape []."""

  zo_eps: jax.Array | float = 1e-3
  penalty: jax.Array | float = 1.0


class BilevelInfo(NamedTuple):
  """What an iteration tells a logger; float32 unless said.

  Attributes:
    lower_loss: L(theta, s) at each inner step, shape [T].
    upper_loss: L(theta, p; D_f), shape [].
    penalty_loss: L(theta, p; D_p), shape [].
    objective: mean of G over the probed points, shape [].
    coefficients: directional derivatives of G, shape [Q].
    num_nonfinite: directions dropped because G, or p's gradient, was not
      finite, int32 [].
    upper_grad_norm: norm of p's gradient, shape [].
  """

  lower_loss: jax.Array
  upper_loss: jax.Array
  penalty_loss: jax.Array
  objective: jax.Array
  coefficients: jax.Array
  num_nonfinite: jax.Array
  upper_grad_norm: jax.Array


class BilevelAlgorithm(NamedTuple):
  """A pair of pure functions.

  Attributes:
    init: (key, base, upper, lower) -> BilevelState.
    step: (state, batch, hparams) -> (BilevelState, BilevelInfo).
  """

  init: Callable[..., BilevelState]
  step: Callable[..., tuple[BilevelState, BilevelInfo]]


def _alike(trees: Iterable[Any]) -> bool:
  """Tells whether trees have one structure, and leaves one shape and type."""
  first, *rest = (jax.tree.map(jax.typeof, tree) for tree in trees)
  return all(other == first for other in rest)


def _evaluate(terms, base, keys) -> jax.Array:
  """Losses of several (loss_fn, adapter, batch) terms, float32, [len(terms)].

  Terms of one function and one shape become a batch axis of one call, so that
  the backbone's products, and its perturbation, are shared between them.
  """
  loss_fns, adapters, batches = zip(*terms, strict=True)
  if len(set(loss_fns)) == 1 and _alike(zip(adapters, batches)):
    stack = lambda *leaves: jnp.stack(leaves)
    losses = jax.vmap(
      loss_fns[0], in_axes=(None, 0, 0, None if keys is None else 0)
    )(base, jax.tree.map(stack, *adapters), jax.tree.map(stack, *batches), keys)
  else:
    losses = jnp.stack(
      [
        loss_fn(base, adapter, batch, None if keys is None else keys[i])
        for i, (loss_fn, adapter, batch) in enumerate(terms)
      ]
    )
  return losses.astype(jnp.float32)


def _gradient(loss_fns, batches, keys, point) -> tuple[jax.Array, list[Any]]:
  """Losses at (base, adapter), float32 [2], and the adapter's gradient of each.

  One after the other, so that one loss's activations exist at a time.
  """
  base, adapter = point

  def one(loss_fn, batch, key):
    return jax.value_and_grad(loss_fn, argnums=1)(base, adapter, batch, key)

  if len(set(loss_fns)) == 1 and _alike(batches):
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    losses, both = jax.lax.map(lambda x: one(loss_fns[0], *x), (stacked, keys))
    grads = [jax.tree.map(lambda leaf, i=i: leaf[i], both) for i in range(2)]
  else:
    found = [one(*term) for term in zip(loss_fns, batches, keys, strict=True)]
    losses = jnp.stack([loss for loss, _ in found])
    grads = [grad for _, grad in found]
  return losses.astype(jnp.float32), grads


def _one_row(example: Any) -> Any:
  """Makes a batch of one example."""
  return jax.tree.map(lambda leaf: leaf[None], example)


def bilevel_step(
  state: BilevelState,
  batch: BilevelBatch,
  hparams: BilevelHParams = BilevelHParams(),
  *,
  lower_loss_fn: inner.LossFn,
  upper_loss_fn: inner.LossFn,
  probe_loss_fn: inner.LossFn | None = None,
  lower_tx: optax.GradientTransformation,
  upper_tx: optax.GradientTransformation,
  base_tx: outer.OuterTransform | optax.GradientTransformation,
  sampler: sampler_lib.Sampler = sampler_lib.Sampler(),
  estimator: zo.Estimator = zo.central,
  num_directions: int = 1,
  per_example: bool = False,
  frame_steps: int = 1,
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
    map_fn: how directions are evaluated; see `zo.estimate`.

  Returns:
    The new state and what to log.
  """
  step_key = jax.random.fold_in(state.key, state.step)
  lower_key, upper_key, direction_key, rounding_key = jax.random.split(
    step_key, 4
  )
  # Apart from every step's key, which folds a step's number.
  frame_root = jax.random.fold_in(state.key, np.uint32(2**32 - 1))
  penalty = jnp.asarray(hparams.penalty, jnp.float32)

  lower, lower_opt, lower_loss = inner.minimize(
    lower_loss_fn,
    state.base,
    state.lower,
    state.lower_opt,
    batch.lower,
    lower_key,
    tx=lower_tx,
  )

  losses, grads = _gradient(
    (upper_loss_fn, lower_loss_fn),
    (batch.upper, batch.penalty),
    jax.random.split(upper_key, 2),
    (state.base, state.upper),
  )
  grads = jax.tree.map(lambda f, g: (f + penalty * g).astype(f.dtype), *grads)
  updates, upper_opt = upper_tx.update(grads, state.upper_opt, state.upper)
  upper = optax.apply_updates(state.upper, updates)

  def penalized(base, rows=batch.upper, penalty_rows=batch.penalty):
    upper_fn = probe_loss_fn or upper_loss_fn
    lower_fn = probe_loss_fn or lower_loss_fn
    terms = (
      (upper_fn, state.upper, rows),
      (lower_fn, state.upper, penalty_rows),
      (lower_fn, lower, penalty_rows),
    )
    upper_loss, penalty_loss, lower_loss = _evaluate(terms, base, None)
    return upper_loss + penalty * (penalty_loss - lower_loss)

  estimate_fn = functools.partial(
    zo.estimate_per_example if per_example else zo.estimate,
    key=direction_key,
    eps=hparams.zo_eps,
    sampler=sampler,
    estimator=estimator,
    frame_key=jax.random.fold_in(frame_root, state.step // frame_steps),
  )
  if per_example:
    estimate = estimate_fn(
      lambda base, example: penalized(base, *_one_row(example)),
      state.base,
      (batch.upper, batch.penalty),
    )
  else:
    estimate = estimate_fn(
      penalized, state.base, num_directions=num_directions, map_fn=map_fn
    )
  # p and theta move together: a broken gradient of p drops every direction. It
  # also tells the compiler that p's passes end before theta is written; not
  # knowing, it copies all layers' weights.
  upper_grad_norm = optax.tree.norm(grads)
  estimate = estimate.drop_unless(jnp.isfinite(upper_grad_norm))
  base, base_opt = outer.as_outer(base_tx).update(
    state.base, state.base_opt, estimate, sampler, penalized, rounding_key
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
    upper_loss=losses[0],
    penalty_loss=losses[1],
    objective=jnp.mean(estimate.values),
    coefficients=estimate.coefficients,
    num_nonfinite=estimate.num_nonfinite,
    upper_grad_norm=upper_grad_norm,
  )
  return new_state, info


def make_bilevel_step(
  lower_loss_fn: inner.LossFn,
  upper_loss_fn: inner.LossFn | None = None,
  *,
  probe_loss_fn: inner.LossFn | None = None,
  lower_tx: optax.GradientTransformation,
  upper_tx: optax.GradientTransformation,
  base_tx: outer.OuterTransform | optax.GradientTransformation,
  sampler: sampler_lib.Sampler = sampler_lib.Sampler(),
  estimator: zo.Estimator = zo.central,
  num_directions: int = 1,
  per_example: bool = False,
  frame_steps: int = 1,
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
  base_transform = outer.as_outer(base_tx)

  def init(key, base, upper, lower):
    return BilevelState(
      step=jnp.zeros([], jnp.int32),
      base=base,
      upper=upper,
      lower=lower,
      base_opt=base_transform.init(base),
      upper_opt=upper_tx.init(upper),
      lower_opt=lower_tx.init(lower),
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
    map_fn=map_fn,
  )
  return BilevelAlgorithm(init, step)
