"""Formats of rows whose text is modelled: chats, completions, plain text.

They are known by their columns, as the libraries of Hugging Face name them.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from zofo_jax import errors
from zofo_jax.tasks.base import (
  Chat,
  Fields,
  Plain,
  Task,
  Template,
  is_missing,
  texts,
)

_ROLES = ("system", "user", "assistant")
# ShareGPT's names, and OpenAI's.
_OTHER_ROLES = {
  "human": "user",
  "gpt": "assistant",
  "model": "assistant",
  "developer": "system",
}


def _messages(value: Any, column: str) -> tuple[dict[str, Any], ...]:
  """Returns a column's messages, each checked."""
  if not isinstance(value, list | tuple) or not value:
    raise ValueError(
      f"column '{column}' holds {errors.as_json(value)}; "
      "expected a list of messages."
    )
  return tuple(
    _message(message, f"message {number} of column '{column}'")
    for number, message in enumerate(value, 1)
  )


def _message(message: Any, what: str) -> dict[str, Any]:
  """Returns a message's role, content and name, and its weight if given."""
  if not isinstance(message, Mapping):
    raise ValueError(
      f"{what} is {errors.as_json(message)}; expected an object "
      "with 'role' and 'content'."
    )
  # Tables fill in the keys that other rows have.
  fields = {k: v for k, v in message.items() if v is not None}
  if "from" in fields and "value" in fields:
    fields["role"], fields["content"] = fields.pop("from"), fields.pop("value")
  role = fields.get("role")
  role = _OTHER_ROLES.get(role, role) if isinstance(role, str) else role
  calls = fields.get("tool_calls") or fields.get("function_call")
  if role in ("tool", "function") or calls:
    raise ValueError(f"{what} calls a tool, which is not supported.")
  if role not in _ROLES:
    raise ValueError(
      f"{what} has the role {role!r}; expected one of {', '.join(_ROLES)}."
    )
  keys = ("role", "content", "name", "weight")
  unknown = [
    key
    for key, value in fields.items()
    if key not in keys and not is_missing(value)
  ]
  if unknown:
    raise ValueError(
      f"{what} has the key '{unknown[0]}'; expected role, content and name."
    )
  if is_missing(fields.get("content")):
    raise ValueError(f"{what} has no content.")
  read = {"role": role, "content": _joined(fields["content"])}
  if not is_missing(fields.get("name")):
    read["name"] = fields["name"]
  for key, value in read.items():
    if not isinstance(value, str):
      raise ValueError(
        f"{what} has {key} of type {type(value).__name__}; expected text."
      )
  if "weight" not in fields:
    return read
  if fields["weight"] not in (0, 1):
    raise ValueError(
      f"{what} has the weight {fields['weight']!r}; expected 0 or 1."
    )
  return {**read, "weight": fields["weight"]}


def _joined(content: Any) -> Any:
  """Returns a content, one of several parts as one if all of them are text."""
  parts = content if isinstance(content, list | tuple) else ()
  said = [
    part["text"]
    for part in parts
    if isinstance(part, Mapping)
    and part.get("type") == "text"
    and isinstance(part.get("text"), str)
  ]
  return "".join(said) if said and len(said) == len(parts) else content


def _chat(messages: Sequence[dict[str, Any]], start: int, column: str) -> Chat:
  """Returns a chat whose roles are in order.

  Raises:
    ValueError: they are not.
  """
  roles = [message["role"] for message in messages]
  for number, role in enumerate(roles, 1):
    earlier = roles[: number - 1]
    if role == "system" and earlier:
      problem = "expected a system message to be the first"
    elif role == "assistant" and earlier[-1:] != ["user"]:
      problem = "expected an assistant message to follow one of the user"
    else:
      continue
    raise ValueError(
      f"message {number} of column '{column}' has the role '{role}' after "
      f"{earlier[-1] if earlier else 'nothing'}; {problem}."
    )
  weights = [message.pop("weight", 1) for message in messages]
  skipped = tuple(i for i, weight in enumerate(weights) if not weight)
  return Chat(tuple(messages), start, skipped=skipped)


def _of_messages(column: str) -> Callable[[Fields, bool], Chat]:
  def read(fields, labelled):
    messages = _messages(fields[column], column)
    chat = _chat(messages, 0, column)
    if not labelled:
      if messages[-1]["role"] == "assistant":
        chat = chat._replace(messages=chat.messages[:-1])
      return _question(chat, column)
    if "assistant" not in {m["role"] for m in messages}:
      raise ValueError(f"column '{column}' has no message of the assistant.")
    return chat

  return read


def _question(chat: Chat, column: str) -> Chat:
  """Returns a chat to be answered, which ends in a message of the user."""
  role = chat.messages[-1]["role"]
  if role != "user":
    raise ValueError(
      f"column '{column}' ends in a message of the {role}; expected one of the "
      "user, which is answered."
    )
  return chat


def _of_completion(fields: Fields, labelled: bool) -> Chat | Plain:
  prompt = fields["prompt"]
  if not isinstance(prompt, str):
    before = _messages(prompt, "prompt")
    after = _messages(fields["completion"], "completion") if labelled else ()
    chat = _chat((*before, *after), len(before), "prompt")
    if not labelled:
      return _question(chat, "prompt")
    if "assistant" not in {m["role"] for m in after}:
      raise ValueError("column 'completion' has no message of the assistant.")
    return chat
  completion = _text(fields, "completion") if labelled else ""
  return Plain(_text(fields, "prompt"), completion)


def _of_text(fields: Fields, labelled: bool) -> Plain:
  text = _text(fields, "text")
  return Plain("", text) if labelled else Plain(text, "")


def _text(fields: Fields, column: str) -> str:
  value = fields[column]
  if is_missing(value):
    raise ValueError(f"column '{column}' is empty.")
  if not isinstance(value, str):
    raise ValueError(
      f"column '{column}' holds {errors.as_json(value)} of type "
      f"{type(value).__name__}; expected text."
    )
  return value


def _one_question(question: str, answers: Sequence[str]) -> Chat:
  """Returns a chat of one question and its first answer."""
  messages = [{"role": "user", "content": question}]
  if answers:
    messages.append({"role": "assistant", "content": answers[0]})
  return Chat(tuple(messages), 0, tuple(answers))


def _of_question(fields: Fields, labelled: bool) -> Chat:
  answer = fields["answer"] if labelled else []
  if isinstance(answer, Mapping) and "text" in answer:
    answer = answer["text"]
  if labelled and is_missing(answer):
    raise ValueError("column 'answer' is empty.")
  if isinstance(answer, str | int | float):
    answer = [answer]
  return _one_question(_text(fields, "question"), texts(answer, "answer"))


def _of_instruction(more: str, answer: str) -> Callable[[Fields, bool], Chat]:
  def read(fields, labelled):
    parts = [_text(fields, "instruction")]
    if not is_missing(fields.get(more)):
      parts.append(_text(fields, more))
    answers = [_text(fields, answer)] if labelled else []
    return _one_question("\n\n".join(parts), answers)

  return read


def _as_message(answer: str, like: Mapping[str, Any]) -> dict[str, str]:
  """Returns an answer as a message, with the keys of another one."""
  if like.get("value") is not None:
    return {"from": "gpt", "value": answer}
  return {"role": "assistant", "content": answer}


def _append_answer(column: str) -> Callable[[Fields, str], Fields]:
  def append(fields, answer):
    chat = _of_messages(column)(fields, False)
    messages = fields[column][: len(chat.messages)]
    return {column: [*messages, _as_message(answer, messages[-1])]}

  return append


def _complete(fields: Fields, answer: str) -> Fields:
  prompt = fields["prompt"]
  if isinstance(prompt, str):
    return {}
  return {"completion": [_as_message(answer, prompt[-1])]}


class _Format(NamedTuple):
  """A format: the columns it is known by, and how a row is read.

  Attributes:
    columns: all that a row must have.
    read: see `Task.document`.
    example: a row.
    answered: see `Task.answered`.
    optional: columns that a row may have.
  """

  columns: tuple[str, ...]
  read: Callable[[Fields, bool], Chat | Plain]
  example: Fields
  answered: Callable[[Fields, str], Fields] | None = None
  optional: tuple[str, ...] = ()


_HI = ({"role": "user", "content": "Hi!"},)
_HELLO = ({"role": "assistant", "content": "Hello."},)
# In the order in which they are looked for.
FORMATS: dict[str, _Format] = {
  **{
    column: _Format(
      (column,),
      _of_messages(column),
      {column: [*_HI, *_HELLO]},
      _append_answer(column),
    )
    for column in ("messages", "conversations")
  },
  "completion": _Format(
    ("prompt", "completion"),
    _of_completion,
    {"prompt": "Hi!", "completion": " Hello."},
    _complete,
  ),
  "alpaca": _Format(
    ("instruction", "output"),
    _of_instruction("input", "output"),
    {"instruction": "Say it in French.", "input": "Hi!", "output": "Salut !"},
    optional=("input",),
  ),
  "dolly": _Format(
    ("instruction", "response"),
    _of_instruction("context", "response"),
    {"instruction": "Where is the cat?", "response": "On the mat."},
    optional=("context",),
  ),
  "question": _Format(
    ("question", "answer"),
    _of_question,
    {"question": "Where is the cat?", "answer": "On the mat."},
  ),
  "text": _Format(("text",), _of_text, {"text": "It was a fine day."}),
}


def recognise(columns: Collection[str]) -> str | None:
  """Returns the format that rows have, by their columns, or None.

  A column "text" is plain text only without a column of labels.
  """
  for name, form in FORMATS.items():
    labelled = name == "text" and "label" in columns
    if all(column in columns for column in form.columns) and not labelled:
      return name
  return None


def formatted(name: str, form: str, *, metric: str | None = None) -> Task:
  """Defines a task whose rows have a format.

  Args:
    name: name of the task.
    form: name in `FORMATS`.
    metric: None for "token_loss"; a metric of texts for answers that are
      generated.

  Raises:
    UserError: there is no such format, or the metric needs answers.

  Examples:
    >>> task = formatted("support", "messages")
    >>> task.kind, task.metric
    ('text', 'token_loss')
  """
  if form not in FORMATS:
    raise errors.UserError(
      f"Task {name}: there is no format '{form}'; expected one of "
      f"{', '.join(FORMATS)}.{errors.nearest(form, FORMATS)}"
    )
  metric = metric or "token_loss"
  metrics = ["token_loss", "token_accuracy"]
  if form != "text":
    metrics += ["token_f1", "exact_match", "rouge_l"]
  if metric not in metrics:
    raise errors.UserError(
      f"Task {name}: metric is '{metric}'; expected one of "
      f"{', '.join(metrics)} with format '{form}'."
    )
  columns, read, example, answered, _ = FORMATS[form]
  return Task(
    name=name,
    templates=(Template("", ()),),
    example=example,
    text=(),
    other=columns,
    label=lambda fields: (0,),
    metric=metric,  # type: ignore[arg-type]  # one of the list above
    kind="text"
    if metric.startswith("token_") and metric != "token_f1"
    else "generation",
    document=read,
    answered=answered,
    may_split=form == "text",
  )
