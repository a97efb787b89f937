"""Many tasks: sampling them, and gathering and scattering their adapters.

The adapters and optimizer states of all N tasks are stacked on a leading axis
of a `BilevelState`. An iteration gathers M of them, updates them and theta by
`bilevel_step(..., over_tasks=True)`, and scatters them back. The stacks may be
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
  """Returns the probability of every task to be among the sampled ones.

  min(1, c size_i^power), where c makes the probabilities add up to `count`.

  Args:
    sizes: number of rows of each task, shape [N].
    count: number of tasks that are sampled, at most N.
    power: 0 for equal probabilities, 1 for probabilities in proportion to the
      sizes, 1 / T for a temperature T.

  Returns:
    float64, shape [N].

  Raises:
    ValueError: `count` is not between 1 and N.

  Examples:
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
    uncertain = np.where(certain, 0.0, weights)
    share = (count - certain.sum()) / max(uncertain.sum(), 1e-300)
    probabilities = np.where(certain, 1.0, share * uncertain)
    if probabilities.max() <= 1.0:
      return probabilities
    certain |= probabilities >= 1.0


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
    seed: seed of the run.
    step: number of the iteration.
    sizes: number of rows of each task, shape [N].
    count: number of different tasks that are drawn, at most N.
    power: as for `inclusion_probabilities`.

  Returns:
    Indices of tasks, ascending, int64, shape [count].
  """
  probabilities = inclusion_probabilities(sizes, count, power)
  random = np.random.RandomState([seed, step])
  order = random.permutation(len(probabilities))
  # Points at distance one on a line of intervals no longer than one: an
  # interval is hit at most once. The end is exact despite rounding in the sum.
  ends = np.cumsum(probabilities[order])
  ends[-1] = count
  points = np.arange(count) + random.random_sample()
  return np.sort(order[np.searchsorted(ends, points, side="right")])


def gather_tasks(state: BilevelState, tasks: Any) -> BilevelState:
  """Returns the state of some of the tasks.

  Args:
    state: state of N tasks, its stacks jax or NumPy arrays.
    tasks: indices of tasks, int, shape [M].
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
  """Returns `moved` with its tasks put back among all tasks.

  The other tasks' adapters are unchanged, bit for bit. NumPy stacks are written
  in place.

  Args:
    state: state of N tasks.
    tasks: indices of tasks, all different, int, shape [M].
    moved: state of these tasks, from `gather_tasks`, after a step.
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
