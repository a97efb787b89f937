"""From a task's rows to prompts that are answered by generated text."""

import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from zofo_jax import errors, tasks
from zofo_jax.data import encode_options


class Question(NamedTuple):
  """A row of data as a prompt.

  Attributes:
    tokens: the prompt.
    answers: the accepted answers; none if the label was not read.
    source: file and row it came from.
  """

  tokens: tuple[int, ...]
  answers: tuple[str, ...]
  source: str


def encode_question(
  task: tasks.Task,
  row: tasks.Row,
  tokenizer: Any,
  *,
  max_length: int,
  version: tasks.Version = 0,
  truncate: bool = False,
  labelled: bool = True,
  prompt: str | None = None,
) -> Question:
  """Encodes the prompt of a row of a task whose kind is "generation".

  Args:
    task: gives prompt and answers.
    row: the data.
    tokenizer: a fast tokenizer (`encode.load_tokenizer`).
    max_length: longest prompt in tokens.
    version: the template version.
    truncate: cut a prompt that is too long at the left, behind the tokens that
      the tokenizer puts before any text.
    labelled: False leaves the answers unread.
    prompt: what is asked, if not the task's own prompt.

  Returns:
    The question.

  Raises:
    TooLongError: the prompt is too long.
    UserError: it has no tokens.
  """
  prompt = task.prompt(row, version) if prompt is None else prompt
  lead, tokens = encode_options.prompt_tokens(tokenizer, prompt, row.source)
  over = len(tokens) - max_length
  if over > 0:
    if not truncate or max_length <= lead:
      raise encode_options.TooLongError(
        f"{row.source}: the prompt is {len(tokens)} tokens; at most "
        f"{max_length} fit beside the answer (generate.max_new_tokens). Set "
        "data.long_rows to 'truncate' (at the left)."
      )
    tokens = (*tokens[:lead], *tokens[lead + over :])
  answers: tuple[str, ...] = ()
  if labelled:
    options = task.options(row, version)
    answers = tuple(options[i].strip() for i in task.right(row))
  return Question(tokens, answers, row.source)


def encode_questions(
  task: tasks.Task,
  data: Sequence[tasks.Row],
  tokenizer: Any,
  *,
  max_length: int,
  version: tasks.Version = 0,
  truncate: bool = False,
  labelled: bool = True,
) -> list[Question]:
  """Encodes a set of rows; see `encode_question`.

  Returns:
    A question for every row; the log counts those that were cut.
  """
  found, cut = [], 0
  for row in data:
    ask = functools.partial(
      encode_question,
      *(task, row, tokenizer),
      max_length=max_length,
      version=version,
      labelled=labelled,
    )
    try:
      found.append(ask())
    except encode_options.TooLongError:
      if not truncate:
        raise
      found.append(ask(truncate=True))
      cut += 1
  if cut:
    logging.warning(
      "%s: %d of %d prompts are cut to %d tokens at the left",
      *(task.name, cut, len(data), max_length),
    )
  return found


def check_room(max_new_tokens: int, context: int) -> int:
  """Returns how long prompts may be in a context beside their answers.

  Raises:
    UserError: there is no room.
  """
  if max_new_tokens >= context:
    raise errors.UserError(
      f"config.generate.max_new_tokens: expected less than the model's "
      f"context of {context} tokens; found {max_new_tokens}."
    )
  return context - max_new_tokens
