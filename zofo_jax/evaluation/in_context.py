"""In-context learning: demonstrations, rows with their answers, before a query.

As in MeZO, each demonstration is a prompt with its correct option, stripped of
surrounding spaces and followed by a separator. In a chat, demonstrations are
earlier turns.
"""

import bisect
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from zofo_jax import errors, tasks
from zofo_jax.data import encode_options

# A prompt, or a row of a format.
Prompt = str | tasks.Chat | tasks.Plain
# (row, prompt, truncate) -> an example or a question.
EncodeFn = Callable[[tasks.Row, Any, bool], Any]


def draw(
  task: tasks.Task,
  pool: Sequence[tasks.Row],
  count: int,
  seed: int,
  *,
  balanced: bool = True,
) -> list[tasks.Row]:
  """Draws demonstrations, in random order.

  Args:
    task: reads a row's label.
    pool: rows to draw from.
    count: how many; 0 for none.
    seed: chooses the rows and their order.
    balanced: whether the counts of labels differ by at most one; a label that
      runs out is replaced by the others. Otherwise any rows are drawn.

  Returns:
    The rows.

  Raises:
    UserError: there are fewer rows than `count`.
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
    rank = {}  # of a row among those of its label
    for i in order:
      label = task.right(pool[i])[0]
      rank[i] = nth[label] = nth.get(label, -1) + 1
    order = np.array(sorted(order, key=lambda i: rank[i]), int)
  return [pool[order[i]] for i in random.permutation(count)]


def demonstration(
  task: tasks.Task, row: tasks.Row, version: tasks.Version = 0
) -> Prompt:
  """Returns a row's prompt followed by its first correct option."""
  if task.document:
    return task.read_document(row)
  option = task.options(row, version)[task.right(row)[0]]
  return (task.prompt(row, version) + option).strip()


def encode_rows(
  queries: Sequence[tasks.Row],
  prompts: Sequence[Prompt],
  demonstrations: Sequence[Prompt],
  encode_one: EncodeFn,
  *,
  separator: str = "\n\n",
  truncate: bool = False,
) -> list[Any]:
  """Encodes queries with demonstrations before them, as many as fit.

  If they do not all fit, the earliest demonstrations are dropped; the query
  never is.

  Args:
    queries: the rows to answer.
    prompts: of the queries; chats or texts of a format.
    demonstrations: what `demonstration` returns.
    encode_one: (row, prompt, truncate) -> an encoded row; raises
      `encode_options.TooLongError` if the prompt does not fit.
    separator: text after each demonstration.
    truncate: whether a query that does not fit by itself is truncated at the
      left.

  Returns:
    Results of `encode_one`; the log reports demonstrations that do not fit.

  Raises:
    TooLongError: a query does not fit even without demonstrations.
  """
  examples, num_fitting = [], []
  for row, prompt in zip(queries, prompts, strict=True):

    def encoded(dropped, row=row, prompt=prompt):
      remaining = demonstrations[dropped:]
      after = _put_before(remaining, prompt, separator)
      return encode_one(row, after, truncate and not remaining)

    def fits(dropped, encoded=encoded):
      try:
        encoded(dropped)
      except encode_options.TooLongError:
        return False
      return True

    # The fewest that must be dropped; if none remains, encoding raises.
    count = len(demonstrations)
    dropped = bisect.bisect_left(range(count), True, key=fits)
    examples.append(encoded(dropped))
    num_fitting.append(count - dropped)
  if min(num_fitting) < len(demonstrations):
    logging.getLogger("zofo_jax").warning(
      "%.1f of %d demonstrations fit before a question, %d at least",
      *(np.mean(num_fitting), len(demonstrations), min(num_fitting)),
    )
  return examples


def _put_before(
  demonstrations: Sequence[Any], prompt: Prompt, separator: str
) -> Prompt:
  """Returns a prompt with demonstrations of its kind before it."""
  if isinstance(prompt, str):
    return separator.join([*demonstrations, prompt])
  if isinstance(prompt, tasks.Plain):
    before = [
      text.prompt + text.completion
      for text in demonstrations
      if isinstance(text, tasks.Plain)
    ]
    return prompt._replace(prompt=separator.join([*before, prompt.prompt]))
  turns = [
    message
    for chat in demonstrations
    if isinstance(chat, tasks.Chat)
    for message in _turns(chat)
  ]
  if not turns:
    return prompt
  count = int(prompt.messages[0]["role"] == "system")
  return prompt._replace(
    messages=(*prompt.messages[:count], *turns, *prompt.messages[count:]),
    start=len(turns) + max(prompt.start, count),
    skipped=tuple(number + len(turns) for number in prompt.skipped),
  )


def _turns(chat: tasks.Chat) -> Sequence[Mapping[str, str]]:
  """Returns a chat's questions and answers."""
  roles = [message["role"] for message in chat.messages]
  end = len(roles) - roles[::-1].index("assistant")
  return chat.messages[roles[0] == "system" : end]


def split_shared(examples: Sequence[Any]) -> tuple[tuple[int, ...], list[Any]]:
  """Splits off the tokens that all rows begin with.

  Args:
    examples: encoded rows, or questions.

  Returns:
    The shared tokens, and the examples without them; each row retains at least
    the first token that predicts.
  """
  rows_of = [getattr(example, "rows", (example,)) for example in examples]
  all_rows = [row for rows in rows_of for row in rows]
  columns = zip(*(row.tokens for row in all_rows), strict=False)
  same = itertools.takewhile(lambda column: len(set(column)) == 1, columns)
  count = min(
    len(list(same)),
    *(min(getattr(r, "positions", (len(r.tokens) - 1,))) for r in all_rows),
  )

  def remove_shared(row):
    row = row._replace(tokens=row.tokens[count:])
    if not hasattr(row, "positions"):
      return row
    return row._replace(positions=tuple(p - count for p in row.positions))

  suffixes = [
    example._replace(rows=tuple(map(remove_shared, example.rows)))
    if hasattr(example, "rows")
    else remove_shared(example)
    for example in examples
  ]
  return all_rows[0].tokens[:count], suffixes
