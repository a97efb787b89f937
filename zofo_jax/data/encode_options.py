"""Encodes rows whose options are scored as token sequences with targets.

A chat or a text (`tasks.formatted`) is one option, whose tokens may be in
several places of its sequence.

An option's tokens are those tokens of prompt + option that end after the
prompt, by the tokenizer's character offsets: a token that spans the boundary
belongs to the option. Scores are conditioned on exactly the tokens before it,
whether options are scored in one sequence or in several.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from zofo_jax import errors, tasks
from zofo_jax.data import bad_rows as bad_rows_lib
from zofo_jax.data import encode_masks, encode_text
from zofo_jax.data import tokenizer as tokenizer_lib

Mode = Literal["classification", "likelihood"]
LongRows = Literal["error", "truncate", "drop"]
_T = TypeVar("_T")


class TooLongError(errors.RowError):
  """A row is longer than the maximum number of tokens."""


class EncodedRow(NamedTuple):
  """One token sequence and the targets that are predicted from it.

  Attributes:
    tokens: token ids.
    positions: positions whose hidden states predict targets.
    targets: (index into `positions`, token, option) of each target.
    documents: number of the document of each token, from 1; () for a single
      one.
  """

  tokens: tuple[int, ...]
  positions: tuple[int, ...]
  targets: tuple[tuple[int, int, int], ...]
  documents: tuple[int, ...] = ()


class Example(NamedTuple):
  """A row of data as one or more token sequences.

  Attributes:
    rows: one sequence for all single-token options, one for each longer
      option.
    label: index of the correct option, the first if there are several.
    right: indices of all correct options; empty if the label was not read.
    options: for each option, whether it is encoded.
    source: file and row of the data.
  """

  rows: tuple[EncodedRow, ...]
  label: int
  right: tuple[int, ...]
  options: tuple[bool, ...]
  source: str


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
  prompt: Any = None,
) -> Example:
  """Encodes all options of a row, or its correct option only.

  If the task fills a mask, the options are the words that may fill it.

  Args:
    task: defines prompt, options and label, or a chat or text.
    row: the data.
    tokenizer: a fast tokenizer (`tokenizer.load_tokenizer`).
    mode: "classification" encodes every option; "likelihood" only the correct
      one, for training with teacher forcing.
    max_length: maximum number of tokens of a sequence.
    version: the template version.
    long_rows: "truncate" cuts prompts that are too long on the left, after the
      leading special tokens; with any other value they are an error.
    labelled: if False, the label is not read and the example's label is 0.
    prompt: replaces the task's prompt, or the row's chat or text.

  Returns:
    The example.

  Raises:
    TooLongError: the prompt is too long.
    UserError: an option has no tokens, or two options have the same tokens.
  """
  if task.document is not None:
    return _encode_document(
      prompt or task.read_document(row),
      tokenizer,
      max_length,
      long_rows == "truncate",
      row.source,
    )
  prompt = task.prompt(row, version) if prompt is None else prompt
  options = task.options(row, version)
  right = task.right(row) if labelled else ()
  label = right[0] if right else 0
  if mode == "classification" and task.kind == "generation":
    raise errors.UserError(
      f"Task {task.name} is answered by generation; it has no options to "
      "classify, so expected the loss 'likelihood'."
    )
  indices = range(len(options)) if mode == "classification" else (label,)
  masked = None
  if task.fills_mask:
    masked = encode_masks.tokenize(prompt, tokenizer, row.source)
    prompt = masked.before
  pieces = {
    i: _tokenize(tokenizer, prompt, options[i], row.source) for i in indices
  }
  if mode == "classification" and not task.template(version).may_repeat:
    _check_distinct(options, pieces, row.source)
  truncate = long_rows == "truncate"
  if masked is not None:
    words = {i: option for i, (_, _, option) in pieces.items()}
    encoded = [
      _encode_mask(masked, words, options, max_length, truncate, row.source)
    ]
  else:
    encoded = _encode_options(_fit(pieces, max_length, truncate, row.source))
  return Example(
    rows=tuple(encoded),
    label=label,
    right=right,
    options=tuple(i in pieces for i in range(len(options))),
    source=row.source,
  )


def _encode_options(pieces) -> list[EncodedRow]:
  """Returns a sequence for single tokens, and one for each longer option."""
  encoded: list[EncodedRow] = []
  singles: dict[tuple[int, ...], list[tuple[int, int]]] = {}
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
  return encoded


def _encode_mask(
  masked: encode_masks.MaskedText,
  words: Mapping[int, tuple[int, ...]],
  options: Sequence[str],
  max_length: int,
  truncate: bool,
  source: str,
) -> EncodedRow:
  """Encodes a prompt whose mask each of the words may fill."""
  for i, word in words.items():
    if len(word) > 1:
      raise errors.RowError(
        source,
        f"option {options[i]!r} is {len(word)} tokens; expected one, which "
        "fills the mask.",
      )
  fitted = encode_masks.shorten(masked, max_length)
  if fitted is None or (fitted is not masked and not truncate):
    raise TooLongError(
      source,
      f"the row is {len(masked.tokens)} tokens; at most {max_length} fit.",
    )
  return EncodedRow(
    tokens=fitted.tokens,
    positions=(fitted.position,),
    targets=tuple((0, word[0], i) for i, word in words.items()),
  )


def _encode_document(
  document: tasks.Chat | tasks.Plain,
  tokenizer: Any,
  max_length: int,
  truncate: bool,
  source: str,
) -> Example:
  """Encodes a chat or text, truncated at the left if it is too long."""
  ids, learned, num_leading = encode_text.tokenize(document, tokenizer, source)
  count = max(i for i, is_learned in enumerate(learned) if is_learned) + 1
  excess = count - 1 - max_length  # the last token is not read
  indices = list(range(count))
  if excess > 0:
    if not truncate or max_length <= num_leading:
      raise TooLongError(
        source, f"the row is {count - 1} tokens; at most {max_length} fit."
      )
    indices = [*range(num_leading), *range(num_leading + excess, count)]
  tokens = tuple(ids[i] for i in indices)
  targets = [slot for slot, i in enumerate(indices) if slot and learned[i]]
  sequence = EncodedRow(
    tokens=tokens[:-1],
    positions=tuple(i - 1 for i in targets),
    targets=tuple((slot, tokens[i], 0) for slot, i in enumerate(targets)),
  )
  return Example((sequence,), 0, (0,), (True,), source)


def encode_rows(
  task: tasks.Task,
  data: Sequence[tasks.Row],
  tokenizer: Any,
  mode: Mode = "classification",
  *,
  max_length: int,
  version: tasks.Version = 0,
  long_rows: LongRows = "error",
  bad_rows: bad_rows_lib.BadRows | None = None,
) -> list[Example]:
  """Encodes several labelled rows; see `encode`.

  With long_rows="drop", rows that are too long are left out and their number
  is logged.

  Args:
    task: as for `encode`.
    data: the rows.
    tokenizer: as for `encode`.
    mode: as for `encode`.
    max_length: as for `encode`.
    version: as for `encode`.
    long_rows: what happens to rows that are too long.
    bad_rows: what happens to other rows that cannot be encoded; None to stop
      at them. Rows of a set of the hub are left out if two of their own
      options are the same.

  Returns:
    The examples, in the order of the rows.

  Raises:
    UserError: as `encode`, or no row fits.
  """
  items = encode_each(
    task,
    data,
    tokenizer,
    mode,
    max_length=max_length,
    version=version,
    long_rows=long_rows,
  )
  return keep_encoded(
    task,
    items,
    max_length=max_length,
    long_rows=long_rows,
    bad_rows=bad_rows or bad_rows_lib.BadRows(),
  )


def keep_encoded(
  task: tasks.Task,
  items: Sequence[Any],
  *,
  max_length: int,
  long_rows: LongRows,
  bad_rows: bad_rows_lib.BadRows,
) -> list[Any]:
  """Returns the examples or questions among encoded rows and their errors.

  Args:
    task: of the rows.
    items: as `encode_each` returns them.
    max_length: of a row, for messages.
    long_rows: as for `encode_rows`.
    bad_rows: as for `encode_rows`.

  Raises:
    UserError: as `encode_rows`.
  """
  long = [item for item in items if isinstance(item, TooLongError)]
  if long and long_rows != "drop":
    raise TooLongError(
      long[0].source,
      f"{long[0].reason} Set data.long_rows to 'truncate' (at the left) or "
      "'drop'.",
    )
  if len(long) == len(items):
    raise errors.UserError(
      f"Task {task.name}: none of {len(items)} rows fits in {max_length} "
      "tokens (data.max_length)."
    )
  if long:
    bad_rows.record(long)
    logging.getLogger("zofo_jax").warning(
      "%s: %d of %d rows do not fit in %d tokens and are left out",
      *(task.name, len(long), len(items), max_length),
    )

  def is_known(error):
    from_hub = task.hub is not None and task.kind == "multiple choice"
    return from_hub and isinstance(error, errors.UnusableRowError)

  return bad_rows.keep(
    [item for item in items if not isinstance(item, TooLongError)],
    f"Task {task.name}",
    is_known,
  )


def encode_each(
  task: tasks.Task,
  data: Sequence[tasks.Row],
  tokenizer: Any,
  mode: Mode = "classification",
  *,
  max_length: int,
  version: tasks.Version = 0,
  long_rows: LongRows = "error",
  labelled: bool = True,
) -> list[Example | errors.RowError]:
  """Encodes several rows; see `encode`.

  Returns:
    An example, or what is wrong, for each row.
  """

  def encode_one(row, truncate):
    return encode(
      task,
      row,
      tokenizer,
      mode,
      max_length=max_length,
      version=version,
      long_rows="truncate" if truncate else "error",
      labelled=labelled,
    )

  return encode_all(
    encode_one,
    data,
    truncate=long_rows == "truncate",
    name=task.name,
    noun="rows",
    max_length=max_length,
  )


def encode_all(
  encode_one: Callable[[tasks.Row, bool], _T],
  data: Sequence[tasks.Row],
  *,
  truncate: bool,
  name: str,
  noun: str,
  max_length: int,
) -> list[_T | errors.RowError]:
  """Encodes rows, and logs how many of them had to be truncated.

  Args:
    encode_one: (row, whether it may be truncated) -> what it becomes.
    data: the rows.
    truncate: whether rows that are too long are truncated at the left.
    name: of the task, for the message.
    noun: what is truncated, likewise.
    max_length: in tokens, likewise.

  Returns:
    For each row what it becomes, or what is wrong.
  """
  items: list[_T | errors.RowError] = []
  num_truncated = 0
  for row in data:
    try:
      try:
        items.append(encode_one(row, False))
      except TooLongError:
        if not truncate:
          raise
        items.append(encode_one(row, True))
        num_truncated += 1
    except errors.RowError as error:
      items.append(error)
  if num_truncated:
    logging.getLogger("zofo_jax").warning(
      "%s: %d of %d %s are cut to %d tokens at the left",
      *(name, num_truncated, len(data), noun, max_length),
    )
  return items


def rows_of(
  data: Sequence[tasks.Row], encoded: Sequence[Any]
) -> list[tasks.Row]:
  """Returns the rows of which there are examples or questions, in order."""
  sources = {example.source for example in encoded}
  return [row for row in data if row.source in sources]


def _tokenize(
  tokenizer: Any, prompt: str, option: str, source: str
) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
  """Tokenizes prompt + option and splits it where the option starts.

  Returns:
    The number of leading special tokens, the tokens before the option (leading
    ones included), and the option's tokens.
  """
  ids, ends, num_leading = tokenizer_lib.tokenize(tokenizer, prompt + option)
  start, count = num_leading, len(ids)
  while start < count and ends[start] <= len(prompt):
    start += 1
  if start == count:
    raise errors.RowError(
      source,
      f"option {option!r} gives no token after the prompt; expected a word.",
    )
  num_leading, context = tokenizer_lib.with_begin_token(
    tokenizer, num_leading, ids[:start], source
  )
  return num_leading, context, tuple(ids[start:])


def _check_distinct(options, pieces, source) -> None:
  """Raises if two options have the same tokens and would always tie."""
  seen: dict[Any, int] = {}
  for i, (_, context, option) in pieces.items():
    j = seen.setdefault((context, option), i)
    if j != i:
      raise errors.UnusableRowError(
        source,
        f"options {options[j]!r} and {options[i]!r} are the same tokens; "
        "expected options that differ.",
      )


def _fit(pieces, max_length, truncate, source):
  """Truncates every context to what the longest option leaves, or raises."""
  longest = max(len(option) for _, _, option in pieces.values())
  budget = max_length - (longest - 1)
  fitted = {}
  for i, (num_leading, context, option) in pieces.items():
    if len(context) > budget:
      if not truncate:
        raise TooLongError(
          source,
          f"prompt and option are {len(context) + longest - 1} tokens; at most "
          f"{max_length} fit.",
        )
      if budget <= num_leading:
        raise TooLongError(
          source,
          f"an option of {longest} tokens leaves no room for a prompt in "
          f"{max_length} tokens.",
        )
      num_kept = budget - num_leading
      context = context[:num_leading] + context[len(context) - num_kept :]
    fitted[i] = (num_leading, context, option)
  return fitted
