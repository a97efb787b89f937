"""Transformations of an estimate's coefficients, composed by `outer.sgd`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zofo_jax.core import zo


class CoefficientTransform(NamedTuple):
  """A transformation of an estimate's coefficients; its state is scalars.

  Attributes:
    init: () -> state.
    update: (estimate, state) -> (estimate, state); the returned estimate has
      the new coefficients.
  """

  init: Callable[[], Any]
  update: Callable[[zo.Estimate, Any], tuple[zo.Estimate, Any]]


def _stateless(fn: Callable[[zo.Estimate], jax.Array]) -> CoefficientTransform:
  return CoefficientTransform(
    init=lambda: (),
    update=lambda estimate, state: (
      estimate._replace(coefficients=fn(estimate)),
      state,
    ),
  )


def clip(limit: float) -> CoefficientTransform:
  """Returns clipping of every c_q to [-limit, limit] (QZO, arXiv 2505.13430).

  Args:
    limit: largest size of a coefficient.
  """
  return _stateless(lambda e: jnp.clip(e.coefficients, -limit, limit))


def sign() -> CoefficientTransform:
  """Returns the signs of the coefficients: steps of one size."""
  return _stateless(lambda e: jnp.sign(e.coefficients))


def scale_by_std(epsilon: float = 1e-8) -> CoefficientTransform:
  """Returns division by the standard deviation of the evaluated values.

  c_q / (std(f(x + eps z_q), f(x - eps z_q), ...) + epsilon)

  FZOO (arXiv 2506.09034): Adam-like steps without state. Needs several values:
  more than one direction, or two points along one.

  Args:
    epsilon: added to the standard deviation.
  """

  def scale(estimate):
    std = jnp.std(estimate.values, where=jnp.isfinite(estimate.values))
    return estimate.coefficients / (std + epsilon)

  return _stateless(scale)


class RunningScale(NamedTuple):
  """State of `scale_by_running_rms`: int32 [] and float32 []."""

  num_updates: jax.Array
  mean_square: jax.Array


def scale_by_running_rms(
  decay: float = 0.99, epsilon: float = 1e-8
) -> CoefficientTransform:
  """Returns division by the running root mean square of the coefficients.

  v <- decay v + (1 - decay) mean_q c_q^2,  c_q / (sqrt(v / bias) + epsilon)

  with Adam's bias correction. One adaptive number for all weights, which does
  as well as Adam's number for each (MEAZO, arXiv 2605.03869).

  Args:
    decay: decay rate of the running mean.
    epsilon: added to the root mean square.
  """

  def init():
    return RunningScale(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32))

  def update(estimate, state):
    # The mean over the finite ones; the others are zero.
    finite = estimate.coefficients.shape[0] - estimate.num_nonfinite
    square = jnp.sum(jnp.square(estimate.coefficients))
    square = square / jnp.maximum(finite, 1)
    count = state.num_updates + 1
    mean = decay * state.mean_square + (1 - decay) * square
    rms = jnp.sqrt(mean / (1 - decay ** count.astype(jnp.float32)))
    coefficients = estimate.coefficients / (rms + epsilon)
    return (
      estimate._replace(coefficients=coefficients),
      RunningScale(count, mean),
    )

  return CoefficientTransform(init, update)
