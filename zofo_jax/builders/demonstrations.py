"""In-context learning: rows with demonstrations before them, and answers."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from zofo_jax import adapters, tasks
from zofo_jax.builders import encoder as encoder_lib
from zofo_jax.builders import run as run_lib
from zofo_jax.evaluation import in_context, results

# One program for each length, however many backbones read it.
_prefill = jax.jit(adapters.prefix_of_tokens, static_argnums=0)


def encode(
  task: tasks.Task,
  encoder: encoder_lib.Encoder,
  demonstrations: Sequence[tasks.Row],
  queries: Sequence[tasks.Row],
  prompts: Sequence[in_context.Prompt] | None = None,
  *,
  separator: str,
  max_length: int | None = None,
) -> list[Any]:
  """Encodes queries with demonstrations before each, as many as fit.

  Args:
    task: gives the prompts and the options.
    encoder: encodes rows and knows how long they may be.
    demonstrations: rows that come with their answers.
    queries: rows to answer.
    prompts: a prompt for each query; None for the task's own.
    separator: text after each demonstration.
    max_length: longest row in tokens, demonstrations and option included; None
      for `encoder.max_eval_length`.

  Returns:
    An example, or a question, for each query.

  Raises:
    UserError: a query does not fit even without demonstrations.
  """
  version = encoder.version
  if prompts is None:
    prompts = [
      task.read_document(row) if task.document else task.prompt(row, version)
      for row in queries
    ]

  def encode_one(row, prompt, truncate):
    return encoder.encode_prompt(
      task, row, prompt, truncate=truncate, max_length=max_length
    )

  return in_context.encode_rows(
    queries,
    prompts,
    [in_context.demonstration(task, row, version) for row in demonstrations],
    encode_one,
    separator=separator,
    truncate=encoder.truncate,
  )


def answer(
  run: run_lib.Run, base: Any, examples: Sequence[Any], label: str
) -> results.Result:
  """Answers rows with a backbone without adapter.

  Demonstrations that all rows begin with are read once.

  Args:
    run: gives the model and the task.
    base: backbone parameters.
    examples: as `encode` returns them.
    label: for the progress display.
  """
  shared, suffixes = in_context.split_shared(examples)
  if not shared or not run.model.module.prefix_acts_as_tokens:
    return run.evaluate(base, {}, examples, label)
  prefix = _prefill(run.model.module, base, np.array(shared, np.int32))
  return run.evaluate(base, prefix, suffixes, label)
