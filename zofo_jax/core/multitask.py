"""Many tasks: which take part in an iteration, and where their adapters stay.

All N tasks' adapters and optimizer states are stacked on a leading axis of a
`BilevelState`; an iteration takes M of them out, moves them and theta with
`bilevel_step(..., over_tasks=True)`, and puts them back. Those stacks may be
NumPy arrays: then only the M sampled tasks are ever on the device.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from zofo_jax.core.types import PER_TASK_FIELDS, BilevelState


def inclusion_probabilities(
  sizes: Sequence[float], count: int, power: float = 0.0
) -> np.ndarray:
  """Returns the chance of every task to be among the sampled ones.

  min(1, c size_i^power), where c makes the chances add up to `count`.

  Args:
    sizes: rows of each task, shape [N].
    count: how many are sampled, at most N.
    power: 0 for equal chances, 1 for chances in proportion to the sizes,
      1 / T for a temperature T.

  Returns:
    float64, shape [N].

  Raises:
    ValueError: `count` is not between 1 and N.

  Example:
    >>> from zofo_jax import multitask
    >>> multitask.inclusion_probabilities([10, 30, 160], 1, power=1.0).tolist()
    [0.05, 0.15, 0.8]
    >>> multitask.inclusion_probabilities([10, 30, 160], 2, power=1.0).tolist()
    [0.25, 0.75, 1.0]
  """
  if not 1 <= count <= len(sizes):
    raise ValueError(
      f"{count} tasks are to be sampled; expected 1 to {len(sizes)}."
    )
  weights = np.asarray(sizes, np.float64) ** power
  certain = np.zeros(len(weights), bool)
  while True:
    rest = np.where(certain, 0.0, weights)
    share = (count - certain.sum()) / max(rest.sum(), 1e-300)
    chances = np.where(certain, 1.0, share * rest)
    if chances.max() <= 1.0:
      return chances
    certain |= chances >= 1.0


def sample_tasks(
  seed: int,
  step: int,
  sizes: Sequence[float],
  count: int,
  *,
  power: float = 0.0,
) -> np.ndarray:
  """Draws different tasks for an iteration: a pure function of its arguments.

  Systematic sampling: every task's probability is exactly that of
  `inclusion_probabilities`, so the mean over the sampled tasks is, on average,
  the mean over all tasks weighted by their probabilities.

  Args:
    seed: chooses the draws.
    step: number of the iteration.
    sizes: rows of each task, shape [N].
    count: how many different tasks are drawn, at most N.
    power: as for `inclusion_probabilities`.

  Returns:
    Numbers of tasks in order, int64, shape [count].
  """
  chances = inclusion_probabilities(sizes, count, power)
  draw = np.random.RandomState([seed, step])
  order = draw.permutation(len(chances))
  # Points one apart on a line of intervals no longer than one: each is hit once
  # at most. The line's end is exact, whatever the sum's last digit.
  ends = np.cumsum(chances[order])
  ends[-1] = count
  points = np.arange(count) + draw.random_sample()
  return np.sort(order[np.searchsorted(ends, points, side="right")])


def gather_tasks(state: BilevelState, tasks: Any) -> BilevelState:
  """Returns a state whose stacks hold some tasks only.

  Args:
    state: its stacks have an axis of N tasks, on the device or in NumPy.
    tasks: numbers of tasks, int, shape [M].
  """
  gather = lambda leaf: leaf[tasks]
  return state._replace(
    **{
      name: jax.tree.map(gather, getattr(state, name))
      for name in PER_TASK_FIELDS
    }
  )


def scatter_tasks(
  state: BilevelState, tasks: Any, moved: BilevelState
) -> BilevelState:
  """Returns `moved` with its tasks back among all the others.

  The other tasks' numbers stay as they are, bit for bit. NumPy stacks are
  written in place.

  Args:
    state: its stacks have an axis of N tasks.
    tasks: numbers of tasks, different ones, int, shape [M].
    moved: a state of these tasks alone, as `gather_tasks` gives it.
  """

  def scatter(leaf, rows):
    if isinstance(leaf, np.ndarray):
      leaf[tasks] = rows
      return leaf
    return leaf.at[tasks].set(rows, unique_indices=True)

  return moved._replace(
    **{
      name: jax.tree.map(scatter, getattr(state, name), getattr(moved, name))
      for name in PER_TASK_FIELDS
    }
  )
