"""MeZO (Malladi et al., 2023, arXiv 2305.17333): zeroth-order descent alone.

A step estimates the gradient of L at theta from forward passes along random
directions z_q, and moves theta along them:

  theta <- theta - lr (1/Q) sum_q c_q z_q,  c_q ~ <grad L(theta), z_q>.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from zofo_jax.core import checks, keys, outer, types
from zofo_jax.core import zo as zo_lib
from zofo_jax.core.zeroth_order import ZerothOrder


class MezoState(NamedTuple):
  """Everything that determines the rest of a run.

  Attributes:
    step: number of steps done, int32, shape [].
    params: parameters theta.
    opt_state: state of the update.
    key: typed PRNG key, shape []; never advanced, folded with `step`.
  """

  step: jax.Array
  params: types.Params
  opt_state: Any
  key: jax.Array


class MezoInfo(NamedTuple):
  """Metrics of one step; float32 unless noted.

  Attributes:
    loss: mean of the loss over the points evaluated, shape [].
    values: the loss at each of them, shape [Q, points].
    coefficients: directional derivatives, shape [Q].
    num_nonfinite: number of directions dropped because the loss was not
      finite, int32, shape [].
    move: the in-place update of the parameters; None if the transformation
      does not write in place.
    aux: auxiliary output of the loss at each point, leaves [Q, points, ...];
      () without `has_aux`.
  """

  loss: jax.Array
  values: jax.Array
  coefficients: jax.Array
  num_nonfinite: jax.Array
  move: types.InPlaceUpdate | None
  aux: Any


class MezoAlgorithm(NamedTuple):
  """A pair of pure functions.

  Attributes:
    init: (key, params) -> MezoState.
    step: (state, batch, hparams) -> (MezoState, MezoInfo).
  """

  init: Callable[..., MezoState]
  step: Callable[..., tuple[MezoState, MezoInfo]]


def mezo_step(
  state: MezoState,
  batch: types.PyTree,
  hparams: types.BilevelHParams = types.BilevelHParams(),
  *,
  loss_fn: Callable[..., Any],
  tx: outer.OuterTransform | optax.GradientTransformation,
  zo: ZerothOrder = ZerothOrder(),
  has_aux: bool = False,
) -> tuple[MezoState, MezoInfo]:
  """Takes one step of MeZO; a pure function, to be jitted by the caller.

  Donate `state` for the update to happen in place.

  Args:
    state: parameters, state of the update, step and key.
    batch: what the loss takes. Any pytree of arrays.
    hparams: reads `zo_eps`, the smoothing radius; traced.
    loss_fn: (params, batch) -> scalar, or (scalar, aux). Need not be
      differentiable, unless the estimator is `zo.exact`; must be deterministic.
    tx: update of the parameters: `outer.sgd` (in place), or any optax
      transformation.
    zo: how the gradient is estimated.
    has_aux: whether the loss returns a pair.

  Returns:
    The new state and the metrics of the step.
  """
  loss_fn = checks.checked_loss(loss_fn, "loss_fn", has_aux)
  tx = outer.to_outer_transform(tx)
  step_keys = keys.step_keys(state.key, state.step, zo.subspace_steps)
  estimate = zo_lib.estimate_on_batch(
    loss_fn,
    tx.read(state.params, state.opt_state, zo.sampler),
    batch,
    step_keys.direction,
    hparams.zo_eps,
    zo,
    subspace_key=step_keys.subspace,
    has_aux=has_aux,
  )

  def objective(params):
    return loss_fn(params, batch)[0] if has_aux else loss_fn(params, batch)

  return apply_estimate(state, estimate, objective, step_keys, tx, zo)


def apply_estimate(
  state: MezoState,
  estimate: zo_lib.Estimate,
  objective: Callable[[types.Params], jax.Array],
  step_keys: keys.StepKeys,
  tx: outer.OuterTransform | optax.GradientTransformation,
  zo: ZerothOrder,
) -> tuple[MezoState, MezoInfo]:
  """Moves the parameters of a state along an estimate at them.

  Args:
    state: before the step.
    estimate: at its parameters.
    objective: function whose gradient was estimated.
    step_keys: of the step.
    tx: update of the parameters.
    zo: how the gradient was estimated.

  Returns:
    The new state and the metrics of the step.
  """
  params, opt_state, move = outer.apply_transform(
    outer.to_outer_transform(tx),
    state.params,
    state.opt_state,
    estimate,
    zo.sampler,
    objective,
    step_keys.rounding,
  )
  info = MezoInfo(
    loss=jnp.mean(estimate.values),
    values=estimate.values,
    coefficients=estimate.coefficients,
    num_nonfinite=estimate.num_nonfinite,
    move=move,
    aux=estimate.aux,
  )
  return MezoState(state.step + 1, params, opt_state, state.key), info


def make_mezo_step(
  loss_fn: Callable[..., Any],
  tx: outer.OuterTransform | optax.GradientTransformation,
  zo: ZerothOrder = ZerothOrder(),
  *,
  has_aux: bool = False,
) -> MezoAlgorithm:
  """Binds a loss and an update into an (init, step) pair.

  Arguments are those of `mezo_step`.

  Returns:
    The algorithm. `step` is not jitted.

  Raises:
    ValueError: `loss_fn` does not take (params, batch); in `init`, the
      parameters are not arrays or do not fit the sampler.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> import zofo_jax as zofo
    >>> def loss(params, batch):
    ...   return jnp.mean((params["w"] - batch) ** 2)
    >>> algorithm = zofo.make_mezo_step(loss, zofo.outer.sgd(0.1))
    >>> state = algorithm.init(jax.random.key(0), {"w": jnp.zeros(3)})
    >>> step = jax.jit(algorithm.step, donate_argnums=0)
    >>> for _ in range(100):
    ...   state, info = step(state, jnp.ones(3))
    >>> bool(info.loss < 1e-3), int(state.step)
    (True, 100)
  """
  checks.check_arguments(loss_fn, "loss_fn", ("params", "batch"))
  transform = outer.to_outer_transform(tx)

  step = functools.partial(
    mezo_step, loss_fn=loss_fn, tx=transform, zo=zo, has_aux=has_aux
  )
  return MezoAlgorithm(make_init(transform, zo), step)


def make_init(
  tx: outer.OuterTransform, zo: ZerothOrder
) -> Callable[[jax.Array, types.Params], MezoState]:
  """Returns the function (key, params) -> state before the first step.

  Args:
    tx: update of the parameters.
    zo: how the gradient is estimated; its sampler is checked against them.
  """

  def init(key, params):
    checks.check_arrays(params, "params")
    checks.check_sampler(zo.sampler, params, "params")
    return MezoState(
      step=jnp.zeros([], jnp.int32),
      params=params,
      opt_state=tx.init(params),
      key=key,
    )

  return init
