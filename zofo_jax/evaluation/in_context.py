"""In-context learning: answered rows, the demonstrations, before the question.

As in MeZO: each demonstration is a prompt with its right option, without
spaces around it, and a separator follows it.
"""

import bisect
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from zofo_jax import errors, tasks
from zofo_jax.data import encode_options

# (row, prompt, truncate) -> an example, or a question.
EncodeFn = Callable[[tasks.Row, str, bool], Any]


def draw(
  task: tasks.Task,
  pool: Sequence[tasks.Row],
  count: int,
  seed: int,
  *,
  balanced: bool = True,
) -> list[tasks.Row]:
  """Draws the rows that are shown, in random order.

  Args:
    task: reads a row's label.
    pool: rows to draw from.
    count: how many; 0 for none.
    seed: chooses them; another seed gives another set.
    balanced: as many of each label as of any other, but for one; a label that
      runs out leaves its place to the others. Else any rows.

  Returns:
    The rows.

  Raises:
    UserError: there are fewer rows.
  """
  if len(pool) < count:
    raise errors.UserError(
      f"Task {task.name}: {count} demonstrations were asked for "
      f"(icl.num_shots); there are {len(pool)} rows to draw from."
    )
  random = np.random.RandomState(seed)
  order = random.permutation(len(pool))
  if balanced:
    nth: dict[int, int] = {}
    turn = {}
    for i in order:
      label = task.right(pool[i])[0]
      turn[i] = nth[label] = nth.get(label, -1) + 1
    order = np.array(sorted(order, key=lambda i: turn[i]), int)
  return [pool[order[i]] for i in random.permutation(count)]


def demonstration(
  task: tasks.Task, row: tasks.Row, version: tasks.Version = 0
) -> str:
  """Returns a row's prompt with its first right option after it."""
  option = task.options(row, version)[task.right(row)[0]]
  return (task.prompt(row, version) + option).strip()


def encode_rows(
  data: Sequence[tasks.Row],
  prompts: Sequence[str],
  demonstrations: Sequence[str],
  encode_one: EncodeFn,
  *,
  separator: str = "\n\n",
  truncate: bool = False,
) -> list[Any]:
  """Encodes rows with demonstrations before them, as many as fit.

  Where not all of them fit the first ones go, whole; the question stays.

  Args:
    data: the rows to answer.
    prompts: what is asked of each row.
    demonstrations: texts of `demonstration`.
    encode_one: (row, prompt, truncate) to what is answered; raises
      `encode.TooLongError` where the prompt does not fit.
    separator: what is between demonstrations, and before the question.
    truncate: whether a question that does not fit alone is cut at the left.

  Returns:
    What `encode_one` made of each row; the log counts what did not fit.

  Raises:
    TooLongError: a question does not fit even without demonstrations.
  """
  examples, shown = [], []
  for row, prompt in zip(data, prompts, strict=True):

    def encoded(dropped, row=row, prompt=prompt):
      kept = demonstrations[dropped:]
      whole = separator.join([*kept, prompt])
      return encode_one(row, whole, truncate and not kept)

    def fits(dropped, encoded=encoded):
      try:
        encoded(dropped)
      except encode_options.TooLongError:
        return False
      return True

    # The fewest that must go; without any, encoding tells what is wrong.
    count = len(demonstrations)
    dropped = bisect.bisect_left(range(count), True, key=fits)
    examples.append(encoded(dropped))
    shown.append(count - dropped)
  if min(shown) < len(demonstrations):
    logging.getLogger("zofo_jax").warning(
      "%.1f of %d demonstrations fit before a question, %d at least",
      *(np.mean(shown), len(demonstrations), min(shown)),
    )
  return examples


def split_shared(examples: Sequence[Any]) -> tuple[tuple[int, ...], list[Any]]:
  """Takes what all rows of tokens begin with off them.

  Args:
    examples: encoded rows, or questions.

  Returns:
    The shared tokens, and the examples without them; where something is left
    to be read, of each row at least the token that predicts first.
  """
  rows_of = [getattr(example, "rows", (example,)) for example in examples]
  every = [row for some in rows_of for row in some]
  columns = zip(*(row.tokens for row in every), strict=False)
  same = itertools.takewhile(lambda column: len(set(column)) == 1, columns)
  count = min(
    len(list(same)),
    *(min(getattr(r, "positions", (len(r.tokens) - 1,))) for r in every),
  )

  def rest(row):
    row = row._replace(tokens=row.tokens[count:])
    if not hasattr(row, "positions"):
      return row
    return row._replace(positions=tuple(p - count for p in row.positions))

  shorter = [
    example._replace(rows=tuple(map(rest, example.rows)))
    if hasattr(example, "rows")
    else rest(example)
    for example in examples
  ]
  return every[0].tokens[:count], shorter
