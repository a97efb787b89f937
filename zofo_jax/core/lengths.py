"""How far theta follows an adapter: rules that choose lengths.

See `guided`, which takes steps of these lengths.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zofo_jax.core import zo
from zofo_jax.core.zeroth_order import ZerothOrder

# One length for all matrices, float32 [], or {path of a part of the adapter:
# [] or, of stacked layers, [layers]}; each with a leading axis of M tasks if
# every task has its own. With a history, a pair of this and the lengths of
# earlier displacements, [h - 1].
Lengths = Any
# (lengths, number of the update) -> the objective, float32 [].
LengthsObjective = Callable[[Lengths, jax.typing.ArrayLike], jax.Array]


class ChosenLengths(NamedTuple):
  """What a rule returns.

  Attributes:
    lengths: the lengths; 0 where none was better.
    values: of the objective at the points evaluated, float32 [points].
    num_nonfinite: how many of them were not finite, int32 [].
  """

  lengths: Lengths
  values: jax.Array
  num_nonfinite: jax.Array


@dataclasses.dataclass(frozen=True)
class Rule:
  """How lengths are chosen; made by `constant`, `parabola` or `descend`.

  Attributes:
    choose: (objective, units, typed PRNG key) -> ChosenLengths. The units are
      1 for a length, and 0 for that of an earlier displacement.
    num_updates: updates of the lengths, each of which may read other rows.
    evaluations: of the objective, in all.
  """

  choose: Callable[[LengthsObjective, Lengths, jax.Array], ChosenLengths]
  num_updates: int
  evaluations: int


def constant(length: float = 1.0) -> Rule:
  """Returns the rule of one length, without any evaluation.

  Args:
    length: 1 for all that the first-order steps have changed.
  """

  def choose(objective, units, key):
    del objective, key
    lengths = jax.tree.map(lambda unit: length * unit, units)
    return ChosenLengths(lengths, jnp.zeros([0]), jnp.zeros([], jnp.int32))

  return Rule(choose, num_updates=0, evaluations=0)


def parabola(
  points: tuple[float, ...] = (0.0, 0.5, 1.0), largest: float = 1.0
) -> Rule:
  """Returns the rule of the least value of a parabola through some points.

  A parabola that opens downwards gives the best of the points. If any value is
  not finite, the length is 0.

  Args:
    points: at least three lengths, in ascending order.
    largest: length that is not exceeded.
  """
  # The coefficients of the least-squares fit are linear in the values.
  fit = np.linalg.pinv(np.vander(points, 3)).astype(np.float32)

  def choose(objective, units, key):
    del key
    scaled = lambda length: jax.tree.map(lambda unit: length * unit, units)
    xs = jnp.asarray(points, jnp.float32)
    values = jax.lax.map(lambda x: objective(scaled(x), 0), xs)
    # Of differences, so that a large common value costs no digits.
    square, linear, _ = fit @ (values - values[0])
    least = -linear / (2.0 * jnp.where(square > 0, square, 1.0))
    length = jnp.where(square > 0, least, xs[jnp.argmin(values)])
    length = jnp.clip(length, points[0], largest)
    finite = jnp.isfinite(values)
    length = jnp.where(jnp.all(finite), length, 0.0)
    return ChosenLengths(
      scaled(length), values, jnp.sum(~finite, dtype=jnp.int32)
    )

  return Rule(choose, num_updates=1, evaluations=len(points))


def descend(
  estimator: ZerothOrder,
  *,
  num_updates: int = 4,
  learning_rate: float = 0.3,
  radius: float = 0.25,
  start: float = 1.0,
  largest: float = 2.0,
) -> Rule:
  """Returns the rule of zeroth-order descent on the lengths.

  eta <- clip(eta - learning_rate g / rms(g), 0, largest), with g an estimate of
  the gradient with respect to eta from forward passes. There are as many
  lengths as matrices, not as weights: the estimate is a good one. Earlier
  displacements are in theta already: their lengths start at 0 and are between
  -1, which takes one back, and largest - 1. If no value is finite, all lengths
  are 0.

  Args:
    estimator: how g is estimated.
    num_updates: how many such updates; each may read rows of its own.
    learning_rate: root mean square of an update.
    radius: eps of the estimate.
    start: of all lengths.
    largest: length that is not exceeded.
  """

  def choose(objective, units, key):
    def update(lengths, xs):
      key, index = xs
      estimate = zo.estimate(
        lambda lengths: objective(lengths, index),
        lengths,
        key,
        radius,
        estimator,
      )
      gradient = zo.gradient(lengths, estimate, estimator.sampler)
      sizes = jnp.concatenate([g.ravel() for g in jax.tree.leaves(gradient)])
      scale = learning_rate * jax.lax.rsqrt(jnp.mean(sizes**2) + 1e-16)
      lengths = jax.tree.map(
        lambda length, g, unit: jnp.clip(
          length - scale * g, unit - 1.0, unit - 1.0 + largest
        ),
        lengths,
        gradient,
        units,
      )
      return lengths, (estimate.values.ravel(), estimate.num_nonfinite)

    lengths = jax.tree.map(lambda unit: start * unit, units)
    lengths, (values, num_nonfinite) = jax.lax.scan(
      update,
      lengths,
      (jax.random.split(key, num_updates), jnp.arange(num_updates)),
    )
    # Of a point from which no value is finite, nothing is known.
    any_finite = jnp.any(jnp.isfinite(values))
    lengths = jax.tree.map(lambda x: jnp.where(any_finite, x, 0.0), lengths)
    return ChosenLengths(lengths, values.ravel(), jnp.sum(num_nonfinite))

  kind = estimator.estimator
  evaluations = kind.shared + estimator.num_directions * kind.evaluations
  return Rule(choose, num_updates, num_updates * evaluations)
