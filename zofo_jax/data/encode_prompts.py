"""Encodes rows that are answered by generated text as prompts."""

import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from zofo_jax import errors, tasks
from zofo_jax.data import encode_options, encode_text
from zofo_jax.data import tokenizer as tokenizer_lib


class Question(NamedTuple):
  """A row of data as a prompt.

  Attributes:
    tokens: token ids of the prompt.
    answers: the accepted answers; empty if the label was not read.
    source: file and row of the data.
    prompt: its text, before any truncation.
    columns: of the row.
  """

  tokens: tuple[int, ...]
  answers: tuple[str, ...]
  source: str
  prompt: str = ""
  columns: Mapping[str, Any] = types.MappingProxyType({})


def encode_question(
  task: tasks.Task,
  row: tasks.Row,
  tokenizer: Any,
  *,
  max_length: int,
  version: tasks.Version = 0,
  truncate: bool = False,
  labelled: bool = True,
  prompt: Any = None,
) -> Question:
  """Encodes the prompt of a row that is answered by generated text.

  Args:
    task: defines prompt and answers, or a chat or text.
    row: the data.
    tokenizer: a fast tokenizer (`tokenizer.load_tokenizer`).
    max_length: maximum length of a prompt in tokens.
    version: the template version.
    truncate: cut a prompt that is too long on the left, after the leading
      special tokens.
    labelled: if False, the answers are not read.
    prompt: replaces the task's prompt, or the row's chat or text.

  Returns:
    The question.

  Raises:
    TooLongError: the prompt is too long.
    UserError: the prompt has no tokens.
  """
  answers: tuple[str, ...] = ()
  if task.document is not None:
    prompt, num_leading, tokens, answers = encode_text.tokenize_prompt(
      prompt or task.read_document(row, labelled=labelled),
      tokenizer,
      row.source,
      labelled=labelled,
    )
  else:
    prompt = task.prompt(row, version) if prompt is None else prompt
    num_leading, tokens = tokenizer_lib.prompt_tokens(
      tokenizer, prompt, row.source
    )
    if labelled:
      options = task.options(row, version)
      answers = tuple(options[i].strip() for i in task.right(row))
  excess = len(tokens) - max_length
  if excess > 0:
    if not truncate or max_length <= num_leading:
      raise encode_options.TooLongError(
        row.source,
        f"the prompt is {len(tokens)} tokens; at most {max_length} fit beside "
        "the answer (generate.max_new_tokens).",
      )
    tokens = (*tokens[:num_leading], *tokens[num_leading + excess :])
  return Question(tokens, answers, row.source, prompt, row.fields)


def encode_questions(
  task: tasks.Task,
  data: Sequence[tasks.Row],
  tokenizer: Any,
  *,
  max_length: int,
  version: tasks.Version = 0,
  truncate: bool = False,
  labelled: bool = True,
) -> list[Question | errors.RowError]:
  """Encodes several rows; see `encode_question`.

  With `truncate`, the number of truncated prompts is logged.

  Returns:
    A question, or what is wrong, for each row.
  """

  def encode_one(row, may_truncate):
    return encode_question(
      *(task, row, tokenizer),
      max_length=max_length,
      version=version,
      truncate=may_truncate,
      labelled=labelled,
    )

  return encode_options.encode_all(
    encode_one,
    data,
    truncate=truncate,
    name=task.name,
    noun="prompts",
    max_length=max_length,
  )


def check_room(max_new_tokens: int, context: int) -> int:
  """Returns the maximum length of a prompt that leaves room for its answer.

  Args:
    max_new_tokens: maximum length of an answer.
    context: the model's context length.

  Raises:
    UserError: no room is left for a prompt.
  """
  if max_new_tokens >= context:
    raise errors.UserError(
      f"config.generate.max_new_tokens: expected less than the model's "
      f"context of {context} tokens; found {max_new_tokens}."
    )
  return context - max_new_tokens
