"""Zeroth-order estimates of a gradient from forward evaluations alone.

For direction z_q the directional derivative c_q ~ <grad f(x), z_q> is taken
from values of f on the line x + t z_q, and the gradient estimate is
(1/Q) sum_q c_q z_q (Spall, 1992; Malladi et al., 2023, arXiv 2305.17333).
Directions are rebuilt from keys wherever they are needed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zofo_jax.core import keys as keys_lib
from zofo_jax.core import sampler as sampler_lib
from zofo_jax.core import xla

# (fn, keys [Q]) -> what fn gives for each key, stacked.
MapFn = Callable[[Callable[[jax.Array], Any], jax.Array], Any]
# f(x + t z) -> (value [], aux), along one direction.
LineFn = Callable[[jax.Array], tuple[jax.Array, Any]]


class DirectionalDerivative(NamedTuple):
  """What is found along one direction.

  Attributes:
    coefficient: directional derivative, float32, shape [].
    values: f at the points evaluated, float32, shape [points].
    aux: f's auxiliary output there; leaves [points, ...].
  """

  coefficient: jax.Array
  values: jax.Array
  aux: Any


class Estimator(NamedTuple):
  """A way to take a directional derivative.

  Attributes:
    derivative: (line, eps, base_value) -> DirectionalDerivative; base_value is
      (f(x), aux) if directions share it, else None.
    evaluations: forward passes for each direction.
    shared: forward passes for all of them together: 1 if f(x) is needed.
  """

  derivative: Callable[[LineFn, jax.Array, Any], DirectionalDerivative]
  evaluations: int
  shared: int


def _central(
  line: LineFn, eps: jax.Array, base_value: Any
) -> DirectionalDerivative:
  del base_value
  # Both signs are a batch axis of one evaluation: they share one draw of z.
  values, aux = jax.vmap(line)(jnp.stack([eps, -eps]))
  return DirectionalDerivative((values[0] - values[1]) / (2 * eps), values, aux)


def _forward(
  line: LineFn, eps: jax.Array, base_value: Any
) -> DirectionalDerivative:
  value, aux = line(eps)
  return _one_point((value - base_value[0]) / eps, value, aux)


def _exact(
  line: LineFn, eps: jax.Array, base_value: Any
) -> DirectionalDerivative:
  del base_value
  # The tangent is z itself, formed layer by layer like the perturbation.
  value, coefficient, aux = jax.jvp(
    line, (jnp.zeros_like(eps),), (jnp.ones_like(eps),), has_aux=True
  )
  return _one_point(coefficient, value, aux)


def _one_point(
  coefficient: jax.Array, value: jax.Array, aux: Any
) -> DirectionalDerivative:
  aux = jax.tree.map(lambda leaf: leaf[None], aux)
  return DirectionalDerivative(coefficient, value.reshape(1), aux)


# c = (f(x + eps z) - f(x - eps z)) / (2 eps).
central = Estimator(_central, evaluations=2, shared=0)
# c = (f(x + eps z) - f(x)) / eps, biased by eps/2 z^T H z.
forward = Estimator(_forward, evaluations=1, shared=1)
# c = <grad f(x), z>, by forward-mode differentiation: no eps. A tangent costs
# about as much as a value.
exact = Estimator(_exact, evaluations=2, shared=0)


class Estimate(NamedTuple):
  """A gradient estimate sum_q coefficients[q] z(keys[q]) / number of finite q.

  Attributes:
    keys: keys of the directions: `direction` [Q] and one `subspace` [].
    coefficients: directional derivatives, float32, shape [Q]; zero where the
      evaluation was not finite.
    num_nonfinite: how many of them were not finite, int32, shape [].
    values: f at the points evaluated, float32, shape [Q, points].
    aux: f's auxiliary output there; leaves [Q, points, ...].
  """

  keys: keys_lib.DirectionKey
  coefficients: jax.Array
  num_nonfinite: jax.Array
  values: jax.Array
  aux: Any

  def mean_coefficients(self) -> jax.Array:
    """Returns the directions' weights in the gradient, float32 [Q]."""
    num_finite = self.coefficients.shape[0] - self.num_nonfinite
    return self.coefficients / jnp.maximum(num_finite, 1)

  def mask_nonfinite(self, is_finite: jax.Array) -> "Estimate":
    """Returns the estimate, or one of zeros unless `is_finite`, bool []."""
    count = self.coefficients.shape[0]
    return self._replace(
      coefficients=jnp.where(is_finite, self.coefficients, 0.0),
      num_nonfinite=jnp.where(is_finite, self.num_nonfinite, count),
    )


def _with_aux(fn: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
  def call(*args):
    value, aux = fn(*args) if has_aux else (fn(*args), ())
    return value.astype(jnp.float32), aux

  return call


def _collect(
  keys: keys_lib.DirectionKey, derivatives: DirectionalDerivative
) -> Estimate:
  finite = jnp.isfinite(derivatives.coefficient)
  return Estimate(
    keys=keys,
    coefficients=jnp.where(finite, derivatives.coefficient, 0.0),
    num_nonfinite=jnp.sum(~finite, dtype=jnp.int32),
    values=derivatives.values,
    aux=derivatives.aux,
  )


def _replicate(x: jax.Array) -> jax.Array:
  """Returns x [B], whole on every device: B sums of one term each."""
  diagonal = jnp.eye(x.shape[0], dtype=bool)
  return jnp.sum(jnp.where(diagonal, x[None], 0.0), axis=1)


def estimate(
  fn: Callable[[Any], Any],
  tree: Any,
  key: jax.Array,
  eps: jax.typing.ArrayLike,
  *,
  sampler: sampler_lib.Sampler,
  estimator: Estimator = central,
  num_directions: int = 1,
  subspace_key: jax.Array | None = None,
  has_aux: bool = False,
  map_fn: MapFn = jax.lax.map,
) -> Estimate:
  """Estimates the gradient of fn at tree from its values alone.

  Args:
    fn: maps a tree like `tree` to a scalar, or to (scalar, aux). Any function
      of any score will do, differentiable or not, but for `exact`.
    tree: parameters; read, never written. Any float dtype, any sharding.
    key: typed PRNG key, shape []. Split into `num_directions` keys.
    eps: smoothing radius, float32, shape []; traced, so it can change freely.
    sampler: which weights are perturbed and along what.
    estimator: `central`, `forward` or `exact`.
    num_directions: Q.
    subspace_key: key of what the directions share, kept by the caller over
      several steps; a new one if None.
    has_aux: whether fn returns a pair.
    map_fn: how directions are evaluated: one after another, or as
      `mesh.map_directions` does.

  Returns:
    The estimate, as keys and coefficients.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> import zofo_jax as zofo
    >>> gradient = jnp.array([1.0, -2.0, 3.0])
    >>> sampler = zofo.Sampler(zofo.directions.Rademacher())
    >>> e = zofo.zo.estimate(lambda x: x @ gradient, jnp.zeros(3),
    ...                      jax.random.key(0), 0.5, sampler=sampler)
    >>> z = sampler.apply_directions(jnp.zeros(3), e.keys, jnp.ones(1))
    >>> bool(jnp.allclose(e.coefficients[0], z @ gradient))
    True
  """
  eps = jnp.asarray(eps, jnp.float32)
  keys = keys_lib.direction_keys(key, subspace_key, num_directions)
  value_of = _with_aux(fn, has_aux)
  base_value = value_of(tree) if estimator.shared else None

  def derivative(direction_key):
    direction = keys_lib.DirectionKey(direction_key, keys.subspace)
    line = lambda t: value_of(sampler.perturb(tree, direction, t))
    return estimator.derivative(line, eps, base_value)

  return _collect(keys, map_fn(derivative, keys.direction))


def estimate_per_example(
  fn: Callable[[Any, Any], Any],
  tree: Any,
  examples: Any,
  key: jax.Array,
  eps: jax.typing.ArrayLike,
  *,
  sampler: sampler_lib.Sampler,
  estimator: Estimator = central,
  subspace_key: jax.Array | None = None,
  has_aux: bool = False,
) -> Estimate:
  """Estimates the gradient of the mean of fn, a direction for each example.

  Example i is evaluated along its own z_i alone, so a batch of B gives B
  directions for the cost of one with `directions.PerExample`, whose products
  the examples share; E[(1/B) sum_i c_i z_i] is the mean gradient.

  Args:
    fn: maps (tree, example) to a scalar, or to (scalar, aux).
    tree: parameters; read, never written.
    examples: pytree with a leading axis B on every leaf.
    key: typed PRNG key, shape []. Split into B keys.
    eps: smoothing radius, float32, shape [].
    sampler: which weights are perturbed and along what.
    estimator: `central`, `forward` or `exact`.
    subspace_key: as for `estimate`.
    has_aux: whether fn returns a pair.

  Returns:
    The estimate, with Q = B.
  """
  eps = jnp.asarray(eps, jnp.float32)
  num_examples = jax.tree.leaves(examples)[0].shape[0]
  keys = keys_lib.direction_keys(key, subspace_key, num_examples)
  value_of = _with_aux(fn, has_aux)

  def derivative(direction_key, example):
    direction = keys_lib.DirectionKey(direction_key, keys.subspace)
    base_value = value_of(tree, example) if estimator.shared else None
    line = lambda t: value_of(sampler.perturb(tree, direction, t), example)
    return estimator.derivative(line, eps, base_value)

  derivatives = jax.vmap(derivative)(keys.direction, examples)
  # Where the batch is sharded its directions are too, and their sum would be an
  # exchange of whole matrices; every device is to have all B of them. Keys are
  # split anew, out of the compiler's sight.
  rederived_keys = keys_lib.direction_keys(
    xla.recompute(key), keys.subspace, num_examples
  )
  estimated = _collect(rederived_keys, derivatives)
  return estimated._replace(coefficients=_replicate(estimated.coefficients))


def gradient(
  tree: Any, estimated: Estimate, sampler: sampler_lib.Sampler
) -> Any:
  """Writes an estimate out as a float32 tree, for any optax transformation.

  Costs one float32 copy of `tree`; `outer.sgd` does without.

  Args:
    tree: the parameters.
    estimated: the estimate at them.
    sampler: the sampler it was made with.

  Returns:
    A float32 tree like `tree`.
  """
  return sampler.weighted_sum(
    tree, estimated.keys, estimated.mean_coefficients()
  )
