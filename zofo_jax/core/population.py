"""Zeroth-order estimates from scores that are computed outside of a program.

What a language model writes is scored on the host, which no jitted program can
call. An estimate is then two programs with the host between them: `evaluate`
returns what a function gives at the points theta + eps z_q and theta - eps z_q
of Q directions, and `estimate` makes of their scores r the estimate

  -(1/Q) sum_q (r(theta + eps z_q) - r(theta - eps z_q)) / (2 eps) z_q

of the gradient of -r, so that descent raises the score (evolution strategies
with antithetic pairs: Salimans et al., 2017, arXiv 1703.03864). Both regenerate
the directions from the same keys.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zofo_jax.core import estimators, factors
from zofo_jax.core import keys as keys_lib
from zofo_jax.core import zo as zo_lib
from zofo_jax.core.zeroth_order import ZerothOrder

# Finite scores of all members, float32 [Q, 2] -> what takes their place.
Shaping = Callable[[jax.Array], jax.Array]


def unshaped(scores: jax.Array) -> jax.Array:
  """Returns the scores themselves."""
  return scores


def centered_ranks(scores: jax.Array) -> jax.Array:
  """Returns the ranks of the scores, from -1/2 to 1/2; ties share their mean.

  Args:
    scores: float32, any shape.
  """
  flat = scores.ravel()
  below = jnp.sum(flat[None] < flat[:, None], axis=1)
  ties = jnp.sum(flat[None] == flat[:, None], axis=1) - 1
  ranks = below + 0.5 * ties
  return (ranks / max(flat.size - 1, 1) - 0.5).reshape(scores.shape)


def z_scores(scores: jax.Array) -> jax.Array:
  """Returns the scores minus their mean, over their standard deviation.

  Equal scores remain equal, so that they move nothing.

  Args:
    scores: float32, any shape.
  """
  std = jnp.std(scores)
  return (scores - jnp.mean(scores)) / jnp.where(std > 0, std, 1.0)


def sampling_key(keys: keys_lib.StepKeys) -> jax.Array:
  """Returns the key by which all members of a step sample, shape [].

  Members that share their random numbers differ only where their weights make
  them differ.
  """
  # Far from the numbers by which a bilevel step splits the same key.
  return jax.random.fold_in(keys.upper, np.uint32(2**32 - 1))


def evaluate(
  fn: Callable[[Any, jax.Array], Any],
  tree: Any,
  keys: keys_lib.StepKeys,
  eps: jax.typing.ArrayLike,
  zo: ZerothOrder = ZerothOrder(),
) -> Any:
  """Evaluates a function at two points along each of Q directions.

  `zo.map_fn` decides how many directions are evaluated at once. The factors of
  low-rank directions are drawn once, however often fn reads a weight.

  Args:
    fn: maps (a tree like `tree`, a key) to any pytree of arrays; the key is the
      same for all members.
    tree: parameters; read, never written.
    keys: of the step; see `keys.step_keys`.
    eps: distance of the points, float32, shape [].
    zo: sampler and number Q of directions.

  Returns:
    What fn returns, leaves [Q, 2, ...]: at theta + eps z_q and theta - eps z_q.

  Raises:
    ValueError: the estimator is not `zo.central`, or `zo.per_example`.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> import zofo_jax as zofo
    >>> zo = zofo.ZerothOrder(num_directions=3)
    >>> keys = zofo.keys.step_keys(zofo.keys.seed_key(0), 0)
    >>> write = lambda x, key: jax.random.categorical(key, x, shape=(4,))
    >>> answers = zofo.population.evaluate(write, jnp.zeros(5), keys, 0.5, zo)
    >>> answers.shape
    (3, 2, 4)
    >>> scores = jnp.mean(answers == 2, axis=-1)  # anything, on the host
    >>> e = zofo.population.estimate(scores, keys, 0.5)
    >>> e.coefficients.shape
    (3,)
  """
  if zo.estimator != estimators.central or zo.per_example:
    raise ValueError(
      "population.evaluate: expected the estimator zo.central without "
      "per_example: members are pairs on both sides of theta."
    )
  key = sampling_key(keys)
  return zo_lib.estimate(
    lambda tree: (jnp.zeros([]), fn(factors.draw(tree), key)),
    tree,
    keys.direction,
    eps,
    zo,
    subspace_key=keys.subspace,
    has_aux=True,
  ).aux


def estimate(
  scores: jax.Array,
  keys: keys_lib.StepKeys,
  eps: jax.typing.ArrayLike,
  shaping: Shaping = unshaped,
) -> zo_lib.Estimate:
  """Estimates the gradient of minus a score from the scores of a population.

  Args:
    scores: of the members of `evaluate`, the higher the better; float32,
      shape [Q, 2]. A pair that is not finite has the coefficient zero.
    keys: as for `evaluate`.
    eps: as for `evaluate`.
    shaping: what takes the scores' place in the coefficients: `unshaped`,
      `centered_ranks` or `z_scores`.

  Returns:
    The estimate. Its values are minus the scores, not shaped.

  Raises:
    ValueError: the scores have another shape.
  """
  scores = jnp.asarray(scores, jnp.float32)
  if scores.ndim != 2 or scores.shape[1] != 2:
    raise ValueError(
      "population.estimate: expected scores of shape [Q, 2], both members of "
      f"each direction; found {scores.shape}."
    )
  finite = jnp.isfinite(scores)
  mean = jnp.mean(scores, where=finite)
  # A score that is not finite must not change the shape of the others.
  shaped = shaping(jnp.where(finite, scores, mean))
  eps = jnp.asarray(eps, jnp.float32)
  pair = jnp.all(finite, axis=1)
  coefficients = (shaped[:, 1] - shaped[:, 0]) / (2 * eps)
  return zo_lib.Estimate(
    keys=keys_lib.direction_keys(
      keys.direction, keys.subspace, scores.shape[0]
    ),
    coefficients=jnp.where(pair, coefficients, 0.0),
    num_nonfinite=jnp.sum(~pair, dtype=jnp.int32),
    values=-scores,
    aux=(),
  )


def no_objective(params: Any) -> jax.Array:
  """Raises: scores that are computed outside cannot be evaluated inside.

  Raises:
    ValueError: always.
  """
  del params
  raise ValueError(
    "The update evaluates its objective, as outer.conservative does; with "
    "scores from outside of the program expected another, such as outer.sgd."
  )
