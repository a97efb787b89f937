"""Trains the language model's head alone, for comparison.

zofo head --config=opt:task=rte --workdir=runs/head
"""

from collections.abc import Sequence
from typing import Any

import ml_collections
from etils import epath

from zofo_jax import errors
from zofo_jax.builders import model, optimizers
from zofo_jax.builders import run as run_lib
from zofo_jax.checkpoints import inputs, lock
from zofo_jax.commands import arguments as arguments_lib
from zofo_jax.commands import results
from zofo_jax.evaluation import head_tuning, linear_probe, scoring
from zofo_jax.models import apply
from zofo_jax.sharding import dispatch


@lock.locked
def head(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
  """Trains rows of the head by Adam, on a frozen backbone.

  A head that is tied to the embedding is untied. Writes
  `head.json` and `head.jsonl`.

  Args:
    config: the config; `config.head` is for this command.
    workdir: folder to write into; local or gs://.

  Returns:
    The content of `head.json`.

  Raises:
    UserError: the task has no options, or something in the config or the files
      is wrong.
  """
  run = run_lib.make_run(config)
  if run.generate_fn is not None:
    raise errors.UserError(
      f"config.data.task: the head is trained on options; task {run.task.name} "
      "is answered by generating text."
    )
  examples = run.load_examples()
  inputs.check(run, epath.Path(workdir), examples.fingerprints)
  train = [*examples.lower, *examples.upper]
  base = model.load_base(run.model, run.mesh)
  module = run.model.module
  hidden_fn = dispatch.jit_on_batches(apply.make_hidden_fn(module), run.mesh, 1)
  hidden = linear_probe.hidden_states(
    hidden_fn,
    base,
    train,
    batch_size=run.batch_sizes.eval,
    pad=run.model.pad,
  )
  table = apply.head_table(module, base)
  tokens = (
    None if config.head.rows == "all" else head_tuning.label_tokens(train)
  )
  trained = head_tuning.train_rows(
    table,
    tokens,
    train,
    hidden,
    reduce_fn=model.LOSSES[config.loss],
    tx=optimizers.make_optimizer("adam", config.head.learning_rate),
    num_steps=config.head.num_steps,
    batch_size=config.head.batch_size,
    seed=config.seed,
    pad=run.model.pad,
    output=apply.head_output(module, base),
  )
  untied, base = apply.untie(
    module, base, head_tuning.with_head_rows(table, tokens, trained)
  )
  score_fn = dispatch.jit_on_batches(
    scoring.make_score_fn(apply.make_log_probs_fn(untied)), run.mesh, 2
  )
  result = run.evaluate(base, {}, examples.test, "test", score_fn=score_fn)
  figures = {**result.metrics(), **result.intervals()}
  return results.write(run, workdir, "head", result, figures)


def main(arguments: Sequence[str]) -> None:
  """Runs the command."""
  arguments_lib.run_config(arguments, "head", __doc__)
