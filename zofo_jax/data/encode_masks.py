"""Encodes prompts with a mask, which a masked language model fills."""

from typing import Any, NamedTuple

from zofo_jax import errors, tasks


class MaskedText(NamedTuple):
  """A tokenized prompt with a mask.

  Attributes:
    before: the text before the mask.
    tokens: token ids, with the special tokens at both ends.
    position: index of the mask among them.
    num_leading: number of special tokens at the start.
    num_trailing: number of special tokens at the end.
  """

  before: str
  tokens: tuple[int, ...]
  position: int
  num_leading: int
  num_trailing: int


def tokenize(prompt: str, tokenizer: Any, source: str) -> MaskedText:
  """Tokenizes a prompt.

  Args:
    prompt: a text with `tasks.MASK`; without, a mask and a full stop are
      appended.
    tokenizer: a fast tokenizer with a mask token.
    source: file and row, for messages.

  Raises:
    UserError: the tokenizer has no mask token, or the prompt several masks.
  """
  mask = tokenizer.mask_token
  if mask is None:
    raise errors.UserError(
      "The tokenizer has no mask token; expected that of the masked language "
      "model."
    )
  if tasks.MASK not in prompt:
    prompt += f"{tasks.MASK}."
  before, _, after = prompt.partition(tasks.MASK)
  if tasks.MASK in after or mask in before + after:
    raise errors.RowError(
      source, f"the prompt holds {tasks.MASK} more than once; expected one."
    )
  encoding = tokenizer(
    before + mask + after, return_special_tokens_mask=True, verbose=False
  )
  tokens = tuple(encoding["input_ids"])
  position = tokens.index(tokenizer.mask_token_id)
  special = encoding["special_tokens_mask"]
  num_leading = num_trailing = 0
  while num_leading < position and special[num_leading]:
    num_leading += 1
  while (
    special[-1 - num_trailing] and len(tokens) - num_trailing > position + 1
  ):
    num_trailing += 1
  return MaskedText(before, tokens, position, num_leading, num_trailing)


def shorten(text: MaskedText, max_length: int) -> MaskedText | None:
  """Drops the tokens farthest from the mask; None if even it does not fit.

  The longer side of the mask is shortened, at its outer end.
  """
  excess = len(text.tokens) - max_length
  if excess <= 0:
    return text
  start, end = text.num_leading, len(text.tokens) - text.num_trailing
  left, right = text.position - start, end - text.position - 1
  if excess > left + right:
    return None
  first = left if left >= right else right
  from_first = min(excess, first)
  cut = (from_first, excess - from_first)
  cut_left, cut_right = cut if left >= right else cut[::-1]
  tokens = (
    *text.tokens[:start],
    *text.tokens[start + cut_left : end - cut_right],
    *text.tokens[end:],
  )
  return text._replace(tokens=tokens, position=text.position - cut_left)
