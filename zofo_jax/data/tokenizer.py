"""Loading fast tokenizers and tokenizing text with character offsets."""

import logging
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from zofo_jax import errors

_FILE = "tokenizer.json"
_EXPECTED = (
  "expected a fast tokenizer, which knows its tokens' places in the text"
)


def load_tokenizer(folder: str | pathlib.Path) -> Any:
  """Loads a fast tokenizer from a folder or a hub id; needs no torch.

  Args:
    folder: folder with tokenizer.json, or a hub id.

  Returns:
    The tokenizer, a `transformers.PreTrainedTokenizerFast`, without the dropout
    of BPE, with which each call would give other tokens.

  Raises:
    UserError: there is no tokenizer, or only a slow one without offsets.
  """
  # Without torch, transformers warns that models are unavailable. They are
  # not used.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  import transformers  # Imported here because it is slow to import.

  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(
      str(folder), trust_remote_code=False
    )
  except Exception as error:  # Its exceptions share no base class.
    reason = errors.first_line(error)
    if os.path.isdir(folder) and not pathlib.Path(folder, _FILE).exists():
      reason = f"it has no {_FILE}; {_EXPECTED}"
    raise errors.UserError(
      f"Cannot load a tokenizer from '{folder}': {reason}."
    ) from error
  # Some versions of transformers make an empty one if there are no files.
  if not tokenizer.is_fast or not tokenizer.vocab_size:
    raise errors.UserError(
      f"The tokenizer of '{folder}' has no {_FILE}; {_EXPECTED}."
    )
  model = tokenizer.backend_tokenizer.model
  if getattr(model, "dropout", None):
    logging.getLogger("zofo_jax").warning(
      "%s: %s has dropout %g, which is not used, since the same text would "
      "have other tokens each time.",
      *(folder, _FILE, model.dropout),
    )
    model.dropout = None
  return tokenizer


def pad_id(tokenizer: Any, vocab_size: int | None = None) -> int:
  """Returns the padding token's id, or another one that the model has.

  Any id works, since padding is masked, but only if the model has it: some
  tokenizers have a padding token that was never added to the model.

  Args:
    tokenizer: a fast tokenizer.
    vocab_size: the model's number of tokens; None for the tokenizer's.
  """
  size = len(tokenizer) if vocab_size is None else vocab_size
  for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
    if token is not None and token < size:
      return token
  return 0


def check_ids(
  tokenizer: Any, ids: Iterable[int], vocab_size: int, source: str
) -> None:
  """Raises a `RowError` if a text has tokens that the model does not have.

  Args:
    tokenizer: a fast tokenizer; it may have more tokens than the model.
    ids: token ids of the text.
    vocab_size: the model's number of tokens.
    source: file and row, for the message.
  """
  highest = max(ids, default=0)
  if highest >= vocab_size:
    raise errors.RowError(
      source,
      f"the text has the token '{tokenizer.convert_ids_to_tokens(highest)}', "
      f"whose id is {highest}; the model has {vocab_size} tokens.",
    )


def prompt_tokens(
  tokenizer: Any, prompt: str, source: str
) -> tuple[int, tuple[int, ...]]:
  """Returns the number of leading special tokens and a prompt's tokens.

  They are those before a word that follows: a space at the end, which the
  word's first token holds where it is learned, is not among them.

  Args:
    tokenizer: a fast tokenizer.
    prompt: the text.
    source: file and row, for error messages.

  Returns:
    How many special tokens the tokenizer puts before the text, and all tokens,
    those included.

  Raises:
    UserError: the prompt is empty and there is no begin-of-text token.
  """
  word = "A" if prompt[-1:].isspace() else ""
  ids, ends, num_leading = tokenize(tokenizer, prompt + word)
  ids = [i for i, end in zip(ids, ends, strict=True) if end <= len(prompt)]
  return with_begin_token(tokenizer, num_leading, ids, source)


def tokenize(tokenizer: Any, text: str) -> tuple[list[int], list[int], int]:
  """Tokenizes a text and drops trailing special tokens.

  Args:
    tokenizer: a fast tokenizer.
    text: the text.

  Returns:
    Token ids, the character offset at which each token ends, and the number of
    leading special tokens.
  """
  encoding = tokenizer(
    text,
    return_offsets_mapping=True,
    return_special_tokens_mask=True,
    verbose=False,
  )
  ids = encoding["input_ids"]
  ends = [end for _, end in encoding["offset_mapping"]]
  special = encoding["special_tokens_mask"]
  count = len(ids)
  while count and special[count - 1]:  # Some append an end-of-text token.
    count -= 1
  num_leading = 0
  while num_leading < count and special[num_leading]:
    num_leading += 1
  return ids[:count], ends[:count], num_leading


def with_begin_token(
  tokenizer: Any, num_leading: int, ids: Sequence[int], source: str
) -> tuple[int, tuple[int, ...]]:
  """Replaces an empty context by the begin-of-text token.

  Args:
    tokenizer: a fast tokenizer.
    num_leading: number of leading special tokens in `ids`.
    ids: token ids of the context.
    source: file and row, for error messages.

  Returns:
    The number of leading special tokens and the ids, at least one.

  Raises:
    UserError: the context is empty and there is no begin-of-text token.
  """
  if ids:
    return num_leading, tuple(ids)
  begin = tokenizer.bos_token_id
  if begin is None:
    raise errors.RowError(
      source,
      "the prompt is empty and the tokenizer has no begin-of-text token to "
      "start from.",
    )
  return 1, (begin,)
