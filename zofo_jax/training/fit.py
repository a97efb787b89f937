"""A training run from its latest checkpoint to its end, of one task or many."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import ml_collections
from etils import epath

from zofo_jax import errors, report
from zofo_jax.builders import run as run_lib
from zofo_jax.checkpoints import inputs, state_store
from zofo_jax.config import defaults
from zofo_jax.core.types import BilevelState
from zofo_jax.report import memory, trackers
from zofo_jax.report import progress as progress_lib
from zofo_jax.training import guards, hooks, loop


@dataclasses.dataclass(frozen=True)
class Step:
  """A jitted step and its arguments, of which it donates the state.

  Attributes:
    jitted: (state, *batch and others) -> (state, info).
    arguments: (state, steps done) -> the arguments of `jitted`.
    finish: (state, steps done, state that `jitted` returned) -> the state.
    flush: makes a state ready to be read; donates it.
  """

  jitted: jax.stages.Wrapped
  arguments: Callable[[Any, int], tuple[Any, ...]]
  finish: Callable[[Any, int, Any], Any] = lambda before, step, after: after
  flush: Callable[[Any], Any] = lambda state: state

  def __call__(self, state: Any, step: int) -> tuple[Any, Any]:
    """Dispatches a step; returns (state, info)."""
    after, info = self.jitted(*self.arguments(state, step))
    return self.finish(state, step, after), info

  def compile(self, state: Any, step: int) -> jax.stages.Compiled:
    """Compiles the program, which the first call then finds."""
    return self.jitted.lower(*self.arguments(state, step)).compile()


def fit(
  config: ml_collections.ConfigDict,
  folder: epath.Path,
  store: state_store.Store,
  step: Step,
  *,
  init: Callable[[], tuple[BilevelState, dict[str, Any]]],
  metrics_row: Callable[[int, Any], dict[str, Any]],
  budget: Callable[[int], dict[str, float]],
  validate: Callable[[BilevelState], tuple[dict[str, float], float]],
  logs: Sequence[report.JsonlWriter] = (),
) -> tuple[BilevelState, dict[str, Any]]:
  """Trains from the latest checkpoint, if there is one, to the end.

  Args:
    config: the run's config, which `run_folder.check_config` has passed.
    folder: of the run.
    store: its states, opened to be written.
    step: the step.
    init: () -> the state before the first step, and figures for the summary.
    metrics_row: (steps done before, info on the host) -> metrics of a step.
    budget: (steps done) -> the compute that they used.
    validate: (state) -> scores on the selection rows, and that by which the
      best checkpoint is chosen.
    logs: other files whose rows have a step.

  Returns:
    The best state on the selection rows, and the run's metadata: the figures of
    `init`, `seconds` and `compile_seconds` of training, `program_bytes`.

  Raises:
    UserError: something cannot be written, or the run diverged.
    errors.InterruptedRun: SIGTERM or SIGINT came.
  """
  options = config.train
  # A run resumes in this order:
  # 1. The store reads the latest valid checkpoint, puts corrupt ones aside,
  #    and cuts the ledger back to it.
  # 2. metrics.jsonl and other logs lose the rows of later steps, which are
  #    done again.
  # 3. The config and the inputs are written, and trackers are opened at the
  #    checkpoint's step.
  # 4. The clock and the guard continue from the checkpoint's metadata.
  # 5. The step is compiled; batches are a function of the step's number.
  writer = report.JsonlWriter(folder / "metrics.jsonl")
  resumed = store.resume()
  for log in (writer, *logs):
    log.truncate_after(-1 if resumed is None else int(resumed[0].step))
  if resumed is None:
    state, figures = init()
    run_metadata = {**figures, "seconds": 0.0, "guard": {}}
    store.start_ledger(state)
  else:
    state, run_metadata = resumed
  start, stop = int(state.step), options.num_steps
  saved_config = run_lib.saved_config(config.to_dict())
  report.write_json(folder / "config.json", saved_config)
  report.write_json(folder / inputs.FILE, store.inputs)
  guard = guards.Guard(
    run_metadata["guard"],
    max_nonfinite=options.max_nonfinite,
    max_loss_ratio=options.max_loss_ratio,
  )
  tracker = trackers.Trackers(
    options.trackers, folder, defaults.flat(config), start
  )
  profile = hooks.Profile(folder / "profile", start, options.profile_steps)
  with (
    writer,
    tracker,
    contextlib.closing(profile),
    guards.Signals() as signals,
    progress_lib.Progress(stop, start=start) as progress,
  ):
    if start < stop:
      run_metadata |= _compile(step, state, start, run_metadata)
    clock = hooks.Clock(run_metadata["seconds"])

    def write(row):
      writer.write(row)
      tracker.write(row)

    def save(state, score=-float("inf")):
      run_metadata.update(seconds=clock.seconds(), guard=guard.state)
      store.save(state, run_metadata, score)

    state = loop.train_loop(
      state,
      step,
      start,
      stop,
      [
        profile,
        hooks.WriteMetrics(write, metrics_row, budget, clock, progress),
        hooks.AppendLedger(store.append),
        hooks.CheckFinite(guard, save, stop),
        hooks.Evaluate(
          options.eval_every_steps, stop, validate, write, save, clock
        ),
        hooks.Preemption(signals, save, store.wait, stop),
      ],
      step.flush,
    )
  store.wait()
  if store.checkpoints.best_step() != int(state.step):
    del state  # one backbone at a time
    state, _ = store.best()
  return state, run_metadata


def _compile(step, state, number, run_metadata) -> dict[str, Any]:
  """Compiles a step; returns its size and all time of compilation so far."""
  start = time.monotonic()
  program = step.compile(state, number)
  seconds = time.monotonic() - start
  return {
    "program_bytes": memory.program_bytes(program),
    "compile_seconds": run_metadata.get("compile_seconds", 0.0) + seconds,
  }


@contextlib.contextmanager
def write_errors(folder: epath.Path) -> Iterator[None]:
  """Turns an error of the file system into one sentence.

  Raises:
    UserError: in the place of an OSError.
  """
  try:
    yield
  except OSError as error:
    raise errors.UserError(
      f"{error.filename or folder} cannot be written to "
      f"({error.strerror or errors.first_line(error)}); earlier checkpoints "
      "are unchanged."
    ) from error
