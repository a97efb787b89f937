"""A step on the backbone as a few numbers, from which it can be taken again.

An update in place is theta <- (1 - decay) theta + sum_q weights[q] z_q, and z_q
comes from the run's key and the step's number: (step, weights, decay) is all.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zofo_jax.core import sampler as sampler_lib
from zofo_jax.core import zo


class StepKeys(NamedTuple):
  """Keys of one outer iteration: typed PRNG keys, shape [].

  Attributes:
    lower: of the steps on s.
    upper: of the step on p.
    direction: split into those of the directions.
    rounding: of the stochastic rounding of theta.
    subspace: of what directions share; see `directions.LeafKey`.
  """

  lower: jax.Array
  upper: jax.Array
  direction: jax.Array
  rounding: jax.Array
  subspace: jax.Array


def step_keys(
  key: jax.Array, step: jax.typing.ArrayLike, frame_steps: int = 1
) -> StepKeys:
  """Derives an iteration's keys from the run's.

  Args:
    key: the run's typed PRNG key. Folded, not consumed.
    step: number of the iteration, from 0; int32, shape [].
    frame_steps: iterations that share their frame.
  """
  lower, upper, direction, rounding = jax.random.split(
    jax.random.fold_in(key, step), 4
  )
  # Apart from every step's key, which folds a step's number.
  subspace_root = jax.random.fold_in(key, np.uint32(2**32 - 1))
  subspace_key = jax.random.fold_in(
    subspace_root, jnp.asarray(step) // frame_steps
  )
  return StepKeys(lower, upper, direction, rounding, subspace_key)


class InPlaceUpdate(NamedTuple):
  """A step on theta, to be written in place.

  Attributes:
    weights: factors of the directions, float32, shape [Q]; NumPy's as well.
    decay: share taken off every matrix, float32, shape [].
    learning_rate: what the weights were made with, float32, shape [].
  """

  weights: Any
  decay: Any
  learning_rate: Any


def replay_update(
  base: Any,
  key: jax.Array,
  step: jax.typing.ArrayLike,
  move: InPlaceUpdate,
  *,
  sampler: sampler_lib.Sampler,
  frame_steps: int = 1,
) -> Any:
  """Takes a step on theta again, bit for bit; donate `base` if jitted.

  Args:
    base: theta before the step.
    key: the run's typed PRNG key.
    step: number of the iteration, from 0.
    move: what the step was.
    sampler: as in the run.
    frame_steps: as in the run.

  Returns:
    theta after the step.
  """
  keys = step_keys(key, step, frame_steps)
  num_directions = move.weights.shape[0]
  return sampler.apply_directions(
    base,
    zo.direction_keys(keys.direction, keys.subspace, num_directions),
    move.weights,
    decay=move.decay,
    rounding_key=keys.rounding,
  )
