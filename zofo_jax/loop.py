"""The outer loop of a run: its iterations, metrics and checkpoints."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
from etils import epath

from zofo_jax import bilevel, checkpoint, errors, report, runs
from zofo_jax import config as config_lib
from zofo_jax import progress as progress_lib


class Work(NamedTuple):
  """What the loop calls.

  Attributes:
    start: () -> the state at step 0, and figures to remember.
    abstract_state: () -> the shapes of a state.
    step: (state, number of the iteration) -> (state, info), not waited for.
    told: (number of the iteration, info on the host) -> what `metrics.jsonl`
      is told; `lower_loss` and `upper_loss` are shown.
    select: (state) -> what the selection rows say, and its worth: a checkpoint
      of the highest is kept.
    passes: an iteration's (forward, backward) passes over one batch.
  """

  start: Callable[[], tuple[bilevel.BilevelState, dict[str, Any]]]
  abstract_state: Callable[[], bilevel.BilevelState]
  step: Callable[[bilevel.BilevelState, int], tuple[bilevel.BilevelState, Any]]
  told: Callable[[int, Any], dict[str, Any]]
  select: Callable[[bilevel.BilevelState], tuple[dict[str, float], float]]
  passes: tuple[int, int]


def run(
  config: ml_collections.ConfigDict, folder: epath.Path, work: Work
) -> tuple[bilevel.BilevelState, dict[str, Any]]:
  """Runs to the end, from the latest checkpoint if there is one.

  Args:
    config: the run's config; `check_same_config` has passed it.
    folder: of the run.
    work: what is done.

  Returns:
    The best state on the selection rows, and what is remembered: what `start`
    gave, and `seconds` of training.

  Raises:
    UserError: the folder cannot be made.
  """
  _make_folder(folder / "checkpoints")
  with checkpoint.Checkpoints(
    folder / "checkpoints", keep=config.ckpt.keep
  ) as checkpoints:
    writer = report.JsonlWriter(folder / "metrics.jsonl")
    if checkpoints.latest_step() is None:
      writer.truncate_after(-1)
      state, record = work.start()
      record["seconds"] = 0.0
    else:
      state, record = checkpoints.restore(work.abstract_state())
      writer.truncate_after(int(state.step))
    report.write_json(folder / "config.json", config.to_dict())
    with writer:
      state = _iterate(config, work, state, record, writer, checkpoints)
    checkpoints.wait()
    best = checkpoints.best_step()
    if best != int(state.step):
      del state  # one backbone at a time
      state, _ = checkpoints.restore(work.abstract_state(), best)
  return state, record


def _iterate(config, work, state, record, writer, checkpoints):
  """Takes the remaining outer iterations; returns the state."""
  start, total = int(state.step), config.train.num_steps
  forward, backward = work.passes
  began = time.monotonic() - record["seconds"]
  pending: tuple[int, Any] | None = None
  with progress_lib.Progress(total, start=start) as progress:

    def flush():
      # Metrics are fetched one step late, so the device never waits for us.
      nonlocal pending
      if pending is None:
        return
      step, info = pending[0], jax.device_get(pending[1])
      pending = None
      row = work.told(step - 1, info)
      writer.write(
        {
          "step": step,
          **row,
          "seconds": time.monotonic() - began,
          "forward_passes": forward * step,
          "backward_passes": backward * step,
          "rss_bytes": progress_lib.rss_bytes(),
        }
      )
      shown = {name: row.get(f"{name}_loss") for name in ("lower", "upper")}
      progress.update(
        step, **{name: float(v) for name, v in shown.items() if v is not None}
      )

    for step in range(start, total):
      state, info = work.step(state, step)
      flush()
      pending = (step + 1, info)
      if (step + 1) % config.train.eval_every_steps == 0 or step + 1 == total:
        flush()
        record["seconds"] = time.monotonic() - began
        found, worth = work.select(state)
        scores = {f"selection_{name}": v for name, v in found.items()}
        writer.write({"step": step + 1, **scores})
        checkpoints.save(step + 1, state, record, metric=worth)
        # Evaluation is no part of the training time.
        began = time.monotonic() - record["seconds"]
  return state


def _make_folder(folder: epath.Path) -> None:
  """Makes a folder in a run's, unless it is there."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise errors.UserError(
      f"--workdir: {folder} cannot be made ({error.strerror}); expected a "
      "folder to write into."
    ) from error


def check_same_config(
  config: ml_collections.ConfigDict, folder: epath.Path
) -> None:
  """Stops before a run goes on under another config than it began with.

  Raises:
    UserError: says what changed.
  """
  path = folder / "config.json"
  if not path.exists():
    return
  before = config_lib.flat(runs.read_config(folder))
  now = config_lib.flat(config)
  changed = [
    f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
    for name in sorted(before.keys() | now.keys())
    if before.get(name) != now.get(name)
  ]
  if changed:
    raise errors.UserError(
      f"{path} is of a run with another config: {'; '.join(changed[:5])}"
      f"{' and more' if len(changed) > 5 else ''}. Give another --workdir, or "
      "remove this one."
    )
