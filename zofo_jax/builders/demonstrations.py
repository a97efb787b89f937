"""A run's rows with demonstrations before each, and what a backbone answers."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from zofo_jax import adapters, tasks
from zofo_jax.builders import data
from zofo_jax.builders import run as run_lib
from zofo_jax.data import encode_options, encode_prompts
from zofo_jax.evaluation import in_context, scoring

# One program for each length, however many backbones read it.
_read = jax.jit(adapters.prefix_of_tokens, static_argnums=0)


def encode_shown(
  run: run_lib.Run,
  shown: Sequence[tasks.Row],
  asked: Sequence[tasks.Row],
  prompts: Sequence[str] | None = None,
  *,
  max_length: int | None = None,
) -> list[Any]:
  """Encodes rows with demonstrations before each, as many as fit.

  Args:
    run: gives the task, the tokenizer and `config.icl.separator`.
    shown: rows that are shown with their answers.
    asked: rows to be answered.
    prompts: what is asked of each; the task's own prompts by default.
    max_length: tokens, demonstrations and option included; by default what
      one row may have.

  Returns:
    An example, or a question, for each of `asked`.

  Raises:
    UserError: a row does not fit even without demonstrations.
  """
  config, task, version = run.config, run.task, run.config.data.template
  if prompts is None:
    prompts = [task.prompt(row, version) for row in asked]

  def encode_one(row, prompt, truncate):
    if run.generate_fn is not None:
      return encode_prompts.encode_question(
        task,
        row,
        run.model.tokenizer,
        max_length=data.question_length(config, run.model),
        version=version,
        truncate=truncate,
        prompt=prompt,
      )
    return encode_options.encode(
      task,
      row,
      run.model.tokenizer,
      max_length=max_length or data.max_eval_length(config, run.model),
      version=version,
      long_rows="truncate" if truncate else "error",
      prompt=prompt,
    )

  return in_context.encode_rows(
    asked,
    prompts,
    [in_context.demonstration(task, row, version) for row in shown],
    encode_one,
    separator=config.icl.separator,
    truncate=config.data.long_rows == "truncate",
  )


def answer(
  run: run_lib.Run, base: Any, examples: Sequence[Any], label: str
) -> scoring.Result:
  """Answers rows; demonstrations that all of them begin with are read once.

  Args:
    run: gives the model and the task.
    base: the backbone; no adapter takes part.
    examples: as `encode_shown` gives them.
    label: for the progress display.
  """
  shared, rest = in_context.split_shared(examples)
  if not shared or not run.model.module.prefix_acts_as_tokens:
    return run.evaluate(base, {}, examples, label)
  prefix = _read(run.model.module, base, np.array(shared, np.int32))
  return run.evaluate(base, prefix, rest, label)
