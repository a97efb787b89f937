"""Zeroth-order estimates of a gradient from forward evaluations alone.

Along a direction z_q, the directional derivative c_q ~ <grad f(x), z_q> is
computed from values of f on the line x + t z_q, and the gradient estimate is

  (1/Q) sum_q c_q z_q

(Spall, 1992; Malladi et al., 2023, arXiv 2305.17333). Directions are never
stored: they are regenerated from keys wherever they are needed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zofo_jax.core import checks, xla
from zofo_jax.core import keys as keys_lib
from zofo_jax.core import sampler as sampler_lib
from zofo_jax.core.estimators import (
  DirectionalDerivative as DirectionalDerivative,
)
from zofo_jax.core.estimators import Estimator as Estimator
from zofo_jax.core.estimators import LineFn as LineFn
from zofo_jax.core.estimators import central as central
from zofo_jax.core.estimators import exact as exact
from zofo_jax.core.estimators import forward as forward
from zofo_jax.core.zeroth_order import MapFn as MapFn
from zofo_jax.core.zeroth_order import ZerothOrder as ZerothOrder


class Estimate(NamedTuple):
  """A gradient estimate sum_q coefficients[q] z(keys[q]) / number of finite q.

  Attributes:
    keys: keys of the directions: `direction` [Q] and one `subspace` [].
    coefficients: directional derivatives, float32, shape [Q]; zero where the
      evaluation was not finite.
    num_nonfinite: number of directions that were not finite, int32, shape [].
    values: f at the points evaluated, float32, shape [Q, points].
    aux: auxiliary output of f at these points; leaves [Q, points, ...].
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
  fn = checks.checked_score(fn, "fn", has_aux)

  def call(*args):
    value, aux = fn(*args) if has_aux else (fn(*args), ())
    return jnp.asarray(value, jnp.float32), aux

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
  zo: ZerothOrder = ZerothOrder(),
  *,
  subspace_key: jax.Array | None = None,
  has_aux: bool = False,
) -> Estimate:
  """Estimates the gradient of fn at tree from its values alone.

  Args:
    fn: maps a tree like `tree` to a scalar, or to (scalar, aux). Need not be
      differentiable, unless the estimator is `exact`.
    tree: parameters; read, never written. Any float dtype, any sharding.
    key: typed PRNG key, shape []. Split into `zo.num_directions` keys.
    eps: smoothing radius, float32, shape []; traced, so it can change freely.
    zo: sampler, estimator and number Q of directions.
    subspace_key: key of what the directions share, kept by the caller over
      several steps; a new one if None.
    has_aux: whether fn returns a pair.

  Returns:
    The estimate, as keys and coefficients.

  Raises:
    ValueError: `zo.per_example`, which needs a batch: see `estimate_on_batch`.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> import zofo_jax as zofo
    >>> gradient = jnp.array([1.0, -2.0, 3.0])
    >>> sampler = zofo.Sampler(zofo.directions.Rademacher())
    >>> e = zofo.zo.estimate(lambda x: x @ gradient, jnp.zeros(3),
    ...                      jax.random.key(0), 0.5, zofo.ZerothOrder(sampler))
    >>> z = sampler.apply_directions(jnp.zeros(3), e.keys, jnp.ones(1))
    >>> bool(jnp.allclose(e.coefficients[0], z @ gradient))
    True
  """
  if zo.per_example:
    raise ValueError(
      "zo.estimate: per_example needs the examples; expected "
      "zo.estimate_on_batch or zo.estimate_per_example."
    )
  eps = jnp.asarray(eps, jnp.float32)
  keys = keys_lib.direction_keys(key, subspace_key, zo.num_directions)
  value_of = _with_aux(fn, has_aux)
  base_value = value_of(tree) if zo.estimator.shared else None

  def derivative(direction_key):
    direction = keys_lib.DirectionKey(direction_key, keys.subspace)
    line = zo.sampler.line(value_of, tree, direction)
    return zo.estimator.derivative(line, eps, base_value)

  return _collect(keys, zo.map_fn(derivative, keys.direction))


def estimate_per_example(
  fn: Callable[[Any, Any], Any],
  tree: Any,
  examples: Any,
  key: jax.Array,
  eps: jax.typing.ArrayLike,
  zo: ZerothOrder = ZerothOrder(),
  *,
  subspace_key: jax.Array | None = None,
  has_aux: bool = False,
) -> Estimate:
  """Estimates the gradient of the mean of fn, with a direction per example.

  Example i is evaluated along its own z_i, so a batch of B examples gives B
  directions. With `directions.PerExample`, whose matrix products the examples
  share, they cost as much as one; other kinds need B perturbed copies of the
  weights. E[(1/B) sum_i c_i z_i] is the mean gradient.

  Args:
    fn: maps (tree, example) to a scalar, or to (scalar, aux).
    tree: parameters; read, never written.
    examples: pytree with a leading axis B on every leaf.
    key: typed PRNG key, shape []. Split into B keys.
    eps: smoothing radius, float32, shape [].
    zo: sampler and estimator.
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
    base_value = value_of(tree, example) if zo.estimator.shared else None
    line = zo.sampler.line(lambda x: value_of(x, example), tree, direction)
    return zo.estimator.derivative(line, eps, base_value)

  derivatives = jax.vmap(derivative)(keys.direction, examples)
  # Where the batch is sharded its directions are too, and their sum would be an
  # exchange of whole matrices; every device is to have all B of them. Keys are
  # split anew, out of the compiler's sight.
  rederived_keys = keys_lib.direction_keys(
    xla.recompute(key), keys.subspace, num_examples
  )
  estimated = _collect(rederived_keys, derivatives)
  return estimated._replace(coefficients=_replicate(estimated.coefficients))


def estimate_on_batch(
  fn: Callable[[Any, Any], Any],
  tree: Any,
  batch: Any,
  key: jax.Array,
  eps: jax.typing.ArrayLike,
  zo: ZerothOrder = ZerothOrder(),
  *,
  axis: int = 0,
  subspace_key: jax.Array | None = None,
  has_aux: bool = False,
) -> Estimate:
  """Estimates the gradient of a mean over a batch, as `zo` says.

  `estimate` of fn(tree, batch); with `zo.per_example`, `estimate_per_example`
  of fn on batches of a single example.

  Args:
    fn: maps (tree, batch) to a scalar, or to (scalar, aux).
    tree: parameters; read, never written.
    batch: any pytree of arrays.
    key: typed PRNG key, shape [].
    eps: smoothing radius, float32, shape [].
    zo: how the gradient is estimated.
    axis: axis of the batch's leaves that counts examples; read only with
      `zo.per_example`.
    subspace_key: as for `estimate`.
    has_aux: whether fn returns a pair.

  Returns:
    The estimate.

  Raises:
    ValueError: `zo.per_example`, and the leaves differ in their number of
      examples.
  """
  options: dict[str, Any] = {"subspace_key": subspace_key, "has_aux": has_aux}
  if not zo.per_example:
    fn_of_tree = lambda tree: fn(tree, batch)
    return estimate(fn_of_tree, tree, key, eps, zo, **options)
  checks.check_examples(batch, axis)
  single = lambda leaf: jnp.expand_dims(leaf, axis)
  return estimate_per_example(
    lambda tree, example: fn(tree, jax.tree.map(single, example)),
    tree,
    jax.tree.map(lambda leaf: jnp.moveaxis(leaf, axis, 0), batch),
    key,
    eps,
    zo,
    **options,
  )


def gradient(
  tree: Any,
  estimated: Estimate,
  sampler: sampler_lib.Sampler = sampler_lib.Sampler(),
) -> Any:
  """Returns an estimate as a gradient tree, for any optax transformation.

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


def value_and_grad(
  fn: Callable[..., Any],
  zo: ZerothOrder = ZerothOrder(),
  *,
  eps: jax.typing.ArrayLike = 1e-3,
  has_aux: bool = False,
) -> Callable[..., tuple[Any, Any]]:
  """Returns a function like `jax.value_and_grad(fn)`, by forward passes alone.

  The gradient is (1/Q) sum_q c_q z_q; with `zo.central`,

    c_q = (fn(x + eps z_q) - fn(x - eps z_q)) / (2 eps).

  The value is the mean of fn over the points evaluated, which is fn(x) up to
  O(eps^2) with `zo.central`, O(eps) with `zo.forward`, and exactly with
  `zo.exact`.

  Args:
    fn: maps (params, *args) to a scalar, or to (scalar, aux). Need not be
      differentiable, unless the estimator is `zo.exact`; must be deterministic.
    zo: how the gradient is estimated. With `per_example`, axis 0 of the
      leaves of `args` counts examples.
    eps: smoothing radius, float32, shape [].
    has_aux: whether fn returns a pair.

  Returns:
    (params, key, *args) -> (value, grads), or ((value, aux), grads), where
    value is float32, shape [], grads a float32 tree like `params`, and aux has
    leaves [Q, points, ...]. `key` is a typed PRNG key: a new one for each step.

  Raises:
    ValueError: `zo.subspace_steps` is not 1: the function does not know the
      number of the step. `estimate` takes a `subspace_key`.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> import zofo_jax as zofo
    >>> def loss(params, x):
    ...   return jnp.mean((params["w"] - x) ** 2)
    >>> value_and_grad = zofo.zo.value_and_grad(
    ...     loss, zofo.ZerothOrder(num_directions=8))
    >>> tx = optax.adam(0.1)
    >>> params = {"w": jnp.zeros(3)}
    >>> opt_state = tx.init(params)
    >>> @jax.jit
    ... def step(params, opt_state, key):
    ...   value, grads = value_and_grad(params, key, jnp.ones(3))
    ...   updates, opt_state = tx.update(grads, opt_state, params)
    ...   return optax.apply_updates(params, updates), opt_state, value
    >>> for key in jax.random.split(jax.random.key(0), 100):
    ...   params, opt_state, value = step(params, opt_state, key)
    >>> bool(value < 0.01)
    True
  """
  if zo.subspace_steps != 1:
    raise ValueError(
      "zo.value_and_grad: expected subspace_steps=1, as it does not know the "
      f"number of the step; found {zo.subspace_steps}."
    )

  def call(params: Any, key: jax.Array, *args: Any) -> tuple[Any, Any]:
    estimated = estimate_on_batch(
      lambda params, args: fn(params, *args),
      params,
      args,
      key,
      eps,
      zo,
      has_aux=has_aux,
    )
    value = jnp.mean(estimated.values)
    grads = gradient(params, estimated, zo.sampler)
    return ((value, estimated.aux) if has_aux else value), grads

  return call
