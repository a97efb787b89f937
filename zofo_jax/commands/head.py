"""Trains the language model's head alone, for comparison.

zofo head --config=opt:task=rte --workdir=runs/head
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from zofo_jax import errors
from zofo_jax.builders import algorithm, data, model
from zofo_jax.builders import run as run_lib
from zofo_jax.commands import arguments as arguments_lib
from zofo_jax.commands import results
from zofo_jax.core import losses
from zofo_jax.data import batching
from zofo_jax.evaluation import linear_probe, scoring
from zofo_jax.models import apply
from zofo_jax.report import progress as progress_lib
from zofo_jax.sharding import dispatch


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
  examples = data.load_examples(config, run.model, run.task)
  train = [*examples.lower, *examples.upper]
  base = model.load_base(config, run.model, run.mesh)
  module = run.model.module
  hidden_fn = dispatch.jit_on_batches(apply.make_hidden_fn(module), run.mesh, 1)
  hidden = linear_probe.hidden_states(
    hidden_fn,
    base,
    train,
    batch_size=config.eval.batch_size,
    pad=run.model.pad,
  )
  table = apply.head_table(module, base)
  tokens = (
    None if config.head.rows == "all" else linear_probe.label_tokens(train)
  )
  trained = _train_head(run, table, tokens, train, hidden)
  untied, base = apply.untie(
    module, base, linear_probe.with_head_rows(table, tokens, trained)
  )
  score_fn = dispatch.jit_on_batches(
    scoring.make_score_fn(apply.make_log_probs_fn(untied)), run.mesh, 2
  )
  result = run.evaluate(base, {}, examples.test, "test", score_fn=score_fn)
  figures = {**result.metrics(), **result.intervals()}
  return results.write(run, workdir, "head", result, figures)


def _train_head(run, table, tokens, train, hidden):
  """Runs the steps of `config.head`; returns the trained rows, float32."""
  config = run.config
  loss_fn = {
    "likelihood": losses.likelihood,
    "classification": losses.classification,
  }[config.loss]
  tx = algorithm.make_optimizer("adam", config.head.learning_rate)
  table = jnp.asarray(table, jnp.float32)
  trained = table if tokens is None else table[tokens]
  opt_state = tx.init(trained)
  step_fn = jax.jit(
    linear_probe.make_head_step(loss_fn, tx, tokens), donate_argnums=(0, 1)
  )
  if tokens is None:
    # The step donates one and reads the other: they must be two arrays.
    trained = jnp.array(trained, copy=True)
  shape = batching.shape_of(train)
  total = config.head.num_steps
  with progress_lib.Progress(total, "head") as progress:
    for step in range(total):
      chosen = batching.batch_indices(
        config.seed, len(train), config.head.batch_size, step
      )
      batch = batching.collate(
        [train[i] for i in chosen], shape, pad=run.model.pad
      )
      trained, opt_state, loss = step_fn(
        trained, opt_state, table, hidden[chosen], batch
      )
      if (step + 1) % 20 == 0 or step + 1 == total:
        progress.update(step + 1, loss=float(loss))
  return trained


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Runs the command on a config."""
  head(config, workdir)


def main(arguments: Sequence[str]) -> None:
  """Runs the command."""
  arguments_lib.run_config(arguments, "head", __doc__)
