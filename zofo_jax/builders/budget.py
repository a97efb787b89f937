"""The compute of a run, in units that all methods share.

A forward-equivalent is the forward pass of one row. A backward pass for an
adapter costs one more, for all weights two more: the gradients of the weights
take products as large as those of the activations. Recomputed activations are
one more forward pass.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections

from zofo_jax.builders import base_update, storage
from zofo_jax.config import methods


class Passes(NamedTuple):
  """Passes of one iteration, or of many.

  Attributes:
    forward_passes: over a batch.
    backward_passes: over a batch.
    forward_equivalents: over a row; see this module.
  """

  forward_passes: int
  backward_passes: int
  forward_equivalents: int

  def __mul__(self, count: Any) -> "Passes":
    """Returns the passes of `count` iterations."""
    return Passes(*(count * number for number in self))


class Budget(NamedTuple):
  """Counts what a run computes, whatever its method.

  Attributes:
    method: one of `config.methods.METHODS`.
    inner_steps: T.
    lower_rows: batch size of the lower level.
    upper_rows: batch size of the upper level.
    remat: whether activations are recomputed.
    zo_evaluations: evaluations of the objective in a zeroth-order step.
    num_first_steps: iterations of the first stage, if the method has two.
    length_evaluations: of the objective of a guided step's lengths.
    length_losses: in one of these.
    length_rows: in one of these.
    zo_losses: in an evaluation of the objective; one where rewards are it.
  """

  method: str
  inner_steps: int
  lower_rows: int
  upper_rows: int
  remat: bool
  zo_evaluations: int
  num_first_steps: int
  length_evaluations: int = 0
  length_losses: int = 1
  length_rows: int = 0
  zo_losses: int = 3

  def passes(self, method: str | None = None) -> Passes:
    """Counts the passes of an iteration on one task.

    The penalised objective is three losses, and the reward of an answer counts
    as one.

    Args:
      method: one of `config.methods.METHODS` of one stage; None for the run's.
    """
    method = method or self.method
    steps, recomputed = self.inner_steps, int(self.remat)
    zeroth_order = methods.METHODS[method].zeroth_order
    points = self.zo_evaluations if zeroth_order else 0
    if method == "bilevel":
      points *= self.zo_losses
      return Passes(
        steps + 2 + points + self.length_losses * self.length_evaluations,
        steps + 2,
        (2 + recomputed) * (steps * self.lower_rows + 2 * self.upper_rows)
        + points * self.upper_rows
        + self.length_evaluations * self.length_rows,
      )
    if points:
      return Passes(points, 0, points * self.upper_rows)
    per_row = 2 + recomputed + (method == "full")
    return Passes(steps, steps, per_row * steps * self.lower_rows)

  def total(self, num_steps: int, num_tasks: int = 1) -> Passes:
    """Counts the passes of a run's first iterations.

    Args:
      num_steps: number of iterations.
      num_tasks: number of tasks in each iteration.
    """
    first, _, second = self.method.partition("_then_")
    num_first = min(num_steps, self.num_first_steps) if second else num_steps
    total = self.passes(first) * (num_tasks * num_first)
    if second:
      num_second = num_tasks * (num_steps - num_first)
      second_stage = self.passes(second) * num_second
      total = Passes(*map(sum, zip(total, second_stage, strict=True)))
    return total


def make_budget(config: ml_collections.ConfigDict) -> Budget:
  """Makes the counter of a run's passes.

  The directions of a batch's examples count as one; a conservative update
  evaluates its objective three more times.
  """
  estimator = base_update.ESTIMATORS[config.zo.estimator]
  kinds = (config.zo.direction, config.guided.random)
  per_example = "per_example" in kinds
  num_directions = 1 if per_example else config.zo.num_directions
  evaluations = estimator.shared + num_directions * estimator.evaluations
  evaluations += 3 * (config.zo.optimizer == "conservative")
  guide, penalty = base_update.make_base_update(config).guide, False
  if guide is not None:
    evaluations *= guide.random
    penalty = guide.penalty
  upper_rows = config.upper.batch_size
  return Budget(
    method=config.method,
    inner_steps=config.lower.num_steps,
    lower_rows=config.lower.batch_size,
    upper_rows=upper_rows,
    remat=config.model.remat,
    zo_evaluations=evaluations,
    num_first_steps=config.train.num_first_steps,
    length_evaluations=guide.rule.evaluations if guide else 0,
    length_losses=1 + penalty,
    length_rows=(config.guided.batch_size or upper_rows) + penalty * upper_rows,
    zo_losses=1 if config.zo.objective == "reward" else 3,
  )


def flops(fn: Callable[..., Any], *args: Any) -> float:
  """Counts the operations of a function's matrix products.

  Args:
    fn: function of arrays or of their shapes.
    *args: its arguments.

  Returns:
    2 m n k over every dot_general, times the lengths of loops.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from zofo_jax.builders import budget
    >>> shape = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    >>> budget.flops(jnp.matmul, shape, shape)
    1024.0
  """

  def products(equation):
    if equation.primitive.name != "dot_general":
      return None
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    inner_size = math.prod(shape[axis] for axis in contracted)
    return 2.0 * inner_size * math.prod(equation.outvars[0].aval.shape)

  return _total(jax.make_jaxpr(fn)(*args).jaxpr, products)


class Transfers(NamedTuple):
  """Bytes between the memories of the host and of the devices.

  Attributes:
    to_device: copied to the devices.
    to_host: copied to the host.
  """

  to_device: float
  to_host: float


def transfers(fn: Callable[..., Any], *args: Any) -> Transfers:
  """Counts what a function copies between host and devices.

  Args:
    fn: function of arrays or of their shapes.
    *args: its arguments; those in the host's memory have a sharding that says
      so.

  Returns:
    Bytes, times the lengths of loops, on all devices.
  """
  jaxpr = jax.make_jaxpr(fn)(*args).jaxpr

  def copies_from(memory):
    def copied(equation):
      if equation.primitive.name != "device_put":
        return None
      pairs = zip(equation.invars, equation.outvars, strict=True)
      return sum(
        storage.array_bytes(old.aval.shape, old.aval.dtype)
        for old, new in pairs
        if old.aval.memory_space == memory != new.aval.memory_space
      )

    return copied

  space = jax.memory.Space
  return Transfers(
    _total(jaxpr, copies_from(space.Host)),
    _total(jaxpr, copies_from(space.Device)),
  )


def _total(jaxpr: Any, count: Callable[[Any], float | None]) -> float:
  """Sums over the equations of a program what `count` does not leave as None.

  A loop counts as often as it runs, and of a conditional the largest branch.
  """
  total = 0.0
  for equation in jaxpr.eqns:
    number = count(equation)
    if number is not None:
      total += number
      continue
    inside = [
      getattr(value, "jaxpr", value)
      for param in equation.params.values()
      for value in (param if isinstance(param, tuple | list) else (param,))
      if hasattr(value, "eqns") or hasattr(value, "jaxpr")
    ]
    counts = [_total(inner, count) for inner in inside]
    if equation.primitive.name == "cond":  # runs one of its branches
      total += max(counts)
    else:
      total += equation.params.get("length", 1) * sum(counts)
  return total
