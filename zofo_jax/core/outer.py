"""Updates of the backbone from a zeroth-order estimate.

An outer transformation is a pair (init, update) like optax's, except that it
receives keys and coefficients instead of a gradient tree. A stateless one then
adds its directions to donated weights without any copy of their size:

  theta <- (1 - decay) theta + sum_q weights[q] z_q.

Since z_q is a function of the run's key and the step, (step, weights, decay) is
enough to replay such an update; see `replay_update`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from zofo_jax.core import deferred, rounding, zo
from zofo_jax.core import keys as keys_lib
from zofo_jax.core import sampler as sampler_lib
from zofo_jax.core import tree as tree_lib
from zofo_jax.core.coefficients import (
  CoefficientTransform as CoefficientTransform,
)
from zofo_jax.core.coefficients import RunningScale as RunningScale
from zofo_jax.core.coefficients import clip as clip
from zofo_jax.core.coefficients import (
  scale_by_running_rms as scale_by_running_rms,
)
from zofo_jax.core.coefficients import scale_by_std as scale_by_std
from zofo_jax.core.coefficients import sign as sign
from zofo_jax.core.types import InPlaceUpdate as InPlaceUpdate

# base -> value of the objective whose gradient was estimated.
Objective = Callable[[Any], jax.Array]
# (base, state, estimate, sampler, objective) -> (move, state)
ComputeUpdateFn = Callable[
  [Any, Any, zo.Estimate, sampler_lib.Sampler, Objective],
  tuple[InPlaceUpdate, Any],
]
# (base, state, estimate, sampler, move, key) -> (base, state)
WriteFn = Callable[
  [Any, Any, zo.Estimate, sampler_lib.Sampler, InPlaceUpdate, jax.Array],
  tuple[Any, Any],
]


def _as_stored(base: Any, state: Any, sampler: sampler_lib.Sampler) -> Any:
  """Returns the base: no update is deferred."""
  del state, sampler
  return base


def _write_now(base, state, estimate, sampler, move, key):
  base = sampler.apply_directions(
    base, estimate.keys, move.weights, decay=move.decay, rounding_key=key
  )
  return base, state


def _nothing_deferred(base, state, sampler):
  del sampler
  return base, state


class OuterTransform(NamedTuple):
  """An update of the backbone.

  Attributes:
    init: base -> state.
    update: (base, state, estimate, sampler, objective, key) -> (base, state).
      It may evaluate the objective at other points; the typed PRNG key is for
      stochastic rounding.
    compute_update: (base, state, estimate, sampler, objective) ->
      (InPlaceUpdate, state). Computes the in-place update without applying it.
      None for transforms that cannot be expressed as an `InPlaceUpdate`.
    write: (base, state, estimate, sampler, move, key) -> (base, state). Applies
      what `compute_update` returns.
    read: (base, state, sampler) -> the base as losses are to read it; not the
      stored one if updates are deferred, see `write_every`.
    flush: (base, state, sampler) -> (base, state). Writes deferred updates.
  """

  init: Callable[[Any], Any]
  update: Callable[
    [Any, Any, zo.Estimate, sampler_lib.Sampler, Objective, jax.Array],
    tuple[Any, Any],
  ]
  compute_update: ComputeUpdateFn | None = None
  write: WriteFn = _write_now
  read: Callable[[Any, Any, sampler_lib.Sampler], Any] = _as_stored
  flush: Callable[[Any, Any, sampler_lib.Sampler], tuple[Any, Any]] = (
    _nothing_deferred
  )

  @property
  def defers(self) -> bool:
    """Whether updates may be deferred: losses read the base through `read`."""
    return self.read is not _as_stored


def _in_place(
  init: Callable[[Any], Any], compute_update: ComputeUpdateFn, **deferral: Any
) -> OuterTransform:
  """Returns the transformation that applies what `compute_update` returns."""

  def update(base, state, estimate, sampler, objective, key):
    return apply_transform(
      transform, base, state, estimate, sampler, objective, key
    )[:2]

  transform = OuterTransform(init, update, compute_update, **deferral)
  return transform


def apply_transform(
  tx: OuterTransform,
  base: Any,
  state: Any,
  estimate: zo.Estimate,
  sampler: sampler_lib.Sampler,
  objective: Objective,
  key: jax.Array,
) -> tuple[Any, Any, InPlaceUpdate | None]:
  """Applies `tx.update`, and returns the update if it was in place.

  Args:
    tx: the transformation.
    base: backbone parameters.
    state: state of `tx`.
    estimate: gradient estimate at `base`.
    sampler: sampler that the estimate was made with.
    objective: function whose gradient was estimated.
    key: typed PRNG key of the rounding, shape [].

  Returns:
    (base, state, move); the move is None if `tx` does not update in place.
  """
  if tx.compute_update is None:
    update = tx.update(base, state, estimate, sampler, objective, key)
    return (*update, None)
  read = tx.read(base, state, sampler)
  move, state = tx.compute_update(read, state, estimate, sampler, objective)
  base, state = tx.write(base, state, estimate, sampler, move, key)
  return base, state, move


def replay_update(
  base: Any,
  key: jax.Array,
  step: jax.typing.ArrayLike,
  move: InPlaceUpdate,
  *,
  sampler: sampler_lib.Sampler,
  subspace_steps: int = 1,
) -> Any:
  """Replays an in-place update, bit for bit; donate `base` if jitted.

  Args:
    base: theta before the step.
    key: typed PRNG key of the run, shape [].
    step: number of the iteration, from 0; int32, shape [].
    move: the update, as it was recorded.
    sampler: sampler of the run.
    subspace_steps: as in the run's `ZerothOrder`.

  Returns:
    theta after the step.
  """
  keys = keys_lib.step_keys(key, step, subspace_steps)
  num_directions = move.weights.shape[0]
  return sampler.apply_directions(
    base,
    keys_lib.direction_keys(keys.direction, keys.subspace, num_directions),
    move.weights,
    decay=move.decay,
    rounding_key=keys.rounding,
  )


class SgdState(NamedTuple):
  """State of `sgd`.

  Attributes:
    num_updates: number of updates done, int32, shape [].
    learning_rate: learning rate of the last update, float32, shape [].
    scaling: states of the transformations of the coefficients.
  """

  num_updates: jax.Array
  learning_rate: jax.Array
  scaling: Any


def sgd(
  learning_rate: optax.ScalarOrSchedule,
  *scalings: CoefficientTransform,
  weight_decay: float = 0.0,
) -> OuterTransform:
  """Returns stochastic gradient descent in place.

  theta <- (1 - lr * weight_decay) theta - lr (1/Q) sum_q c_q z_q

  An estimate without any finite coefficient changes neither weights nor state.
  Results in dtypes narrower than float32 are rounded stochastically.

  Args:
    learning_rate: a number, which is part of the state so that changing it
      there does not recompile, or an optax schedule of the number of updates.
    *scalings: transformations of the coefficients, applied in order: `clip`,
      `sign`, `scale_by_std`, `scale_by_running_rms`.
    weight_decay: decoupled weight decay, multiplied by the learning rate;
      matrices only.

  Returns:
    The transformation; its state is a few scalars.

  Examples:
    >>> import zofo_jax as zofo
    >>> tx = zofo.outer.sgd(1e-6, zofo.outer.clip(100.0), weight_decay=0.1)
    >>> state = tx.init(base=None)
    >>> int(state.num_updates), float(state.learning_rate) == 1e-6
    (0, False)
  """
  schedule = learning_rate if callable(learning_rate) else None

  def init(base):
    del base
    count = jnp.zeros([], jnp.int32)
    rate = schedule(count) if schedule else learning_rate
    states = tuple(scaling.init() for scaling in scalings)
    return SgdState(count, jnp.asarray(rate, jnp.float32), states)

  def compute_update(base, state, estimate, sampler, objective):
    del base, sampler, objective
    any_finite = jnp.any(
      estimate.num_nonfinite < estimate.coefficients.shape[0]
    )
    rate = state.learning_rate
    if schedule:
      rate = jnp.asarray(schedule(state.num_updates), jnp.float32)
    states = []
    for scaling, old in zip(scalings, state.scaling, strict=True):
      estimate, new = scaling.update(estimate, old)
      states.append(tree_lib.where(any_finite, new, old))
    move = InPlaceUpdate(
      weights=jnp.where(any_finite, -rate * estimate.mean_coefficients(), 0.0),
      decay=jnp.where(any_finite, rate * weight_decay, 0.0),
      learning_rate=rate,
    )
    rate = jnp.where(any_finite, rate, state.learning_rate)
    return move, SgdState(state.num_updates + any_finite, rate, tuple(states))

  return _in_place(init, compute_update)


def conservative(learning_rate: float) -> OuterTransform:
  """Returns descent that takes the best of a step, its opposite and none.

  ZO-SGD-Cons of ZO-Bench (Zhang et al., 2024, arXiv 2402.11592). Costs three
  evaluations more; the candidates are perturbed, never copied.

  Args:
    learning_rate: learning rate lr of the step -lr c z.

  Returns:
    The transformation, for a single direction.
  """
  inner_sgd = sgd(learning_rate)
  plain = inner_sgd.compute_update
  assert plain is not None

  def compute_update(base, state, estimate, sampler, objective):
    if estimate.coefficients.shape[0] != 1:
      raise ValueError(
        "outer.conservative takes one direction a step; found "
        f"{estimate.coefficients.shape[0]}."
      )
    direction = keys_lib.DirectionKey(
      estimate.keys.direction[0], estimate.keys.subspace
    )
    size = state.learning_rate * estimate.coefficients[0]
    values = jax.lax.map(
      sampler.line(objective, base, direction),
      jnp.stack([-size, jnp.zeros_like(size), size]),
    )
    best = jnp.argmin(jnp.where(jnp.isfinite(values), values, jnp.inf))
    factor = jnp.array([1.0, 0.0, -1.0])[best]
    # If none of the three is finite, there is no step.
    factor = jnp.where(jnp.isfinite(values[best]), factor, 0.0)
    chosen = estimate._replace(coefficients=factor * estimate.coefficients)
    return plain(base, state, chosen, sampler, objective)

  return _in_place(inner_sgd.init, compute_update)


class WriteEveryState(NamedTuple):
  """State of `write_every`.

  Attributes:
    inner: of the transformation whose updates are deferred.
    updates: the deferred updates.
  """

  inner: Any
  updates: deferred.Updates


def write_every(
  num_steps: int, tx: OuterTransform, num_directions: int = 1
) -> OuterTransform:
  """Returns a transformation that defers updates of weights on the host.

  Stacked weights in the host's memory are copied to the device and back once in
  `num_steps` steps instead of once a step; in between, a layer that is read is
  updated on the device, with the same bits. Weights on the device are written
  in every step.

  Until then the weights in a state are not those to be read: `flush` writes
  them. Steps do this by themselves; evaluation and checkpoints come after a
  `flush`.

  Args:
    num_steps: updates that are written together.
    tx: a transformation in place, such as `sgd`.
    num_directions: Q of its estimates.

  Returns:
    The transformation; its state is that of `tx`, and a few words and numbers
    for every update.

  Raises:
    ValueError: `num_steps` is below 1, or `tx` is not in place.

  Examples:
    >>> import zofo_jax as zofo
    >>> tx = zofo.outer.write_every(4, zofo.outer.sgd(1e-6))
    >>> tx.init(base=None).updates.weights.shape
    (4, 1)
  """
  if num_steps < 1:
    raise ValueError(
      f"outer.write_every: found num_steps={num_steps}; expected at least 1."
    )
  compute = tx.compute_update
  if compute is None:
    raise ValueError(
      "outer.write_every: expected a transformation in place, such as "
      "outer.sgd."
    )

  def init(base):
    updates = deferred.none(num_steps, num_directions)
    return WriteEveryState(tx.init(base), updates)

  def compute_update(base, state, estimate, sampler, objective):
    move, inner = compute(base, state.inner, estimate, sampler, objective)
    return move, state._replace(inner=inner)

  def read(base, state, sampler):
    return deferred.read(base, state.updates, sampler)

  def write(base, state, estimate, sampler, move, key):
    later = deferred.paths(base, sampler)
    others = dataclasses.replace(
      sampler, select=lambda p: sampler.select(p) and p not in later
    )
    base, _ = _write_now(base, state, estimate, others, move, key)
    updates = deferred.append(state.updates, estimate.keys, move, key)
    state = state._replace(updates=updates)
    return _flush(base, state, sampler, updates.num_deferred == num_steps)

  return _in_place(init, compute_update, write=write, read=read, flush=_flush)


def _flush(base, state, sampler, is_due=True):
  updates = state.updates
  is_due &= updates.num_deferred > 0
  base = deferred.write(base, updates, sampler, is_due)
  # Two states from which the same follows are equal.
  nothing = jax.tree.map(jnp.zeros_like, updates)
  updates = tree_lib.where(is_due, nothing, updates)
  return base, state._replace(updates=updates)


def from_optax(
  tx: optax.GradientTransformation, *scalings: CoefficientTransform
) -> OuterTransform:
  """Returns an optax transformation of the estimate as a gradient tree.

  Needs one float32 tree of the backbone's size, besides the state of `tx`. An
  estimate without any finite coefficient changes neither weights nor state.
  Results are rounded as by `sgd`.

  Args:
    tx: any optax transformation; the state of `adam` and the like is several
      trees of the backbone's size.
    *scalings: transformations of the coefficients, applied before `tx`.

  Returns:
    The transformation.
  """

  # The state of a transformation takes its dtypes from the parameters, and the
  # gradients are float32.
  def to_float32(base):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), base)

  def init(base):
    return tx.init(to_float32(base)), tuple(
      scaling.init() for scaling in scalings
    )

  def update(base, state, estimate, sampler, objective, key):
    del objective

    def step(carry):
      base, (tx_state, old) = carry
      scaled, new = estimate, []
      for scaling, scaling_state in zip(scalings, old, strict=True):
        scaled, scaling_state = scaling.update(scaled, scaling_state)
        new.append(scaling_state)
      gradient = zo.gradient(base, scaled, sampler)
      updates, tx_state = tx.update(gradient, tx_state, to_float32(base))
      base = rounding.apply_updates(base, updates, key)
      return base, (tx_state, tuple(new))

    any_finite = estimate.num_nonfinite < estimate.coefficients.shape[0]
    return jax.lax.cond(any_finite, step, lambda carry: carry, (base, state))

  return OuterTransform(init, update)


def check_writes(
  tx: OuterTransform | optax.GradientTransformation, reader: str
) -> None:
  """Checks that the weights of a state are those to be read.

  Args:
    tx: their update.
    reader: what reads them otherwise than through `tx.read`, for the message.

  Raises:
    ValueError: they are not; see `write_every`.
  """
  if isinstance(tx, OuterTransform) and tx.defers:
    raise ValueError(
      f"outer.write_every: {reader} the weights in every step; expected the "
      "transformation itself."
    )


def to_outer_transform(
  tx: OuterTransform | optax.GradientTransformation,
) -> OuterTransform:
  """Returns an outer transformation, made of an optax one if need be."""
  return tx if isinstance(tx, OuterTransform) else from_optax(tx)
