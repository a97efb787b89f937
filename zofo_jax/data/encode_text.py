"""Encodes chats, completions and plain text, whose tokens are to be predicted.

A chat is rendered by the tokenizer's own chat template. Of it, the assistant's
turns are learned: their content and the token that ends a turn. A completion is
learned up to the token that ends a text, which is appended to it.
"""

import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from zofo_jax import errors, tasks
from zofo_jax.data import tokenizer as tokenizer_lib

# Stands for a turn's content, to find it in the rendered text.
_MARK = "zofo-jax-content"
# Stands for a message that does not matter.
_WORD = "Hello"
# As transformers looks for blocks that mark what is learned.
_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Tokens(NamedTuple):
  """A row as tokens.

  Attributes:
    ids: token ids.
    learned: for each, whether it is to be predicted.
    num_leading: special tokens that begin the text.
  """

  ids: tuple[int, ...]
  learned: tuple[bool, ...]
  num_leading: int = 0


def tokenize(
  document: tasks.Chat | tasks.Plain, tokenizer: Any, source: str
) -> Tokens:
  """Returns the tokens of a chat or text, and which of them are learned.

  Args:
    document: the chat or text.
    tokenizer: a fast tokenizer (`tokenizer.load_tokenizer`).
    source: file and row, for messages.

  Raises:
    RowError: the chat template refuses the chat, or nothing is to be learned.
    UserError: the tokenizer has no chat template.
  """
  if isinstance(document, tasks.Plain):
    tokens = _plain(document, tokenizer)
  elif _BLOCK.search(_template(tokenizer)):
    tokens = _marked_chat(document, tokenizer, source)
  else:
    tokens = _chat(document, tokenizer, source)
  if not any(tokens.learned[1:]):
    raise errors.RowError(source, "no token of this row is to be learned.")
  return tokens


def tokenize_prompt(
  document: tasks.Chat | tasks.Plain,
  tokenizer: Any,
  source: str,
  *,
  labelled: bool = True,
) -> tuple[str, int, tuple[int, ...], tuple[str, ...]]:
  """Returns what comes before the answer of a row, and the accepted answers.

  Of a chat, it is what comes before an answer that is learned, which may be
  more than the template's generation prompt.

  Args:
    document: the chat or text; of a labelled chat, the last turn is the answer.
    tokenizer: a fast tokenizer.
    source: file and row, for messages.
    labelled: if False, there is no answer.

  Returns:
    The prompt's text, the number of its leading special tokens, all of its
    tokens, and the answers.

  Raises:
    UserError: as `tokenize`.
  """
  if isinstance(document, tasks.Plain):
    num_leading, ids = tokenizer_lib.prompt_tokens(
      tokenizer, document.prompt, source
    )
    answer = document.completion.strip()
    return document.prompt, num_leading, ids, (answer,) if labelled else ()
  messages = list(document.messages)
  answers: tuple[str, ...] = ()
  if labelled:
    last = messages.pop()
    if last["role"] != "assistant":
      raise errors.RowError(
        source,
        f"the chat ends in a message of the {last['role']}; expected one of "
        "the assistant, which is the answer.",
      )
    answers = document.answers or (last["content"],)
  chat = tasks.Chat((*messages, _said("assistant")), len(messages))
  tokens = tokenize(chat, tokenizer, source)
  before = tokens.ids[: tokens.learned.index(True)]
  text = tokenizer.decode(before, clean_up_tokenization_spaces=False)
  return text, tokens.num_leading, before, answers


def end_of_turn(tokenizer: Any) -> int | None:
  """Returns the token that is learned to end a turn; None if there is none.

  Args:
    tokenizer: a fast tokenizer, with or without a chat template.
  """
  if not tokenizer.chat_template:
    return None
  chat = tasks.Chat((_said("user"), _said("assistant")))
  try:
    tokens = tokenize(chat, tokenizer, "")
  except errors.UserError:  # which rows will raise, or which they avoid
    return None
  last = _last_learned(tokens)
  return last if last in _special_ids(tokenizer) else None


def warnings(
  document: tasks.Chat | tasks.Plain, tokenizer: Any, source: str
) -> Iterator[str]:
  """Yields what may surprise where answers like that of a row are generated.

  Args:
    document: a chat or text to be learned.
    tokenizer: a fast tokenizer.
    source: file and row, for messages.

  Raises:
    UserError: as `tokenize`.
  """
  last = _last_learned(tokenize(document, tokenizer, source))
  if last not in _special_ids(tokenizer):
    yield (
      f"{tokenizer.convert_ids_to_tokens(last)!r} is the last token that is "
      "learned, and not a special one, so that generated texts end by "
      "generate.max_new_tokens or generate.stop alone; expected a tokenizer "
      "with an end-of-text token, and a chat template whose turns end in a "
      "special token"
    )
  if not isinstance(document, tasks.Chat):
    return
  roles = [message["role"] for message in document.messages]
  count = len(roles) - 1 - roles[::-1].index("assistant")
  question = document._replace(messages=document.messages[:count])
  _, _, ids, _ = tokenize_prompt(question, tokenizer, source, labelled=False)
  prompt = _render(
    tokenizer, question.messages, source, add_generation_prompt=True
  )
  others, _ = _text_tokens(tokenizer, prompt)
  pairs = zip(ids, others, strict=False)
  same = len([*itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)])
  if ids[same:] or others[same:]:
    yield (
      f"the chat template has {tokenizer.decode(ids[same:])!r} before an "
      f"answer, and {tokenizer.decode(others[same:])!r} in its generation "
      "prompt; answers are learned and generated after the former, and other "
      "programs that use the model have to do the same"
    )


def _said(role: str) -> dict[str, str]:
  return {"role": role, "content": _WORD}


def _last_learned(tokens: Tokens) -> int:
  return [*itertools.compress(tokens.ids, tokens.learned)][-1]


def _special_ids(tokenizer: Any) -> Collection[int]:
  added = tokenizer.added_tokens_decoder.items()
  return {*tokenizer.all_special_ids, *(i for i, t in added if t.special)}


def _plain(document: tasks.Plain, tokenizer: Any) -> Tokens:
  """Tokenizes a prompt and its completion, and appends the token of the end.

  A token that spans the boundary belongs to the completion, as an option's.
  """
  text = document.prompt + document.completion
  end = tokenizer.eos_token
  if end and text.endswith(end):
    text = text.removesuffix(end)
  ids, ends, num_leading = tokenizer_lib.tokenize(tokenizer, text)
  learned = [
    i >= num_leading and place > len(document.prompt)
    for i, place in enumerate(ends)
  ]
  if tokenizer.eos_token_id is not None:
    ids, learned = [*ids, tokenizer.eos_token_id], [*learned, True]
  return Tokens(tuple(ids), tuple(learned), num_leading)


def _marked_chat(chat: tasks.Chat, tokenizer: Any, source: str) -> Tokens:
  """Tokenizes a chat whose template marks what is learned ("generation")."""
  out = _apply(
    tokenizer,
    chat.messages,
    source,
    tokenize=True,
    return_dict=True,
    return_assistant_tokens_mask=True,
  )
  ids, learned = out["input_ids"], [bool(i) for i in out["assistant_masks"]]
  # Each run of marked tokens is a turn of the assistant.
  turns = [
    chat.is_learned(number)
    for number, message in enumerate(chat.messages)
    if message["role"] == "assistant"
  ]
  turn = -1
  for i, is_learned in enumerate(learned):
    turn += is_learned and (i == 0 or not out["assistant_masks"][i - 1])
    learned[i] = is_learned and all(turns[turn : turn + 1])
  return Tokens(tuple(ids), tuple(learned), _num_leading(tokenizer, ids))


def _chat(chat: tasks.Chat, tokenizer: Any, source: str) -> Tokens:
  """Tokenizes a chat and looks up the assistant's turns in its text."""
  messages = list(chat.messages)
  text = _render(tokenizer, messages, source)
  ids, places = _text_tokens(tokenizer, text)
  special = _special_ids(tokenizer)
  learned = [False] * len(ids)
  for number, message in enumerate(messages):
    if message["role"] != "assistant" or not chat.is_learned(number):
      continue
    start, end = _find_content(tokenizer, messages, number, text, source)
    inside = [i for i, (a, b) in enumerate(places) if b > start and a < end]
    for i in inside:
      learned[i] = True
    for i in range(max(inside, default=len(ids)) + 1, len(ids)):
      if ids[i] in special:  # ends the turn
        learned[i] = True
        break
      if text[places[i][0] : places[i][1]].strip():
        break
  return Tokens(tuple(ids), tuple(learned), _num_leading(tokenizer, ids))


def _find_content(
  tokenizer: Any,
  messages: Sequence[Mapping[str, str]],
  number: int,
  text: str,
  source: str,
) -> tuple[int, int]:
  """Returns where a message's content begins and ends in the rendered text."""
  mark = _MARK
  while mark in text:
    mark += "z"
  marked = list(messages)
  marked[number] = {**messages[number], "content": mark}
  before, middle, after = _render(tokenizer, marked, source).partition(mark)
  end = len(text) - len(after)
  if not (
    middle
    and text.startswith(before)
    and text.endswith(after)
    and len(before) < end
  ):
    change, other = "changes the text around", ""
    if "<think>" in messages[number]["content"]:
      change, other = "rewrites the thoughts (<think>) of", "no thoughts, or "
    raise errors.RowError(
      source,
      f"the chat template {change} message {number + 1}, so that its tokens "
      f"are not known; expected {other}a template with generation blocks.",
    )
  return len(before), end


def _render(
  tokenizer: Any,
  messages: Sequence[Mapping[str, str]],
  source: str,
  **more: Any,
) -> str:
  return _apply(tokenizer, messages, source, tokenize=False, **more)


def _apply(
  tokenizer: Any,
  messages: Sequence[Mapping[str, str]],
  source: str,
  **options: Any,
) -> Any:
  """Applies the tokenizer's chat template."""
  _template(tokenizer)  # raises
  try:
    return tokenizer.apply_chat_template(list(messages), **options)
  except Exception as error:  # A template raises whatever it likes.
    raise errors.RowError(
      source, f"the chat template refuses it: {errors.first_line(error)}."
    ) from error


def _template(tokenizer: Any) -> str:
  """Returns the chat template, or raises if there is none."""
  template = tokenizer.chat_template
  if isinstance(template, dict):  # several, each with a name
    template = template.get("default")
  if not template or not isinstance(template, str):
    raise errors.UserError(
      f"The tokenizer of '{tokenizer.name_or_path}' has no chat template, or "
      "none that is text and the default; expected one in the file "
      "chat_template.jinja of its folder, or rows with the columns 'prompt' "
      "and 'completion', or data.prompt."
    )
  return template


def _text_tokens(
  tokenizer: Any, text: str
) -> tuple[list[int], list[tuple[int, int]]]:
  """Tokenizes a rendered chat, which has all its special tokens."""
  encoding = tokenizer(
    text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
  )
  return encoding["input_ids"], encoding["offset_mapping"]


def _num_leading(tokenizer: Any, ids: Sequence[int]) -> int:
  return int(bool(ids) and ids[0] == tokenizer.bos_token_id)
