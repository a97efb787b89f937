"""Updates of the backbone from a zeroth-order estimate.

An outer transformation is a pair (init, update) like optax's, except that it
receives keys and coefficients instead of a gradient tree, so that a stateless
one can add its directions to donated weights without any copy of their size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from zofo_jax import directions, zo


class OuterTransform(NamedTuple):
  """A backbone update.

  Attributes:
    init: (base) -> state.
    update: (base, state, estimate, sampler) -> (base, state).
  """

  init: Callable[[Any], Any]
  update: Callable[[Any, Any, zo.Estimate, directions.Sampler], tuple[Any, Any]]


class SgdState(NamedTuple):
  """State of `sgd`: updates done, int32 []; learning rate, float32 []."""

  num_updates: jax.Array
  learning_rate: jax.Array


def sgd(learning_rate: optax.ScalarOrSchedule) -> OuterTransform:
  """Adds -lr * (1/Q) sum_q c_q z_q to the weights in place.

  Args:
    learning_rate: a number, kept in the state so that changing it there does
      not recompile, or an optax schedule of the update count.

  Returns:
    The transformation; its state is two scalars.
  """
  schedule = learning_rate if callable(learning_rate) else None

  def init(base):
    del base
    count = jnp.zeros([], jnp.int32)
    rate = schedule(count) if schedule else learning_rate
    return SgdState(count, jnp.asarray(rate, jnp.float32))

  def update(base, state, estimate, sampler):
    rate = state.learning_rate
    if schedule:
      rate = jnp.asarray(schedule(state.num_updates), jnp.float32)
    num_directions = estimate.coefficients.shape[0]
    weights = -rate * estimate.coefficients / num_directions
    base = sampler.add(base, estimate.keys, weights)
    return base, SgdState(state.num_updates + 1, rate)

  return OuterTransform(init, update)


def from_optax(tx: optax.GradientTransformation) -> OuterTransform:
  """Feeds the estimate, written out in float32, to an optax transformation.

  Needs one float32 tree of the backbone's size beside whatever `tx` keeps.
  """

  def update(base, state, estimate, sampler):
    gradient = zo.gradient(base, estimate, sampler)
    updates, state = tx.update(gradient, state, base)
    return optax.apply_updates(base, updates), state

  return OuterTransform(tx.init, update)


def as_outer(
  tx: OuterTransform | optax.GradientTransformation,
) -> OuterTransform:
  """Accepts either kind of transformation."""
  return tx if isinstance(tx, OuterTransform) else from_optax(tx)
