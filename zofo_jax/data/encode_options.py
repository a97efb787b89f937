"""From a task's rows to token arrays of fixed shape.

An option's tokens are those of prompt + option that reach past the prompt's
end, found by the tokenizer's character offsets: where a tokenizer merges
across the boundary, the merged token belongs to the option. Scores then
condition on exactly the tokens before it, one option at a time or together.
"""

import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from zofo_jax import errors, tasks

Mode = Literal["classification", "likelihood"]
LongRows = Literal["error", "truncate", "drop"]


class TooLongError(errors.UserError):
  """A row does not fit the longest row of tokens."""


class EncodedRow(NamedTuple):
  """One row of tokens and the targets read from it.

  Attributes:
    tokens: the row.
    positions: where hidden states are read.
    targets: (slot in `positions`, token, option) of each target.
  """

  tokens: tuple[int, ...]
  positions: tuple[int, ...]
  targets: tuple[tuple[int, int, int], ...]


class Example(NamedTuple):
  """A row of data as rows of tokens.

  Attributes:
    rows: one for all options of one token, one for each longer option.
    label: the right option (the first of them).
    right: every right option; none if the label was not read.
    options: True for each option that is encoded.
    source: file and row it came from.
  """

  rows: tuple[EncodedRow, ...]
  label: int
  right: tuple[int, ...]
  options: tuple[bool, ...]
  source: str


def load_tokenizer(folder: str | pathlib.Path) -> Any:
  """Loads a fast tokenizer from a folder or a hub id; needs no torch.

  Raises:
    UserError: nothing there, or only a slow tokenizer without offsets.
  """
  # Spares users without torch a notice on models, which come from elsewhere.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  import transformers  # Slow to import, and needed here alone.

  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
  except Exception as error:  # Its own errors have no common ancestor.
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise errors.UserError(
      f"Cannot load a tokenizer from '{folder}': {reason}"
    ) from error
  if not tokenizer.is_fast:
    raise errors.UserError(
      f"The tokenizer of '{folder}' has no tokenizer.json; expected a fast "
      "tokenizer, which knows its tokens' places in the text."
    )
  return tokenizer


def pad_id(tokenizer: Any) -> int:
  """Returns the id that fills rows; any will do, since it is masked."""
  for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
    if token is not None:
      return token
  return 0


def encode(
  task: tasks.Task,
  row: tasks.Row,
  tokenizer: Any,
  mode: Mode = "classification",
  *,
  max_length: int,
  version: tasks.Version = 0,
  long_rows: LongRows = "error",
  labelled: bool = True,
  prompt: str | None = None,
) -> Example:
  """Encodes a row's options, or its right option alone, as rows of tokens.

  Args:
    task: gives prompt, options and label.
    row: the data.
    tokenizer: a fast tokenizer (`load_tokenizer`).
    mode: "classification" encodes every option; "likelihood" the right one
      only, for training by teacher forcing.
    max_length: longest row of tokens.
    version: the template version.
    long_rows: "truncate" cuts prompts that are too long at the left, behind
      the tokens that the tokenizer puts before any text; otherwise they are
      an error.
    labelled: False leaves the label unread; the example's is then 0.
    prompt: what is before the option, if not the task's own prompt.

  Returns:
    The example.

  Raises:
    TooLongError: the prompt is too long.
    UserError: options are empty or alike.
  """
  prompt = task.prompt(row, version) if prompt is None else prompt
  options = task.options(row, version)
  right = task.right(row) if labelled else ()
  label = right[0] if right else 0
  if mode == "classification" and task.kind == "generation":
    raise errors.UserError(
      f"Task {task.name} is answered by generation; it has no options to "
      "classify, so expected the loss 'likelihood'."
    )
  asked = range(len(options)) if mode == "classification" else (label,)
  pieces = {}
  for i in asked:
    pieces[i] = _tokenize(tokenizer, prompt, options[i], row.source)
  if mode == "classification" and not task.template(version).may_repeat:
    _check_distinct(options, pieces, row.source)
  pieces = _fit(pieces, max_length, long_rows == "truncate", row.source)
  singles: dict[tuple[int, ...], list[tuple[int, int]]] = {}
  encoded: list[EncodedRow] = []
  for i, (_, context, option) in pieces.items():
    if len(option) == 1:
      singles.setdefault(context, []).append((option[0], i))
      continue
    start = len(context) - 1
    encoded.append(
      EncodedRow(
        tokens=(*context, *option[:-1]),
        positions=tuple(range(start, start + len(option))),
        targets=tuple((slot, token, i) for slot, token in enumerate(option)),
      )
    )
  for context, members in singles.items():
    encoded.append(
      EncodedRow(
        tokens=context,
        positions=(len(context) - 1,),
        targets=tuple((0, token, i) for token, i in members),
      )
    )
  return Example(
    rows=tuple(encoded),
    label=label,
    right=right,
    options=tuple(i in pieces for i in range(len(options))),
    source=row.source,
  )


def encode_rows(
  task: tasks.Task,
  data: Sequence[tasks.Row],
  tokenizer: Any,
  mode: Mode = "classification",
  *,
  max_length: int,
  version: tasks.Version = 0,
  long_rows: LongRows = "error",
  labelled: bool = True,
) -> list[Example]:
  """Encodes a set of rows; see `encode`. "drop" leaves long rows out.

  Returns:
    The examples, in the rows' order; those dropped are counted in the log.

  Raises:
    UserError: as `encode`, or no row fits.
  """
  examples = []
  for row in data:
    try:
      examples.append(
        encode(
          task,
          row,
          tokenizer,
          mode,
          max_length=max_length,
          version=version,
          long_rows=long_rows,
          labelled=labelled,
        )
      )
    except TooLongError:
      if long_rows != "drop":
        raise
  if not examples:
    raise errors.UserError(
      f"Task {task.name}: none of {len(data)} rows fits in {max_length} "
      "tokens (data.max_length)."
    )
  if len(examples) < len(data):
    logging.warning(
      "%s: %d of %d rows do not fit in %d tokens and are left out",
      *(task.name, len(data) - len(examples), len(data), max_length),
    )
  return examples


def _tokenize(
  tokenizer: Any, prompt: str, option: str, where: str
) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
  """Splits the tokens of prompt + option where the option begins.

  Returns:
    How many tokens the tokenizer puts before any text, the tokens before the
    option (those included), and the option's.
  """
  ids, ends, lead = _split(tokenizer, prompt + option)
  start, count = lead, len(ids)
  while start < count and ends[start] <= len(prompt):
    start += 1
  if start == count:
    raise errors.UserError(
      f"{where}: option {option!r} gives no token after the prompt; expected "
      "a word."
    )
  lead, context = _not_empty(tokenizer, lead, ids[:start], where)
  return lead, context, tuple(ids[start:])


def prompt_tokens(
  tokenizer: Any, prompt: str, where: str
) -> tuple[int, tuple[int, ...]]:
  """Returns a prompt's tokens, and before them how many precede any text.

  Raises:
    UserError: there is nothing to start from.
  """
  ids, _, lead = _split(tokenizer, prompt)
  return _not_empty(tokenizer, lead, ids, where)


def _split(tokenizer: Any, text: str) -> tuple[list[int], list[int], int]:
  """Tokenizes a text.

  Returns:
    Its tokens, without those that the tokenizer puts after any text, where
    each ends in the text, and how many the tokenizer puts before any.
  """
  found = tokenizer(
    text,
    return_offsets_mapping=True,
    return_special_tokens_mask=True,
    verbose=False,
  )
  ids, ends = found["input_ids"], [end for _, end in found["offset_mapping"]]
  special = found["special_tokens_mask"]
  count = len(ids)
  while count and special[count - 1]:  # An end-of-text that some put last.
    count -= 1
  lead = 0
  while lead < count and special[lead]:
    lead += 1
  return ids[:count], ends[:count], lead


def _not_empty(
  tokenizer: Any, lead: int, ids: Sequence[int], where: str
) -> tuple[int, tuple[int, ...]]:
  """Starts a context that has no token with the begin of text."""
  if ids:
    return lead, tuple(ids)
  begin = tokenizer.bos_token_id
  if begin is None:
    raise errors.UserError(
      f"{where}: the prompt is empty and the tokenizer has no "
      "begin-of-text token to start from."
    )
  return 1, (begin,)


def _check_distinct(options, pieces, where) -> None:
  """Raises if two options are the same tokens, so that neither can win."""
  seen: dict[Any, int] = {}
  for i, (_, context, option) in pieces.items():
    j = seen.setdefault((context, option), i)
    if j != i:
      raise errors.UserError(
        f"{where}: options {options[j]!r} and {options[i]!r} are the same "
        "tokens; expected options that differ."
      )


def _fit(pieces, max_length, truncate, where):
  """Cuts every option's context to the same budget, or complains."""
  longest = max(len(option) for _, _, option in pieces.values())
  budget = max_length - (longest - 1)
  fitted = {}
  for i, (lead, context, option) in pieces.items():
    if len(context) > budget:
      if not truncate:
        raise TooLongError(
          f"{where}: prompt and option are {len(context) + longest - 1} "
          f"tokens; at most {max_length} fit. Set data.long_rows to "
          "'truncate' (at the left) or 'drop'."
        )
      if budget <= lead:
        raise TooLongError(
          f"{where}: an option of {longest} tokens leaves no room for a "
          f"prompt in {max_length} tokens."
        )
      context = context[:lead] + context[len(context) - (budget - lead) :]
    fitted[i] = (lead, context, option)
  return fitted
