"""Directional derivatives c ~ <grad f(x), z> from values of f(x + t z).

Spall, 1992; Malladi et al., 2023, arXiv 2305.17333.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# t -> (f(x + t z) [], aux), along one direction.
LineFn = Callable[[jax.Array], tuple[jax.Array, Any]]


class DirectionalDerivative(NamedTuple):
  """A directional derivative, with the evaluations it was computed from.

  Attributes:
    coefficient: the directional derivative, float32, shape [].
    values: f at the points evaluated, float32, shape [points].
    aux: auxiliary output of f at these points; leaves [points, ...].
  """

  coefficient: jax.Array
  values: jax.Array
  aux: Any


class Estimator(NamedTuple):
  """A way to compute a directional derivative.

  Attributes:
    derivative: (line, eps, base_value) -> DirectionalDerivative, where
      base_value is (f(x), aux) if `shared` is 1, else None.
    evaluations: number of forward passes for each direction.
    shared: number of forward passes that all directions share: 1 if f(x) is
      needed, else 0.
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
