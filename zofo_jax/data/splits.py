"""A task's data divided into the sets of a run.

Which rows a set holds is a pure function of a seed. numpy's RandomState draws
them: its numbers are the same in every version, and the permutations those
that MeZO takes its first 1000 rows from.
"""

import json
import logging
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from zofo_jax import errors, tasks
from zofo_jax.data import sources

load_rows = sources.load


class Counts(NamedTuple):
  """How many rows each set gets; 666, 334 and 1000 are the paper's.

  Attributes:
    lower: rows of the lower level (D_p).
    upper: rows of the upper level (D_f).
    selection: rows by which the best checkpoint is chosen. 0 takes the upper
      set again, as the PyTorch code does: a set that training has seen.
    test: rows of the final test.
  """

  lower: int = 666
  upper: int = 334
  selection: int = 334
  test: int = 1000


_PAPER = Counts()


class Splits(NamedTuple):
  """The four sets of a run."""

  lower: list[tasks.Row]
  upper: list[tasks.Row]
  selection: list[tasks.Row]
  test: list[tasks.Row]


def load_splits(
  task: tasks.Task,
  source: str | pathlib.Path | None,
  *,
  counts: Counts = _PAPER,
  shots: int = 0,
  seed: int = 0,
  test_split: str | None = None,
) -> Splits:
  """Reads a task's data and divides it into the four sets of a run.

  Args:
    task: the task.
    source: as in `load_rows`.
    counts: rows of each set.
    shots: as in `split`.
    seed: chooses the rows.
    test_split: where test rows come from; None means the validation split as
      in the paper, else the test split, else rows held out of train.

  Returns:
    The four sets.

  Raises:
    UserError: as `load_rows` and `split`.
  """
  train = load_rows(task, source, "train")
  if test_split is None:
    present = [
      s for s in ("validation", "test") if sources.has_split(task, source, s)
    ]
    test_split = present[0] if present else None
  test = load_rows(task, source, test_split) if test_split else None
  return split(task, train, test, counts=counts, shots=shots, seed=seed)


def split(
  task: tasks.Task,
  train: Sequence[tasks.Row],
  test: Sequence[tasks.Row] | None = None,
  *,
  counts: Counts = _PAPER,
  shots: int = 0,
  seed: int = 0,
) -> Splits:
  """Divides rows into lower, upper, selection and test sets.

  A seeded permutation of `train` gives lower, upper, selection and, where
  there are no separate test rows, test, in this order. Rows that read the
  same as an earlier one or as a test row are passed over, so the four sets
  share no text. Too few rows: a quarter is the test set (if it comes from
  train) and a quarter of the rest the selection set; of what is left, a third
  is upper, as in the paper; no set exceeds its count.

  Args:
    task: says which columns make a row's text.
    train: rows of the train split.
    test: rows of the split to test on.
    counts: rows of each set.
    shots: if not 0, lower and upper have that many rows of every label each,
      whatever their counts; they are drawn first.
    seed: chooses the rows.

  Returns:
    The four sets.

  Raises:
    UserError: a count is not positive, or too few rows for four sets.
  """
  for field, count in counts._asdict().items():
    if count < (0 if field == "selection" else 1):
      raise errors.UserError(
        f"data.num_{field} is {count}; expected a positive number of rows."
      )
  chosen: list[tasks.Row] = []
  if test is not None:
    order = np.random.RandomState(seed).permutation(len(test))
    chosen = [test[i] for i in order[: counts.test]]
  order = np.random.RandomState(seed).permutation(len(train))
  pool = _distinct(task, [train[i] for i in order], chosen)
  if shots:
    pool, counts = _balanced_first(task, pool, counts, shots, seed, test)
  sizes = _sizes(task, len(pool), counts, hold_out=test is None)
  ends = np.cumsum(sizes)
  lower, upper, selection, held_out = (
    pool[end - size : end] for size, end in zip(sizes, ends, strict=True)
  )
  return Splits(
    lower=lower,
    upper=upper,
    selection=selection if counts.selection else upper,
    test=held_out if test is None else chosen,
  )


def k_shot(
  task: tasks.Task, train: Sequence[tasks.Row], k: int, seed: int
) -> list[tasks.Row]:
  """Draws k rows of every label, in random order.

  Args:
    task: reads a row's label.
    train: rows to draw from.
    k: rows per label.
    seed: chooses the rows; another seed gives another training set.

  Returns:
    k rows for each label that occurs.

  Raises:
    UserError: a label has fewer than k rows.
  """
  random = np.random.RandomState(seed)
  by_label: dict[int, list[tasks.Row]] = {}
  for i in random.permutation(len(train)):
    by_label.setdefault(task.right(train[i])[0], []).append(train[i])
  for label, members in sorted(by_label.items()):
    if len(members) < k:
      raise errors.UserError(
        f"Task {task.name}: label {label} has {len(members)} rows; {k} rows "
        "per label were asked for."
      )
  drawn = [row for _, rs in sorted(by_label.items()) for row in rs[:k]]
  return [drawn[i] for i in random.permutation(len(drawn))]


def _balanced_first(
  task: tasks.Task,
  pool: list[tasks.Row],
  counts: Counts,
  shots: int,
  seed: int,
  test: Sequence[tasks.Row] | None,
) -> tuple[list[tasks.Row], Counts]:
  """Moves balanced lower and upper sets to the pool's front.

  Returns:
    The pool, and counts of which the other sets take what is left.
  """
  both = k_shot(task, pool, 2 * shots, seed)
  sets: tuple[list[tasks.Row], list[tasks.Row]] = ([], [])
  seen: dict[int, int] = {}
  for row in both:
    label = task.right(row)[0]
    sets[seen.get(label, 0) >= shots].append(row)
    seen[label] = seen.get(label, 0) + 1
  drawn = set(map(id, both))
  rest = [row for row in pool if id(row) not in drawn]
  held_out = min(counts.test, len(rest) // 2) if test is None else 0
  selection = min(counts.selection, len(rest) - held_out)
  if (counts.selection and not selection) or (test is None and not held_out):
    raise errors.UserError(
      f"Task {task.name}: {len(pool)} different rows in train are too few for "
      f"{2 * shots} of each label and further sets (data.shots)."
    )
  return [*sets[0], *sets[1], *rest], Counts(
    len(sets[0]), len(sets[1]), selection, held_out or counts.test
  )


def _distinct(
  task: tasks.Task,
  pool: Sequence[tasks.Row],
  apart: Sequence[tasks.Row],
) -> list[tasks.Row]:
  """Returns the rows whose text is neither in `apart` nor earlier in `pool`."""

  def text(row):
    columns = (*task.text, *task.other)
    return json.dumps([row.fields[c] for c in columns], default=str)

  seen = {text(row) for row in apart}
  kept = []
  for row in pool:
    key = text(row)
    if key not in seen:
      seen.add(key)
      kept.append(row)
  return kept


def _sizes(
  task: tasks.Task, total: int, counts: Counts, *, hold_out: bool
) -> Counts:
  """Returns the sets' sizes; test is 0 unless it is held out of train."""
  asked = counts if hold_out else counts._replace(test=0)
  if total >= sum(asked):
    return asked
  test = min(asked.test, total // 4)
  selection = min(asked.selection, (total - test) // 4)
  left = total - test - selection
  upper = min(asked.upper, left // 3)
  sizes = Counts(min(asked.lower, left - upper), upper, selection, test)
  if any(want and not size for want, size in zip(asked, sizes, strict=True)):
    raise errors.UserError(
      f"Task {task.name}: {total} different rows in train are too few for "
      f"{', '.join(f for f, want in asked._asdict().items() if want)} sets."
    )
  logging.warning(
    "%s: train has %d different rows, hence %s",
    *(
      task.name,
      total,
      ", ".join(f"{n} {f}" for f, n in sizes._asdict().items() if n),
    ),
  )
  return sizes
