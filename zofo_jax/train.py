"""Trains a run: the loop, its checkpoints, and the results at its end.

The one program of an outer iteration is jitted here.
"""

import time
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from zofo_jax import (
  backbone,
  batches,
  bilevel,
  checkpoint,
  errors,
  experiment,
  processes,
  report,
  runs,
)
from zofo_jax import config as config_lib
from zofo_jax import progress as progress_lib


def passes(config: ml_collections.ConfigDict) -> tuple[int, int]:
  """Counts an iteration's (forward, backward) passes over one batch.

  The penalised objective is three losses. Directions of a batch's examples
  count as one; a conservative update evaluates the objective three times more.
  """
  estimator = runs.ESTIMATORS[config.zo.estimator]
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
    UserError: something in the config, the files or `workdir` is wrong.
  """
  folder = epath.Path(workdir)
  with processes.together():
    run = runs.make_run(config)
    _check_same_config(config, folder)
    examples = experiment.load_examples(config, run.model, run.task)
    _make_folder(folder / "checkpoints")
  with checkpoint.Checkpoints(
    folder / "checkpoints", keep=config.ckpt.keep
  ) as checkpoints:
    writer = report.JsonlWriter(folder / "metrics.jsonl")
    if checkpoints.latest_step() is None:
      writer.truncate_after(-1)
      state = run.init(backbone.load_base(config, run.model, run.mesh))
      zero_shot = run.evaluate(state.base, {}, examples.test, "zero-shot")
      record = {"seconds": 0.0, "zero_shot": zero_shot.worth()}
    else:
      state, record = checkpoints.restore(run.abstract_state())
      writer.truncate_after(int(state.step))
    report.write_json(folder / "config.json", config.to_dict())
    with writer:
      state, record = _loop(run, examples, state, record, writer, checkpoints)
    checkpoints.wait()
    best = checkpoints.best_step()
    if best != int(state.step):
      del state  # one backbone at a time
      state, _ = checkpoints.restore(run.abstract_state(), best)
    summary = _finish(run, examples, state, record, folder)
  return summary


def _loop(run, examples, state, record, writer, checkpoints):
  """Takes the remaining outer iterations; returns the state and the record."""
  config = run.config
  step_fn = run.jit_step()
  hparams = bilevel.BilevelHParams(
    zo_eps=float(config.zo.eps), penalty=float(config.penalty)
  )
  shape = experiment.train_shape(examples)
  start, total = int(state.step), config.train.num_steps
  forward, backward = passes(config)
  began = time.monotonic() - record["seconds"]
  pending: tuple[int, bilevel.BilevelInfo] | None = None
  with progress_lib.Progress(total, start=start) as progress:

    def flush():
      # Metrics are fetched one step late, so the device never waits for us.
      nonlocal pending
      if pending is None:
        return
      step, info = pending[0], jax.device_get(pending[1])
      pending = None
      lower_loss = float(info.lower_loss.mean())
      writer.write(
        {
          "step": step,
          "lower_loss": lower_loss,
          **{k: v for k, v in info._asdict().items() if k != "lower_loss"},
          "seconds": time.monotonic() - began,
          "forward_passes": forward * step,
          "backward_passes": backward * step,
          "rss_bytes": progress_lib.rss_bytes(),
        }
      )
      progress.update(step, lower=lower_loss, upper=float(info.upper_loss))

    for step in range(start, total):
      batch = iteration_batch(config, examples, shape, run.model.pad, step)
      state, info = step_fn(state, run.put(batch), hparams)
      flush()
      pending = (step + 1, info)
      if (step + 1) % config.train.eval_every_steps == 0 or step + 1 == total:
        flush()
        record["seconds"] = time.monotonic() - began
        result = run.evaluate(
          state.base, state.upper, examples.selection, "selection"
        )
        scores = {
          f"selection_{name}": value for name, value in result.worth().items()
        }
        writer.write({"step": step + 1, **scores})
        checkpoints.save(
          step + 1,
          state,
          record,
          metric=scores[f"selection_{run.task.metric}"],
        )
        # Evaluation is no part of the training time.
        began = time.monotonic() - record["seconds"]
  return state, record


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


def _make_folder(folder: epath.Path) -> None:
  """Makes a folder in a run's, unless it is there."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise errors.UserError(
      f"--workdir: {folder} cannot be made ({error.strerror}); expected a "
      "folder to write into."
    ) from error


def _check_same_config(
  config: ml_collections.ConfigDict, folder: epath.Path
) -> None:
  """Stops before a run goes on under another config than it began with.

  It may go on on another mesh.
  """
  path = folder / "config.json"
  if not path.exists():
    return
  before = config_lib.flat(runs.read_config(folder))
  now = config_lib.flat(config)
  changed = [
    f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
    for name in sorted(before.keys() | now.keys())
    if before.get(name) != now.get(name) and not name.startswith("mesh.")
  ]
  if changed:
    raise errors.UserError(
      f"{path} is of a run with another config: {'; '.join(changed[:5])}"
      f"{' and more' if len(changed) > 5 else ''}. Give another --workdir, or "
      "remove this one."
    )
