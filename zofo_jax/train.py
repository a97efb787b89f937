"""Trains a run: its iterations, and the results at its end.

The one program of an outer iteration is jitted here.
"""

from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from zofo_jax import (
  algorithms,
  backbone,
  batches,
  bilevel,
  experiment,
  loop,
  processes,
  report,
  runs,
)
from zofo_jax import progress as progress_lib
from zofo_jax import store as store_lib


def passes(config: ml_collections.ConfigDict) -> tuple[int, int]:
  """Counts an iteration's (forward, backward) passes over one batch.

  The penalised objective is three losses. Directions of a batch's examples
  count as one; a conservative update evaluates the objective three times more.
  """
  estimator = algorithms.ESTIMATORS[config.zo.estimator]
  per_example = config.zo.direction == "per_example"
  num_directions = 1 if per_example else config.zo.num_directions
  points = estimator.shared + num_directions * estimator.evaluations
  points += 3 * (config.zo.optimizer == "conservative")
  inner_steps = config.lower.num_steps
  return inner_steps + 2 + 3 * points, inner_steps + 2


def iteration_batch(
  config: ml_collections.ConfigDict,
  examples: experiment.Examples,
  shape: batches.Shape,
  pad: int,
  step: int,
) -> bilevel.BilevelBatch:
  """Returns the rows of an outer iteration: a pure function of its number."""

  def batch(pool, seed, size, index):
    chosen = batches.batch_indices(seed, len(pool), size, index)
    return batches.collate([pool[i] for i in chosen], shape, pad=pad)

  # Three streams: the inner rows and the penalty's both come from D_p.
  num_inner, seed = config.lower.num_steps, 3 * config.seed
  lower = [
    batch(
      examples.lower, seed, config.lower.batch_size, step * num_inner + index
    )
    for index in range(num_inner)
  ]
  size = config.upper.batch_size
  return bilevel.BilevelBatch(
    lower=jax.tree.map(lambda *leaves: np.stack(leaves), *lower),
    penalty=batch(examples.lower, seed + 1, size, step),
    upper=batch(examples.upper, seed + 2, size, step),
  )


def train(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
  """Trains a run to its end, from its latest checkpoint if there is one.

  Args:
    config: the run's config.
    workdir: folder of the run; local or gs://.

  Returns:
    What is written to `summary.json`.

  Raises:
    UserError: something in the config, the files or `workdir` is wrong, or
      the run went wrong.
    guards.InterruptedRun: SIGTERM or SIGINT came.
  """
  folder = epath.Path(workdir)
  with processes.together():
    run = runs.make_run(config)
    store_lib.check_config(config, folder)
    examples = experiment.load_examples(config, run.model, run.task)
    store_lib.make_folder(folder / "checkpoints")
  state, record = loop.run(run, folder, _work(run, examples))
  return _finish(run, examples, state, record, folder)


def health(info: bilevel.BilevelInfo) -> tuple[list[float], bool]:
  """Returns an iteration's losses, and whether no direction was finite."""
  losses = [*np.ravel(info.lower_loss), *np.ravel(info.upper_loss)]
  dropped = int(info.num_nonfinite) == np.size(info.coefficients)
  return [float(loss) for loss in losses], dropped


def _work(run: runs.Run, examples: experiment.Examples) -> loop.Work:
  """Says what the loop does."""
  config = run.config
  step_fn = run.jit_step()
  hparams = algorithms.make_hparams(config)
  shape = experiment.train_shape(examples)

  def start():
    base = backbone.load_base(config, run.model, run.mesh)
    state = run.init(base, backbone.load_adapter(config, run.model))
    zero_shot = run.evaluate(state.base, {}, examples.test, "zero-shot")
    return state, {"zero_shot": zero_shot.worth()}

  def step(state, number):
    batch = iteration_batch(config, examples, shape, run.model.pad, number)
    return step_fn(state, run.put(batch), hparams)

  def told(_, info):
    row = info._asdict() | {"lower_loss": float(info.lower_loss.mean())}
    del row["move"]  # the ledger's
    return row

  def select(state):
    result = run.evaluate(
      state.base, state.upper, examples.selection, "selection"
    )
    worth = result.worth()
    return worth, worth[run.task.metric]

  return loop.Work(
    start=start,
    step=step,
    told=told,
    health=health,
    select=select,
    passes=passes(config),
  )


def _finish(run, examples, state, record, folder) -> dict[str, Any]:
  """Tests p and s, and writes the table, the picture and the summary."""
  config = run.config
  worth = {"zero_shot": record["zero_shot"]}
  for name, adapter in (("test", state.upper), ("test_s", state.lower)):
    result = run.evaluate(state.base, adapter, examples.test, name)
    worth[name] = result.worth()
  forward, backward = passes(config)
  num_steps = config.train.num_steps
  summary: dict[str, Any] = {
    "task": run.task.name,
    "model": config.model.name,
    **{f"zero_shot_{k}": v for k, v in worth["zero_shot"].items()},
    **{f"test_{k}": v for k, v in worth["test"].items()},
    **{f"test_{k}_s": v for k, v in worth["test_s"].items()},
    "num_test_rows": len(examples.test),
    "best_step": int(state.step),
    "num_outer_steps": num_steps,
    "num_inner_steps": num_steps * config.lower.num_steps,
    "forward_passes": forward * num_steps,
    "backward_passes": backward * num_steps,
    "nonfinite_steps": record["guard"].get("nonfinite", 0),
    "train_seconds": record["seconds"],
    "peak_rss_bytes": progress_lib.peak_rss_bytes(),
  }
  report.write_json(folder / "summary.json", summary)
  report.plot_curves(folder / "metrics.jsonl", folder / "curves.png")
  report.results_table(
    [
      {"model": "zero-shot", **worth["zero_shot"]},
      {"model": "adapter p, kept", **worth["test"]},
      {"model": "adapter s, auxiliary", **worth["test_s"]},
    ],
    title=f"{run.task.name}: {len(examples.test)} test rows, never trained on",
  )
  if processes.is_first():
    print(
      f"In {folder}: summary.json, metrics.jsonl, curves.png, checkpoints/."
    )
  return summary
