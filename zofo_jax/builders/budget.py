"""What a run has spent after so many iterations, in units any method has.

A forward-equivalent is one row's forward pass. A backward pass for an adapter
costs one more, for all weights two more: weights' gradients take products as
large as the activations'. Recomputed activations are one more forward pass.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections

from zofo_jax.builders import algorithm
from zofo_jax.config import methods


class Passes(NamedTuple):
  """Passes of an iteration, or of many.

  Attributes:
    forward_passes: over a batch.
    backward_passes: over a batch.
    forward_equivalents: over a row.
  """

  forward_passes: int
  backward_passes: int
  forward_equivalents: int

  def __mul__(self, count: Any) -> "Passes":
    """Returns the passes of that many iterations."""
    return Passes(*(count * number for number in self))


def passes(config: ml_collections.ConfigDict, method: str) -> Passes:
  """Counts the passes of an iteration on one task.

  The penalised objective is three losses. Directions of a batch's examples
  count as one; a conservative update evaluates its objective three times more.

  Args:
    config: the run's config.
    method: one of `checks.METHODS`, but for those of two parts.
  """
  points = 0
  if methods.METHODS[method].zeroth_order:
    estimator = algorithm.ESTIMATORS[config.zo.estimator]
    per_example = config.zo.direction == "per_example"
    directions = 1 if per_example else config.zo.num_directions
    points = estimator.shared + directions * estimator.evaluations
    points += 3 * (config.zo.optimizer == "conservative")
  inner_steps, inner_rows = config.lower.num_steps, config.lower.batch_size
  rows, again = config.upper.batch_size, int(config.model.remat)
  if method == "bilevel":
    return Passes(
      inner_steps + 2 + 3 * points,
      inner_steps + 2,
      (2 + again) * (inner_steps * inner_rows + 2 * rows) + 3 * points * rows,
    )
  if points:
    return Passes(points, 0, points * rows)
  each = 2 + again + (method == "full")
  return Passes(inner_steps, inner_steps, each * inner_steps * inner_rows)


def spent(
  config: ml_collections.ConfigDict, num_steps: int, num_tasks: int = 1
) -> Passes:
  """Counts the passes of a run's first iterations.

  Args:
    config: the run's config.
    num_steps: how many iterations.
    num_tasks: that take part in each.
  """
  first, _, second = config.method.partition("_then_")
  split = min(num_steps, config.train.num_first_steps) if second else num_steps
  total = passes(config, first) * (num_tasks * split)
  if second:
    rest = passes(config, second) * (num_tasks * (num_steps - split))
    total = Passes(*map(sum, zip(total, rest, strict=True)))
  return total


def flops(fn: Callable[..., Any], *args: Any) -> float:
  """Counts the operations of a function's products of matrices.

  Args:
    fn: of arrays or their shapes; a key of None is passed as it is.
    *args: its arguments.

  Returns:
    2 m n k over every dot_general, times the lengths of loops.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from zofo_jax import budget
    >>> shape = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    >>> budget.flops(jnp.matmul, shape, shape)
    1024.0
  """
  return _flops(jax.make_jaxpr(fn)(*args).jaxpr)


def _flops(jaxpr: Any) -> float:
  total = 0.0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      shape = equation.invars[0].aval.shape
      inner_size = math.prod(shape[axis] for axis in contracted)
      total += 2.0 * inner_size * math.prod(equation.outvars[0].aval.shape)
      continue
    inside = [
      getattr(value, "jaxpr", value)
      for param in equation.params.values()
      for value in (param if isinstance(param, tuple | list) else (param,))
      if hasattr(value, "eqns") or hasattr(value, "jaxpr")
    ]
    found = [_flops(one) for one in inside]
    if equation.primitive.name == "cond":  # one of its branches
      total += max(found)
    else:
      total += equation.params.get("length", 1) * sum(found)
  return total
