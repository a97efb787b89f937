"""How the rows of a run become tokens: lengths, template, loss."""

import logging
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_collections

from zofo_jax import errors, tasks
from zofo_jax.builders import model as model_lib
from zofo_jax.config import defaults
from zofo_jax.data import bad_rows as bad_rows_lib
from zofo_jax.data import (
  encode_options,
  encode_prompts,
  encode_text,
  packing,
)
from zofo_jax.data import tokenizer as tokenizer_lib
from zofo_jax.evaluation import in_context, objectives


class Encoder(NamedTuple):
  """Encodes rows of any task for one model.

  Attributes:
    tokenizer: a fast tokenizer.
    vocab_size: the model's number of tokens; a text with a token beyond them
      is an error.
    context_length: tokens that fit next to what the adapters prepend.
    max_length: longest row of `config.data`, in tokens.
    max_new_tokens: longest generated answer, in tokens.
    mode: "classification" encodes all options of a training row, "likelihood"
      the right one.
    version: of the task's template.
    long_rows: what happens to rows that do not fit.
    bad_rows: what happens to other rows that cannot be used, and which ones
      were left out.
    pack: whether training rows hold several chats or texts.
    fills_mask: whether the model fills a mask in the prompt.
  """

  tokenizer: Any
  vocab_size: int
  context_length: int
  max_length: int
  max_new_tokens: int
  mode: encode_options.Mode
  version: tasks.Version
  long_rows: encode_options.LongRows
  bad_rows: bad_rows_lib.BadRows
  pack: bool = False
  fills_mask: bool = False

  @property
  def truncate(self) -> bool:
    """Whether rows that do not fit are truncated at the left."""
    return self.long_rows == "truncate"

  @property
  def max_train_length(self) -> int:
    """Longest training row in tokens: the config's, within the model's."""
    return min(self.max_length, self.context_length)

  @property
  def max_eval_length(self) -> int:
    """Longest row that is answered, in tokens.

    Where long training rows are dropped, it is all that the model can read.
    """
    if self.long_rows == "drop":
      return self.context_length
    return self.max_train_length

  def max_prompt_length(self) -> int:
    """Returns the longest prompt in tokens that leaves room for its answer.

    Raises:
      UserError: there is no room.
    """
    room = encode_prompts.check_room(self.max_new_tokens, self.context_length)
    return min(room, self.max_length) if self.truncate else room

  def encode_train(
    self, task: tasks.Task, rows: Sequence[tasks.Row]
  ) -> list[encode_options.Example]:
    """Encodes rows to train on.

    Raises:
      UserError: names the file and row that is wrong.
    """
    length = self.max_train_length
    task = self._task(task)
    examples = encode_options.encode_each(
      task,
      rows,
      self.tokenizer,
      self.mode,
      max_length=sys.maxsize if self._splits(task) else length,
      version=self.version,
      long_rows=self.long_rows,
    )
    usable = encode_options.keep_encoded(
      task,
      self._check_each(examples),
      max_length=length,
      long_rows=self.long_rows,
      bad_rows=self.bad_rows,
    )
    return packing.pack(usable, length) if self.pack else usable

  def check_document(self, task: tasks.Task, row: tasks.Row) -> None:
    """Raises a `RowError` if a chat or text cannot be rendered."""
    if task.document:
      document = task.read_document(row)
      encode_text.tokenize(document, self.tokenizer, row.source)

  def warn_of_answers(
    self, task: tasks.Task, rows: Sequence[tasks.Row]
  ) -> None:
    """Warns of what `encode_text.warnings` sees in the first usable row."""
    for row in rows if task.document else ():
      try:
        document = task.read_document(row)
        texts = [*encode_text.warnings(document, self.tokenizer, row.source)]
      except errors.RowError:
        continue
      for text in texts:
        logging.getLogger("zofo_jax").warning("%s: %s", task.name, text)
      return

  def encode_eval(
    self, task: tasks.Task, rows: Sequence[tasks.Row]
  ) -> list[Any]:
    """Encodes labelled rows to answer.

    Raises:
      UserError: names the file and row that is wrong.
    """
    task = self._task(task)
    length = self.max_eval_length
    splits = self._splits(task)
    usable = encode_options.keep_encoded(
      task,
      self._encode_each(
        task, rows, sys.maxsize if splits else length, labelled=True
      ),
      max_length=length,
      long_rows=self.long_rows,
      bad_rows=self.bad_rows,
    )
    return packing.split(usable, length) if splits else usable

  def encode_unlabelled(
    self, task: tasks.Task, rows: Sequence[tasks.Row]
  ) -> list[Any]:
    """Encodes new rows without labels, up to all that the model can read.

    Returns:
      For each row an example, or a question, or the `RowError` that says why
      it cannot be answered.
    """
    task = self._task(task)
    if task.kind == "text":  # predicted tokens need labels; answers do not
      return self._encode_questions(task, rows, labelled=False)
    return self._encode_each(task, rows, self.context_length, labelled=False)

  def encode_prompt(
    self,
    task: tasks.Task,
    row: tasks.Row,
    prompt: in_context.Prompt,
    *,
    truncate: bool = False,
    max_length: int | None = None,
  ) -> Any:
    """Encodes one labelled row with another prompt than the task's.

    Args:
      task: gives the options or the answers.
      row: the data.
      prompt: the whole prompt; a chat or text of a format.
      truncate: whether a prompt that does not fit is truncated at the left.
      max_length: longest row with its option, in tokens; None for
        `max_eval_length`. Prompts of generated answers ignore it.

    Returns:
      An example, or a question if the task is answered by generating text.

    Raises:
      TooLongError: it does not fit and is not truncated.
    """
    task = self._task(task)
    if task.kind == "generation":
      question = encode_prompts.encode_question(
        task,
        row,
        self.tokenizer,
        max_length=self.max_prompt_length(),
        version=self.version,
        truncate=truncate,
        prompt=prompt,
      )
      return self._check(question)
    example = encode_options.encode(
      task,
      row,
      self.tokenizer,
      max_length=max_length or self.max_eval_length,
      version=self.version,
      long_rows="truncate" if truncate else "error",
      prompt=prompt,
    )
    return self._check(example)

  def _task(self, task: tasks.Task) -> tasks.Task:
    """Returns the task as the model answers it: by a mask, or by what follows.

    Raises:
      UserError: the task is answered by text, which a mask cannot hold.
    """
    return task.with_mask() if self.fills_mask else task

  def _encode_each(
    self,
    task: tasks.Task,
    rows: Sequence[tasks.Row],
    max_length: int,
    labelled: bool,
  ) -> list[Any]:
    """Encodes all options of rows, or their prompts if text is generated."""
    if task.kind == "generation":
      return self._encode_questions(task, rows, labelled)
    examples = encode_options.encode_each(
      task,
      rows,
      self.tokenizer,
      max_length=max_length,
      version=self.version,
      long_rows=self.long_rows,
      labelled=labelled,
    )
    return self._check_each(examples)

  def _encode_questions(
    self, task: tasks.Task, rows: Sequence[tasks.Row], labelled: bool
  ) -> list[Any]:
    """Encodes the prompts of rows that are answered by generated text."""
    questions = encode_prompts.encode_questions(
      task,
      rows,
      self.tokenizer,
      max_length=self.max_prompt_length(),
      version=self.version,
      truncate=self.truncate,
      labelled=labelled,
    )
    return self._check_each(questions)

  def _check_each(self, items: Sequence[Any]) -> list[Any]:
    """Replaces rows with tokens that the model does not have by errors."""
    checked: list[Any] = []
    for item in items:
      try:
        checked.append(
          item if isinstance(item, errors.RowError) else self._check(item)
        )
      except errors.RowError as error:
        checked.append(error)
    return checked

  def _check(self, item: Any) -> Any:
    """Returns an example or a question, all of whose tokens the model has."""
    if isinstance(item, encode_prompts.Question):
      ids = item.tokens
    else:
      ids = tuple(i for row in item.rows for i in row.tokens)
      ids += tuple(i for row in item.rows for _, i, _ in row.targets)
    tokenizer_lib.check_ids(self.tokenizer, ids, self.vocab_size, item.source)
    return item

  def _splits(self, task: tasks.Task) -> bool:
    """Returns whether rows that do not fit become several."""
    return self.pack and task.may_split


def make_encoder(
  config: ml_collections.ConfigDict, model: model_lib.Model
) -> Encoder:
  """Makes the encoder of a run.

  Args:
    config: the run's config; reads `data`, `loss`, `zo.objective`,
      `generate.max_new_tokens` and the adapters' lengths.
    model: gives the tokenizer and the context.

  Raises:
    UserError: the adapters leave no room in the model's context.
  """
  context = model.module.config.max_length
  num_virtual = defaults.num_virtual(config)
  if num_virtual >= context:
    raise errors.UserError(
      f"config.adapter.kind: '{config.adapter.kind}' takes {num_virtual} "
      f"positions; expected fewer than the model's {context} (prefix.length, "
      "prompt.length)."
    )
  # Some objectives compare the options, whatever the loss.
  all_options = config.zo.objective in objectives.OF_OPTIONS
  return Encoder(
    tokenizer=model.tokenizer,
    vocab_size=model.module.config.vocab_size,
    context_length=context - num_virtual,
    max_length=config.data.max_length,
    max_new_tokens=config.generate.max_new_tokens,
    mode="classification" if all_options else config.loss,
    version=config.data.template,
    long_rows=config.data.long_rows,
    bad_rows=bad_rows_lib.BadRows(config.data.bad_rows),
    pack=config.data.pack,
    fills_mask=not model.module.config.causal,
  )
