"""Fits a linear probe on a frozen backbone, for comparison.

zofo probe --config=opt:task=rte --workdir=runs/probe
"""

from collections.abc import Sequence
from typing import Any

import ml_collections
from etils import epath

from zofo_jax import errors
from zofo_jax.builders import model
from zofo_jax.builders import run as run_lib
from zofo_jax.checkpoints import inputs, lock
from zofo_jax.commands import arguments as arguments_lib
from zofo_jax.commands import results
from zofo_jax.evaluation import linear_probe as linear_probe_lib
from zofo_jax.models import apply
from zofo_jax.sharding import dispatch


@lock.locked
def linear_probe(
  config: ml_collections.ConfigDict, workdir: str
) -> dict[str, Any]:
  """Fits a logistic regression on the last hidden state before the answer.

  Writes `probe.json` and `probe.jsonl`.

  Args:
    config: the config; `config.probe` is for this command.
    workdir: folder to write into; local or gs://.

  Returns:
    The content of `probe.json`.

  Raises:
    UserError: the task's options are not the same for every row, or something
      in the config or the files is wrong.
  """
  run = run_lib.make_run(config)
  if run.task.kind != "classification":
    raise errors.UserError(
      f"config.data.task: a linear probe needs the same options for every "
      f"row; task {run.task.name} is {run.task.kind}."
    )
  examples = run.load_examples()
  inputs.check(run, epath.Path(workdir), examples.fingerprints)
  train = [*examples.lower, *examples.upper]
  labels = [example.label for example in train]
  if len(set(labels)) < 2:
    raise errors.UserError(
      f"Task {run.task.name}: a linear probe needs rows of two labels at "
      f"least; all {len(train)} have label {labels[0]}."
    )
  base = model.load_base(run.model, run.mesh)
  hidden_fn = dispatch.jit_on_batches(
    apply.make_hidden_fn(run.model.module), run.mesh, 1
  )

  def features(examples):
    # The first position of the first row is the last token of the prompt.
    return linear_probe_lib.hidden_states(
      hidden_fn,
      base,
      examples,
      batch_size=run.batch_sizes.eval,
      pad=run.model.pad,
    )[:, 0, 0]

  test: Any = examples.test  # no questions, in a task with options
  score = linear_probe_lib.fit_logistic(
    features(train),
    labels,
    c=config.probe.c,
    num_options=len(test[0].options),
  )
  result = run.score_predictions(test, score(features(test)))
  figures = {**result.metrics(), **result.intervals()}
  return results.write(run, workdir, "probe", result, figures)


def main(arguments: Sequence[str]) -> None:
  """Runs the command."""
  arguments_lib.run_config(arguments, "probe", __doc__)
