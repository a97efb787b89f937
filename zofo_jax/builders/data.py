"""The rows of a run: where they are, how they are divided, and their tokens.

What is cheap and can fail comes first: names, files, rows and lengths are
checked before any weight is read or anything is compiled.
"""

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections

from zofo_jax import tasks
from zofo_jax.builders import assets
from zofo_jax.builders import encoder as encoder_lib
from zofo_jax.data import bad_rows as bad_rows_lib
from zofo_jax.data import (
  batching,
  encode_options,
  encode_prompts,
  fingerprints,
)
from zofo_jax.data import splits as splits_lib


class RowSource(NamedTuple):
  """Where the rows of a task are, and how they are divided.

  Attributes:
    folder: as for `sources.load`; None for the hub.
    counts: rows of each set.
    shots: rows of each label in D_p and in D_f; 0 for the counts.
    seed: chooses the rows.
    test_split: where test rows come from; None for the default.
    pooled: whether D_p and D_f are the same rows, all of both.
    bad_rows: what happens to rows that cannot be used, and which ones were
      left out.
    order: as for `splits.load_splits`.
    stream: likewise.
    check: (task, row) -> nothing, or a `RowError`; see `splits.load_splits`.
  """

  folder: str | None
  counts: splits_lib.Counts
  shots: int
  seed: int
  test_split: str | None
  pooled: bool
  bad_rows: bad_rows_lib.BadRows
  order: splits_lib.Order = "file"
  stream: bool = False
  check: Callable[[tasks.Task, tasks.Row], None] | None = None

  def load(self, task: tasks.Task) -> splits_lib.Splits:
    """Reads and divides the rows of a task.

    Raises:
      UserError: names the file and row that is wrong.
    """
    assets.make(self.folder)
    return splits_lib.load_splits(
      task,
      self.folder,
      counts=self.counts,
      shots=self.shots,
      seed=self.seed,
      test_split=self.test_split,
      bad_rows=self.bad_rows,
      order=self.order,
      stream=self.stream,
      check=functools.partial(self.check, task) if self.check else None,
    )


def make_row_source(config: ml_collections.ConfigDict) -> RowSource:
  """Makes the row source of `config.data`; other methods than bilevel pool."""
  data = config.data
  return RowSource(
    folder=data.dir,
    counts=splits_lib.Counts(
      lower=data.num_lower,
      upper=data.num_upper,
      selection=data.num_selection,
      test=data.num_test,
    ),
    shots=data.shots,
    seed=data.seed,
    test_split=data.test_split or None,
    pooled=data.pooled or config.method != "bilevel",
    bad_rows=bad_rows_lib.BadRows(data.bad_rows),
    order=data.order,
    stream=data.stream,
  )


class Examples(NamedTuple):
  """Encoded rows: D_p, D_f, those that choose a checkpoint, and the test's.

  Attributes:
    lower: D_p; empty where nothing is learned from the rows' answers.
    upper: D_f; empty likewise.
    selection: rows that choose a checkpoint.
    test: rows of the final test.
    fingerprints: of the rows before they were encoded; see
      `fingerprints.of_splits`.
    questions: prompts of D_f, where answers to them are scored by rewards.
  """

  lower: list[encode_options.Example]
  upper: list[encode_options.Example]
  selection: list[encode_options.Example] | list[encode_prompts.Question]
  test: list[encode_options.Example] | list[encode_prompts.Question]
  fingerprints: Mapping[str, Any] = types.MappingProxyType({})
  questions: Sequence[encode_prompts.Question] = ()


def load_examples(
  task: tasks.Task,
  source: RowSource,
  encoder: encoder_lib.Encoder,
  *,
  with_questions: bool = False,
  with_answers: bool = True,
) -> Examples:
  """Reads, divides and encodes the rows of a task.

  Where long rows are dropped, selection and test rows are only if they exceed
  the model's context: those beyond `encoder.max_length` still count.

  Args:
    task: the task.
    source: where its rows are.
    encoder: encodes them.
    with_questions: whether the prompts of D_f are encoded as well, of a task
      that is answered by generating text.
    with_answers: whether rows are encoded to be learned from.

  Raises:
    UserError: names the file and row that is wrong.
  """
  splits = source.load(task)
  if with_answers:
    encoder.warn_of_answers(task, splits.lower)
  lower, upper = (
    encoder.encode_train(task, rows) if with_answers else []
    for rows in (splits.lower, splits.upper)
  )
  if source.pooled:
    lower = upper = [*lower, *upper]
  return Examples(
    lower=lower,
    upper=upper,
    selection=encoder.encode_eval(task, splits.selection),
    test=encoder.encode_eval(task, splits.test),
    fingerprints=fingerprints.of_splits(splits._asdict()),
    questions=encoder.encode_eval(
      task, [*splits.lower, *splits.upper] if source.pooled else splits.upper
    )
    if with_questions
    else (),
  )


def train_shape(examples: Examples) -> batching.Shape:
  """Returns the one shape of all training batches."""
  return batching.shape_of([*examples.lower, *examples.upper], multiple=8)
