"""The options of a zeroth-order step as one value."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from zofo_jax.core import checks, directions, estimators
from zofo_jax.core import sampler as sampler_lib

# (fn, keys [Q]) -> what fn returns for each key, stacked.
MapFn = Callable[[Callable[[jax.Array], Any], jax.Array], Any]


@dataclasses.dataclass(frozen=True, init=False)
class ZerothOrder:
  """How a gradient is estimated from forward passes; hashable.

  Attributes:
    sampler: which parameters are perturbed, and along what directions. A
      `directions.Direction` stands for `Sampler(direction)`.
    estimator: `zo.central`, `zo.forward` or `zo.exact`.
    num_directions: number Q of directions, over which the estimate is averaged.
    per_example: perturb every example of a batch along its own direction
      instead; needs `directions.PerExample`.
    subspace_steps: number of consecutive steps whose directions share what a
      `subspace` key determines, such as the column space of
      `directions.LowRank`.
    map_fn: evaluates the directions: `jax.lax.map`, one after another, or a
      function like it that spreads them over devices.

  Raises:
    ValueError: a number is below 1, or two options exclude each other.

  Examples:
    >>> import zofo_jax as zofo
    >>> zo = zofo.ZerothOrder(zofo.directions.LowRank(4), num_directions=2)
    >>> zo.sampler.direction
    LowRank(rank=4)
    >>> zofo.ZerothOrder(per_example=True, num_directions=2)
    Traceback (most recent call last):
    ...
    ValueError: ZerothOrder: per_example takes one direction for each example; \
expected num_directions=1, found 2.
  """

  sampler: sampler_lib.Sampler
  estimator: estimators.Estimator
  num_directions: int
  per_example: bool
  subspace_steps: int
  map_fn: MapFn

  def __init__(
    self,
    sampler: sampler_lib.Sampler | directions.Direction = sampler_lib.Sampler(),
    estimator: estimators.Estimator = estimators.central,
    num_directions: int = 1,
    per_example: bool = False,
    subspace_steps: int = 1,
    map_fn: MapFn = jax.lax.map,
  ):
    """Sets the fields, and checks that they fit together."""
    values = locals()
    if not isinstance(sampler, sampler_lib.Sampler):
      values["sampler"] = _sampler_of(sampler)
    for field in dataclasses.fields(self):
      object.__setattr__(self, field.name, values[field.name])
    self._check()

  def _check(self) -> None:
    if not isinstance(self.estimator, estimators.Estimator):
      raise ValueError(
        f"ZerothOrder.estimator: found {self.estimator!r}; expected "
        "zo.central, zo.forward or zo.exact."
      )
    for name in ("num_directions", "subspace_steps"):
      value = getattr(self, name)
      if value < 1:
        raise ValueError(
          f"ZerothOrder.{name}: found {value}; expected at least 1."
        )
    if not self.per_example:
      return
    if self.num_directions != 1:
      raise ValueError(
        "ZerothOrder: per_example takes one direction for each example; "
        f"expected num_directions=1, found {self.num_directions}."
      )
    if self.map_fn is not jax.lax.map:
      raise ValueError(
        "ZerothOrder: per_example evaluates all examples at once; expected no "
        "map_fn."
      )
    if not any(
      isinstance(kind, directions.PerExample)
      for kind in checks.nested_directions(self.sampler.direction)
    ):
      raise ValueError(
        "ZerothOrder: per_example needs directions whose examples share their "
        f"products, directions.PerExample; found {self.sampler.direction}."
      )


def _sampler_of(direction: Any) -> sampler_lib.Sampler:
  if isinstance(direction, type) or not hasattr(direction, "sample"):
    raise ValueError(
      f"ZerothOrder.sampler: found {direction!r}; expected a Sampler or a "
      "Direction, such as directions.LowRank(4)."
    )
  return sampler_lib.Sampler(direction)
