"""Zeroth-order estimates of a gradient from forward evaluations alone.

For direction z_q the directional derivative c_q ~ <grad f(x), z_q> is taken
from values of f on the line x + t * z_q, and the gradient estimate is
(1/Q) sum_q c_q z_q (Spall, 1992; Malladi et al., 2023, arXiv 2305.17333).
Directions are rebuilt from keys wherever they are needed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zofo_jax import directions

# line(key, t) = f(x + t * z(key)) -> (value [], aux).
Line = Callable[[jax.Array, jax.Array], tuple[jax.Array, Any]]


class Estimate(NamedTuple):
  """A gradient estimate (1/Q) sum_q coefficients[q] * z(keys[q]).

  Attributes:
    keys: typed PRNG keys of the directions, shape [Q].
    coefficients: directional derivatives, float32, shape [Q]; zero where the
      evaluation was not finite.
    num_nonfinite: how many of them were not finite, int32, shape [].
    value: mean of f over the points evaluated, float32, shape [].
    aux: mean of f's auxiliary output over the same points.
  """

  keys: jax.Array
  coefficients: jax.Array
  num_nonfinite: jax.Array
  value: jax.Array
  aux: Any


def central(
  line: Line, keys: jax.Array, eps: jax.Array
) -> tuple[jax.Array, jax.Array, Any]:
  """Central difference: c = (f(x + eps z) - f(x - eps z)) / (2 eps).

  Both signs are a batch axis of one evaluation, so they share one draw of z.

  Args:
    line: f along the direction of a key.
    keys: typed PRNG keys, shape [Q].
    eps: smoothing radius, float32, shape [].

  Returns:
    Coefficients [Q], values [Q, 2] and the aux output [Q, 2, ...].
  """

  def probe(key):
    values, aux = jax.vmap(line, (None, 0))(key, jnp.stack([eps, -eps]))
    return (values[0] - values[1]) / (2 * eps), values, aux

  return jax.lax.map(probe, keys)


def forward(
  line: Line, keys: jax.Array, eps: jax.Array
) -> tuple[jax.Array, jax.Array, Any]:
  """Forward difference: c = (f(x + eps z) - f(x)) / eps, f(x) taken once.

  Biased by eps/2 z^T H z; one evaluation cheaper than `central` for each
  direction but the first. Arguments and returns as for `central`, with
  values [Q, 1].
  """
  origin, _ = line(keys[0], jnp.zeros_like(eps))

  def probe(key):
    value, aux = line(key, eps)
    values = value.reshape(1)
    return (value - origin) / eps, values, jax.tree.map(lambda a: a[None], aux)

  return jax.lax.map(probe, keys)


def exact(
  line: Line, keys: jax.Array, eps: jax.Array
) -> tuple[jax.Array, jax.Array, Any]:
  """Exact directional derivative by forward-mode differentiation, no eps.

  The tangent is z itself, formed layer by layer like the perturbation.
  Arguments and returns as for `central`, with values [Q, 1].
  """

  def probe(key):
    value, slope, aux = jax.jvp(
      lambda t: line(key, t),
      (jnp.zeros_like(eps),),
      (jnp.ones_like(eps),),
      has_aux=True,
    )
    return slope, value.reshape(1), jax.tree.map(lambda a: a[None], aux)

  return jax.lax.map(probe, keys)


Estimator = Callable[[Line, jax.Array, jax.Array], tuple[Any, Any, Any]]


def estimate(
  fn: Callable[[Any], Any],
  tree: Any,
  key: jax.Array,
  eps: jax.Array | float,
  *,
  sampler: directions.Sampler,
  estimator: Estimator = central,
  num_directions: int = 1,
  has_aux: bool = False,
) -> Estimate:
  """Estimates the gradient of fn at tree from its values alone.

  Args:
    fn: maps a tree like `tree` to a scalar, or to (scalar, aux).
    tree: parameters; read, never written. Any float dtype, any sharding.
    key: typed PRNG key, shape []. Split into `num_directions` keys.
    eps: smoothing radius, float32, shape []; traced, so it can change freely.
    sampler: which weights are perturbed and along what.
    estimator: `central`, `forward` or `exact`.
    num_directions: Q; their evaluations run one after another.
    has_aux: whether fn returns a pair.

  Returns:
    The estimate, as keys and coefficients.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from zofo_jax import directions, zo
    >>> gradient = jnp.array([1.0, -2.0, 3.0])
    >>> sampler = directions.Sampler(directions.Rademacher())
    >>> e = zo.estimate(lambda x: x @ gradient, jnp.zeros(3),
    ...                 jax.random.key(0), 0.5, sampler=sampler)
    >>> z = sampler.add(jnp.zeros(3), e.keys, jnp.ones(1))
    >>> bool(jnp.allclose(e.coefficients[0], z @ gradient))
    True
  """
  eps = jnp.asarray(eps, jnp.float32)
  keys = jax.random.split(key, num_directions)

  def line(direction_key, t):
    out = fn(sampler.perturb(tree, direction_key, t))
    value, aux = out if has_aux else (out, ())
    return value.astype(jnp.float32), aux

  coefficients, values, aux = estimator(line, keys, eps)
  finite = jnp.isfinite(coefficients)
  return Estimate(
    keys=keys,
    coefficients=jnp.where(finite, coefficients, 0.0),
    num_nonfinite=jnp.sum(~finite, dtype=jnp.int32),
    value=jnp.mean(values),
    aux=jax.tree.map(lambda leaf: jnp.mean(leaf, axis=(0, 1)), aux),
  )


def gradient(
  tree: Any, estimated: Estimate, sampler: directions.Sampler
) -> Any:
  """Writes an estimate out as a float32 tree, for any optax transformation.

  Costs one float32 copy of `tree`; `outer.sgd` does without.
  """
  weights = estimated.coefficients / estimated.coefficients.shape[0]
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), tree)
  return sampler.add(zeros, estimated.keys, weights)
