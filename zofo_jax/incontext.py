"""In-context learning: answered rows, the demonstrations, before the question.

As in MeZO: each demonstration is a prompt with its right option, without
spaces around it, and a separator follows it.
"""

import bisect
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from zofo_jax import encode, errors, rows, tasks


def draw(
  task: tasks.Task,
  pool: Sequence[rows.Row],
  count: int,
  seed: int,
  *,
  balanced: bool = True,
) -> list[rows.Row]:
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
  task: tasks.Task, row: rows.Row, version: tasks.Version = 0
) -> str:
  """Returns a row's prompt with its first right option after it."""
  option = task.options(row, version)[task.right(row)[0]]
  return (task.prompt(row, version) + option).strip()


def encode_rows(
  task: tasks.Task,
  data: Sequence[rows.Row],
  demonstrations: Sequence[str],
  tokenizer: Any,
  *,
  max_length: int,
  version: tasks.Version = 0,
  separator: str = "\n\n",
  truncate: bool = False,
  prompts: Sequence[str] | None = None,
) -> list[encode.Example]:
  """Encodes rows with demonstrations before them, as many as fit.

  Where not all of them fit the first ones go, whole; the question stays.

  Args:
    task: gives prompt, options and label.
    data: the rows to answer.
    demonstrations: texts of `demonstration`.
    tokenizer: a fast tokenizer.
    max_length: longest row of tokens.
    version: the template version.
    separator: what is between demonstrations, and before the question.
    truncate: whether a question that does not fit alone is cut at the left.
    prompts: what is asked of each row, if not the task's prompt.

  Returns:
    The examples, every option in them; the log counts what did not fit.

  Raises:
    TooLongError: a question does not fit even without demonstrations.
  """
  texts = [*demonstrations]
  asked = prompts or [task.prompt(row, version) for row in data]
  examples, shown = [], []

  for row, prompt in zip(data, asked, strict=True):

    def encoded(dropped, row=row, prompt=prompt):
      kept = texts[dropped:]
      return encode.encode(
        task,
        row,
        tokenizer,
        max_length=max_length,
        version=version,
        long_rows="truncate" if truncate and not kept else "error",
        prompt=separator.join([*kept, prompt]),
      )

    def fits(dropped, encoded=encoded):
      try:
        encoded(dropped)
      except encode.TooLongError:
        return False
      return True

    # The fewest that must go; without any, encoding tells what is wrong.
    dropped = bisect.bisect_left(range(len(texts)), True, key=fits)
    examples.append(encoded(dropped))
    shown.append(len(texts) - dropped)
  if min(shown) < len(texts):
    logging.warning(
      "%s: %.1f of %d demonstrations fit in %d tokens, %d at least",
      *(task.name, np.mean(shown), len(texts), max_length, min(shown)),
    )
  return examples
