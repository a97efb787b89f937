"""The definition of a task: columns, prompt, options and metric.

Tasks are data. A template is a `str.format` pattern over the row's columns, or
a small function where a pattern is not enough. The text of an option directly
follows the prompt and includes its leading space or line break.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from zofo_jax import errors

Fields = Mapping[str, Any]
Kind = Literal["classification", "multiple choice", "generation", "text"]
OptionMetric = Literal["accuracy", "macro_f1", "matthews", "pearson"]
TextMetric = Literal["token_f1", "exact_match", "rouge_l"]
TokenMetric = Literal["token_loss", "token_accuracy"]
Metric = OptionMetric | TextMetric | TokenMetric
Version = int | Literal["reference"]


class Row(NamedTuple):
  """A row and its source, such as "sst2/train.jsonl row 3"."""

  fields: Mapping[str, Any]
  source: str


class Chat(NamedTuple):
  """A row as a chat; the assistant's turns are to be learned.

  Attributes:
    messages: {"role": ..., "content": ...} each.
    start: index of the first message that may be learned.
    answers: accepted contents of the last message; () for that one alone.
    skipped: indices of messages that are not learned.
  """

  messages: tuple[Mapping[str, str], ...]
  start: int = 0
  answers: tuple[str, ...] = ()
  skipped: tuple[int, ...] = ()

  def is_learned(self, number: int) -> bool:
    """Returns whether a message of the assistant is to be learned."""
    return number >= self.start and number not in self.skipped


class Plain(NamedTuple):
  """A row as text: a prompt, which may be empty, and what is to be learned."""

  prompt: str
  completion: str


# Where a prompt has the mask that a masked language model fills.
MASK = "<mask>"


class Template(NamedTuple):
  """A prompt and its options.

  Attributes:
    prompt: pattern over the columns, or a function of them.
    options: one pattern per option, or a function that returns the options'
      texts. For generation: the accepted answers; the first is the training
      target.
    may_repeat: whether two options may have the same text (the first one then
      wins). Only for reference variants that were published with this mistake.
  """

  prompt: str | Callable[[Fields], str]
  options: Sequence[str] | Callable[[Fields], Sequence[str]]
  may_repeat: bool = False


def _with_mask(template: Template) -> Template:
  """Appends a mask and a full stop to the prompt, unless it has a mask."""
  prompt = template.prompt
  if callable(prompt):
    function = prompt
    return template._replace(prompt=lambda fields: f"{function(fields)}{MASK}.")
  if MASK in prompt:
    return template
  return template._replace(prompt=f"{prompt}{MASK}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """The definition of a task.

  Attributes:
    name: name in configs, such as "sst2".
    templates: the template versions 0, 1, 2, ...
    example: a short made-up row, for `python -m zofo_jax.tasks` and tests.
    text: columns that must hold non-empty text.
    other: further columns that a template or `label` reads.
    label: column of the label, or a function that returns the indices of all
      correct options; None if texts are generated that rewards alone score.
    labels: label values in the options' order; None if they are 0, 1, 2, ...
    hub: id and configuration of the data set on the Hugging Face hub.
    hub_splits: names of the splits on the hub, where they differ; "" for one
      that it does not have.
    hub_script: whether the repository holds a loading script, so that the hub's
      converted copy is read.
    mirror_fields: the task's columns from those of a row of `hub`, if `hub` is
      a mirror whose columns have other names.
    metric: how predictions are scored.
    kind: classification, multiple choice, generation, or text, whose tokens
      are predicted.
    reference: the template of the paper's PyTorch code, where it has a mistake
      that affects results.
    masked: the versions for masked language models, whose prompts hold MASK;
      () for `templates`, with a mask and a full stop after each prompt.
    fills_mask: whether the templates are of this kind; see `with_mask`.
    document: (columns, whether they are labelled) -> the row as chat or text,
      for a format of `formats`, which has no prompt or options.
    answered: (columns, an answer) -> the columns that hold the answer as a
      message; none if the row has no messages.
    may_split: whether a long row may become several: plain text.
  """

  name: str
  templates: tuple[Template, ...]
  example: Fields
  text: tuple[str, ...]
  other: tuple[str, ...] = ()
  label: str | Callable[[Fields], Sequence[int]] | None = "label"
  labels: tuple[str, ...] | None = None
  hub: tuple[str, str | None] | None = None
  hub_splits: Mapping[str, str] = dataclasses.field(default_factory=dict)
  hub_script: bool = False
  mirror_fields: Callable[[Fields], Fields] | None = None
  metric: Metric = "accuracy"
  kind: Kind = "classification"
  reference: Template | None = None
  masked: tuple[Template, ...] = ()
  fills_mask: bool = False
  document: Callable[[Fields, bool], Chat | Plain] | None = None
  answered: Callable[[Fields, str], Fields] | None = None
  may_split: bool = False

  @property
  def columns(self) -> tuple[str, ...]:
    """All columns that a row must have."""
    label = (self.label,) if isinstance(self.label, str) else ()
    return (*self.text, *self.other, *label)

  def with_mask(self) -> "Task":
    """Returns this task as a masked language model answers it.

    Raises:
      UserError: the task is not a choice between options.
    """
    if self.kind not in ("classification", "multiple choice"):
      raise errors.UserError(
        f"Task {self.name} is answered by generated text; a masked language "
        "model chooses between words, so expected a task with options."
      )
    if self.fills_mask:
      return self
    return dataclasses.replace(
      self,
      templates=self.masked or tuple(map(_with_mask, self.templates)),
      reference=None,
      fills_mask=True,
    )

  def template(self, version: Version = 0) -> Template:
    """Returns a template version.

    Args:
      version: number of the version, or "reference" for the variant of the
        paper's PyTorch code: version 0 unless the task has a `reference`.

    Raises:
      UserError: the task has no such version.
    """
    if version == "reference":
      return self.reference or self.templates[0]
    if version not in range(len(self.templates)):
      raise errors.UserError(
        f"Task {self.name} has no template version {version!r}; it has "
        f"{', '.join(map(str, range(len(self.templates))))} and 'reference'."
      )
    return self.templates[version]

  def prompt(self, row: Row, version: Version = 0) -> str:
    """Returns the text before the option."""
    prompt = self.template(version).prompt
    text = _call(prompt if callable(prompt) else _format_fn(prompt), row)
    _check_characters(text, "the prompt", row.source)
    return text

  def options(self, row: Row, version: Version = 0) -> tuple[str, ...]:
    """Returns the options' texts, leading space included."""
    options = self.template(version).options
    if callable(options):
      option_texts = tuple(_call(options, row))
    else:
      option_texts = tuple(_call(_format_fn(o), row) for o in options)
    for text in option_texts:
      _check_characters(text, "an option", row.source)
    return option_texts

  def right(self, row: Row) -> tuple[int, ...]:
    """Returns the indices of all correct options, at least one.

    A task without labels has none.

    Raises:
      UserError: the label is missing, out of range or of the wrong type.
    """
    if self.label is None:
      return ()
    if callable(self.label):
      missing = any(is_missing(row.fields.get(name)) for name in self.other)
      error_class = errors.UnusableRowError if missing else errors.RowError
      try:
        right = tuple(_call(self.label, row))
      except errors.RowError as error:
        raise error_class(error.source, error.reason) from error
      if not right:
        reason = (
          f"column '{self.other[0]}' has no answer."
          if self.kind == "generation"
          else f"task {self.name} finds no right option in this row."
        )
        raise error_class(row.source, reason)
      return right
    value = row.fields[self.label]
    count = len(self.labels or self.options(row))
    index = _label_index(value, self.labels, count)
    if index is None:
      expected = (
        f"one of {', '.join(map(repr, self.labels))}"
        if self.labels
        else f"an integer from 0 to {count - 1}"
      )
      # The hub marks a row without label by -1.
      missing = is_missing(value) or _plain(value) == "-1"
      error_class = errors.UnusableRowError if missing else errors.RowError
      raise error_class(
        row.source,
        f"label column '{self.label}' holds {value!r}, but task {self.name} "
        f"expects {expected}.",
      )
    return (index,)

  def read_document(self, row: Row, *, labelled: bool = True) -> Chat | Plain:
    """Returns a row as chat or text; whitespace is left as written.

    Args:
      row: the row.
      labelled: False for a row to be answered.

    Raises:
      UserError: the row does not have the task's format.
    """
    read = self.document
    assert read is not None
    document = _call(lambda _: read(row.fields, labelled), row)
    parts = (
      [text for message in document.messages for text in message.values()]
      if isinstance(document, Chat)
      else document
    )
    for part in parts:
      _check_characters(part, "the text", row.source)
    return document

  def from_mirror(self, row: Row) -> Row:
    """Returns a row with the task's columns, if it has a mirror's."""
    named = all(column in row.fields for column in self.text)
    if self.mirror_fields is None or named:
      return row
    try:
      return row._replace(fields=self.mirror_fields(row.fields))
    except KeyError:  # not the mirror's columns either
      return row

  def check(self, row: Row, *, labelled: bool = True) -> None:
    """Checks a row's columns, their types and the label.

    Args:
      row: the row.
      labelled: False for a row to be predicted, which needs only its text.

    Raises:
      UserError: the row is invalid; names file and row.
    """
    for column in self.columns if labelled else self.text:
      if column not in row.fields:
        raise errors.RowError(
          row.source,
          f"no column '{column}', which task {self.name} reads; the row has "
          f"{', '.join(map(str, row.fields))}."
          f"{errors.nearest(column, map(str, row.fields))}",
        )
    if self.document is not None:
      self.read_document(row, labelled=labelled)
      return
    for column in self.text:
      value = row.fields[column]
      if is_missing(value):
        raise errors.BlankTextError(row.source, f"column '{column}' is empty.")
      if not isinstance(value, str):
        raise errors.RowError(
          row.source,
          f"column '{column}' holds {errors.as_json(value)} of "
          f"type {type(value).__name__}, but task {self.name} expects text.",
        )
      _check_characters(value, f"column '{column}'", row.source)
    if labelled:
      self.right(row)


def is_missing(value: Any) -> bool:
  """Returns whether a value is null, NaN, blank, or has nothing else in it."""
  if isinstance(value, str):
    return not value.strip()
  if isinstance(value, Mapping):
    return all(map(is_missing, value.values()))
  if isinstance(value, list | tuple):
    return all(map(is_missing, value))
  return value is None or (isinstance(value, float) and math.isnan(value))


def texts(values: Any, column: str) -> list[str]:
  """Returns the texts of a list of options or answers; numbers become text.

  Args:
    values: the list.
    column: whose value it is, for messages.

  Raises:
    ValueError: it is no list, or an entry has no text.
  """
  if not isinstance(values, list | tuple):
    raise ValueError(
      f"column '{column}' is not of the kind this task reads: found "
      f"{errors.as_json(values)}; expected a list of texts."
    )
  for value in values:
    if is_missing(value) or not isinstance(value, str | int | float):
      raise ValueError(
        f"column '{column}' holds {errors.as_json(values)}; "
        "expected texts, none of them empty."
      )
  return [str(value) for value in values]


class _Filled(dict):
  """The columns that a pattern reads, none of which may be null."""

  def __getitem__(self, name):
    value = super().__getitem__(name)
    if not isinstance(value, str) and is_missing(value):
      raise ValueError(f"column '{name}' is empty.")
    return value


def _format_fn(pattern: str) -> Callable[[Fields], str]:
  return lambda fields: pattern.format_map(_Filled(fields))


def _check_characters(text: str, what: str, source: str) -> None:
  """Raises if a text has no UTF-8 form, which tokenizers need."""
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise errors.RowError(
      source,
      f"{what} holds half of a surrogate pair, {text[error.start]!r}; expected "
      "whole characters.",
    ) from error


def _call(function: Callable[[Fields], Any], row: Row) -> Any:
  """Calls a task's function on a row; its errors become `UserError`s.

  Whitespace around a column's text is stripped, as in MeZO (GLUE's sentences
  end in a space).
  """
  fields = {
    name: value.strip() if isinstance(value, str) else value
    for name, value in row.fields.items()
  }
  try:
    return function(fields)
  except ValueError as error:  # Raised by the task, with a full sentence.
    raise errors.RowError(row.source, str(error)) from error
  except KeyError as error:
    raise errors.RowError(
      row.source,
      f"no entry {error} in this row; it has "
      f"{', '.join(map(str, row.fields))}.",
    ) from error
  except (TypeError, AttributeError, IndexError) as error:
    raise errors.RowError(
      row.source,
      "a column is not of the kind this task reads "
      f"({errors.first_line(error)}).",
    ) from error


def _label_index(
  value: Any, labels: Sequence[str] | None, count: int
) -> int | None:
  """Returns the option index of a label value, or None if it is invalid.

  Files write the same label as 1, "1", "1.0" or " 1", and as true or "True".
  """
  names = [str(i) for i in range(count)] if labels is None else list(labels)
  if is_missing(value):
    return None
  if str(value) in names:
    return names.index(str(value))
  plain = _plain(value)
  if labels is None and count == 2 and plain in ("false", "true"):
    return int(plain == "true")
  matches = [i for i, name in enumerate(names) if _plain(name) == plain]
  return matches[0] if len(matches) == 1 else None


def _plain(value: Any) -> str:
  """Returns a label's text without what programs add to it."""
  text = str(value).strip()
  if re.fullmatch(r"[+-]?[0-9]{1,9}(\.0*)?", text):
    return str(int(text.split(".")[0]))
  return text.lower() if text.lower() in ("false", "true") else text
