"""Splits of a task's data: lower level, upper level, selection and test.

The rows of each split are a pure function of a seed. They are drawn with
numpy's RandomState, whose numbers are stable across versions, and with the
permutations from which MeZO takes its first 1,000 rows.
"""

import json
import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from zofo_jax import errors, tasks
from zofo_jax.data import bad_rows as bad_rows_lib
from zofo_jax.data import files, fingerprints, sources
from zofo_jax.data import hub as hub_lib

Order = Literal["file", "content"]
Check = Callable[[tasks.Row], None]


class Counts(NamedTuple):
  """Number of rows of each split; 666, 334 and 1,000 are the paper's.

  Attributes:
    lower: rows of the lower level (D_p).
    upper: rows of the upper level (D_f).
    selection: rows on which the best checkpoint is selected. 0 reuses the
      upper-level rows, as the paper's PyTorch code does, although training has
      seen them.
    test: rows of the final test.
  """

  lower: int = 666
  upper: int = 334
  selection: int = 334
  test: int = 1000


_PAPER = Counts()
# Tables of more rows are not read whole.
_MAX_WHOLE = 100_000
# Rows that are read of them for each that is needed: some are the same.
_SPARE = 4


class Splits(NamedTuple):
  """The four splits of a run."""

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
  bad_rows: bad_rows_lib.BadRows | None = None,
  order: Order = "file",
  stream: bool = False,
  check: Check | None = None,
) -> Splits:
  """Reads a task's data and splits it.

  Args:
    task: the task.
    source: as for `sources.load`.
    counts: rows of each split.
    shots: as for `split`.
    seed: seed of the random choice of rows.
    test_split: the data set's split that provides test rows. None: validation,
      as in the paper; if there is none, test; if there is none either, rows
      held out of train.
    bad_rows: as for `sources.load`.
    order: the order that is permuted: of the files, or of the rows' content,
      so that splits are the same whatever file or line a row is in. The latter
      reads every row.
    stream: whether rows of a set of the hub are drawn while they are
      downloaded, so that only a part of it is.
    check: raises a `RowError` for a row that a run cannot use. If such rows are
      dropped, others are drawn instead; None if all can be used.

  Returns:
    The four splits.

  Raises:
    UserError: as `sources.load` and `split`.
  """

  def load(name, num_rows):
    """Reads rows in random order; of a large table, only as many as needed."""
    chosen = np.arange(0)
    # Rows of each label, or of each place in the order, are among all.
    whole = shots or order == "content"

    def choose(total):
      nonlocal chosen
      if total <= _MAX_WHOLE or whole:
        return None
      permuted = np.random.RandomState(seed).permutation(total)
      chosen = permuted[: _SPARE * num_rows].copy()  # without the others
      return chosen

    draw = hub_lib.Stream(seed, _SPARE * num_rows) if stream else None
    rows = sources.load(
      task, source, name, bad_rows=bad_rows, choose=choose, stream=draw
    )
    if len(chosen):
      return rows
    if order == "content":
      rows.sort(key=lambda row: fingerprints.of_rows([row]))
    return [rows[i] for i in np.random.RandomState(seed).permutation(len(rows))]

  def usable(rows, count):
    if check is None or bad_rows is None or bad_rows.policy == "error":
      return rows
    return bad_rows.keep(_checked(rows, count, check), f"Task {task.name}")

  _check_counts(counts)
  train = load("train", sum(counts))
  if test_split is None:
    present = [
      s for s in ("validation", "test") if sources.has_split(task, source, s)
    ]
    test_split = present[0] if present else None
  test = None
  if test_split:
    test = load(test_split, counts.test)
  return _divide(task, train, test, counts, shots, seed, usable)


def _checked(
  rows: Sequence[tasks.Row], count: int, check: Check
) -> list[files.Item]:
  """Replaces rows that cannot be used by errors, until there are enough."""
  items: list[files.Item] = []
  for number, row in enumerate(rows):
    if not count:
      return [*items, *rows[number:]]
    try:
      check(row)
      items.append(row)
      count -= 1
    except errors.RowError as error:
      items.append(error)
  return items


def split(
  task: tasks.Task,
  train: Sequence[tasks.Row],
  test: Sequence[tasks.Row] | None = None,
  *,
  counts: Counts = _PAPER,
  shots: int = 0,
  seed: int = 0,
) -> Splits:
  """Splits rows into lower, upper, selection and test.

  A seeded permutation of `train` is cut into lower, upper, selection and, if
  `test` is None, test, in this order. Rows with the same text as an earlier
  row or as a test row are skipped, so no text is in two splits. If there are
  too few rows, test (if it is taken from train) gets a quarter of them,
  selection a quarter of the remaining ones, and upper a third of what is then
  left, as in the paper; no split exceeds its count.

  Args:
    task: defines which columns make up a row's text.
    train: rows of the train split.
    test: rows to test on; None to hold them out of `train`.
    counts: rows of each split.
    shots: if not 0, lower and upper each get this many rows of every label,
      regardless of `counts`; they are drawn first.
    seed: seed of the random choice of rows.

  Returns:
    The four splits.

  Raises:
    UserError: a count is not positive, or there are too few rows.
  """
  _check_counts(counts)
  shuffled = [
    None
    if rows is None
    else [rows[i] for i in np.random.RandomState(seed).permutation(len(rows))]
    for rows in (train, test)
  ]
  return _divide(task, shuffled[0] or [], shuffled[1], counts, shots, seed)


def _check_counts(counts: Counts) -> None:
  """Checks that every split has rows, but selection may have none."""
  for field, count in counts._asdict().items():
    if count < (0 if field == "selection" else 1):
      raise errors.UserError(
        f"data.num_{field} is {count}; expected a positive number of rows."
      )


def _divide(
  task: tasks.Task,
  train: Sequence[tasks.Row],
  test: Sequence[tasks.Row] | None,
  counts: Counts,
  shots: int,
  seed: int,
  usable: Callable[..., Sequence[tasks.Row]] = lambda rows, count: rows,
) -> Splits:
  """Divides rows in random order; see `split`.

  `usable` leaves out rows until as many as `count` can be used.
  """
  test = None if test is None else usable(test, counts.test)
  chosen = [] if test is None else list(test[: counts.test])
  count = sum(counts if test is None else counts._replace(test=0))
  pool = [*usable(_distinct(task, train, chosen), count)]
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
    seed: seed of the random choice of rows.

  Returns:
    k rows of each label that occurs.

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
  """Moves balanced lower and upper rows to the front of the pool.

  Returns:
    The reordered pool and the counts adjusted to it.
  """
  balanced = k_shot(task, pool, 2 * shots, seed)
  sets: tuple[list[tasks.Row], list[tasks.Row]] = ([], [])
  seen: dict[int, int] = {}
  for row in balanced:
    label = task.right(row)[0]
    sets[seen.get(label, 0) >= shots].append(row)
    seen[label] = seen.get(label, 0) + 1
  drawn = set(map(id, balanced))
  remaining = [row for row in pool if id(row) not in drawn]
  held_out = min(counts.test, len(remaining) // 2) if test is None else 0
  selection = min(counts.selection, len(remaining) - held_out)
  if (counts.selection and not selection) or (test is None and not held_out):
    raise errors.UserError(
      f"Task {task.name}: {len(pool)} different rows in train are too few for "
      f"{2 * shots} of each label and further sets (data.shots)."
    )
  return [*sets[0], *sets[1], *remaining], Counts(
    len(sets[0]), len(sets[1]), selection, held_out or counts.test
  )


def _distinct(
  task: tasks.Task,
  pool: Sequence[tasks.Row],
  excluded: Sequence[tasks.Row],
) -> list[tasks.Row]:
  """Returns rows whose text is neither in `excluded` nor earlier in `pool`."""

  def text(row):
    columns = (*task.text, *task.other)
    read = (
      task.read_document(row)
      if task.document
      else [row.fields[c] for c in columns]
    )
    return json.dumps(read, default=str)

  seen = {text(row) for row in excluded}
  distinct = []
  for row in pool:
    key = text(row)
    if key not in seen:
      seen.add(key)
      distinct.append(row)
  return distinct


def _sizes(
  task: tasks.Task, total: int, counts: Counts, *, hold_out: bool
) -> Counts:
  """Returns the splits' sizes; test is 0 unless it is held out of train."""
  requested = counts if hold_out else counts._replace(test=0)
  if total >= sum(requested):
    return requested
  test = min(requested.test, total // 4)
  selection = min(requested.selection, (total - test) // 4)
  left = total - test - selection
  upper = min(requested.upper, left // 3)
  sizes = Counts(min(requested.lower, left - upper), upper, selection, test)
  pairs = zip(requested, sizes, strict=True)
  if any(wanted and not size for wanted, size in pairs):
    raise errors.UserError(
      f"Task {task.name}: {total} different rows in train are too few for "
      f"{', '.join(f for f, n in requested._asdict().items() if n)} sets."
    )
  logging.getLogger("zofo_jax").warning(
    "%s: train has %d different rows, hence %s",
    *(
      task.name,
      total,
      ", ".join(f"{n} {f}" for f, n in sizes._asdict().items() if n),
    ),
  )
  return sizes
