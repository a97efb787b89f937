"""Hooks of a training run, in the order in which it calls them.

They get functions and numbers, so that each can be used and tested alone.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from zofo_jax import errors
from zofo_jax.core import baselines
from zofo_jax.core.types import BilevelInfo
from zofo_jax.report import memory
from zofo_jax.report import progress as progress_lib
from zofo_jax.training import guards, loop

# Steps of a process before a trace starts, which then shows the steady state.
WARMUP_STEPS = 2


class Clock:
  """Seconds of training: without evaluation, with those before a resumption."""

  def __init__(
    self, seconds: float = 0.0, now: Callable[[], float] = time.monotonic
  ):
    """Starts the clock at a number of seconds."""
    self._now = now
    self._start = now() - seconds
    self._paused_at: float | None = None

  def seconds(self) -> float:
    """Returns the seconds of training so far."""
    if self._paused_at is not None:
      return self._paused_at
    return self._now() - self._start

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Excludes the time of a `with` statement."""
    seconds = self._paused_at = self.seconds()
    try:
      yield
    finally:
      self._paused_at = None
      self._start = self._now() - seconds


class WriteMetrics(loop.Hook):
  """Writes a row of metrics for each step, and shows the progress."""

  def __init__(
    self,
    write: Callable[[dict[str, Any]], None],
    metrics_row: Callable[[int, Any], dict[str, Any]],
    budget: Callable[[int], dict[str, float]],
    clock: Clock,
    progress: progress_lib.Progress,
  ):
    """Initializes the hook.

    Args:
      write: gets the rows.
      metrics_row: (steps done before, info) -> metrics of the step; of these
        `reward` is shown, or `lower_loss` and `upper_loss`.
      budget: (steps done) -> the compute that they used.
      clock: of the training.
      progress: the display.
    """
    self._write, self._metrics_row, self._budget = write, metrics_row, budget
    self._clock, self._progress = clock, progress

  def on_info(self, step: int, info: Any) -> None:
    """Writes the row of a step."""
    row = self._metrics_row(step - 1, info)
    self._write(
      {
        "step": step,
        **row,
        "seconds": self._clock.seconds(),
        **self._budget(step),
        **memory.usage(),
      }
    )
    displayed = {name: row.get(f"{name}_loss") for name in ("lower", "upper")}
    if "reward" in row:
      displayed = {"reward": row["reward"]}
    self._progress.update(
      step, **{name: float(x) for name, x in displayed.items() if x is not None}
    )


class AppendLedger(loop.Hook):
  """Appends each step to the ledger, flushed to disk before its checkpoint."""

  def __init__(self, append: Callable[[int, Any], None]):
    """Initializes the hook with (step, info) -> None."""
    self._append = append

  def on_info(self, step: int, info: Any) -> None:
    """Appends a step."""
    self._append(step, info)


class CheckFinite(loop.Hook):
  """Saves and ends a run that diverges or has too many non-finite steps."""

  def __init__(
    self, guard: guards.Guard, save: Callable[[Any], Any], num_steps: int
  ):
    """Initializes the hook.

    Args:
      guard: decides by the losses of each step.
      save: starts to write a checkpoint of a state.
      num_steps: of the run.
    """
    self._guard, self._save, self._num_steps = guard, save, num_steps
    self._problem = ""

  def on_info(self, step: int, info: Any) -> None:
    """Looks at the losses of a step."""
    del step
    self._problem = self._guard.update(*step_losses(info)) or self._problem

  def needs_state(self, step: int) -> bool:
    """Returns whether the run should end."""
    del step
    return bool(self._problem)

  def on_state(self, step: int, state: Any) -> None:
    """Ends the run if it should end.

    Raises:
      UserError: the run should end; the message says why.
    """
    if self._problem:
      self._save(state)
      raise errors.UserError(
        f"{self._problem}; the run stops at step {step} of {self._num_steps}, "
        "which is saved."
      )


class Evaluate(loop.Hook):
  """Evaluates on the selection rows and saves a checkpoint, every few steps."""

  def __init__(
    self,
    every: int,
    num_steps: int,
    validate: Callable[[Any], tuple[dict[str, float], float]],
    write: Callable[[dict[str, Any]], None],
    save: Callable[[Any, float], Any],
    clock: Clock,
  ):
    """Initializes the hook.

    Args:
      every: steps between evaluations; the last step has one as well.
      num_steps: of the run.
      validate: (state) -> scores on the selection rows, and that by which the
        best checkpoint is chosen.
      write: gets a row of metrics, `selection_*`.
      save: (state, score) -> None; starts to write a checkpoint.
      clock: of the training; paused during an evaluation.
    """
    self._every, self._num_steps, self._clock = every, num_steps, clock
    self._validate, self._write, self._save = validate, write, save

  def needs_state(self, step: int) -> bool:
    """Returns whether there is an evaluation after this step."""
    return step % self._every == 0 or step == self._num_steps

  def on_state(self, step: int, state: Any) -> None:
    """Evaluates and saves, if due."""
    if not self.needs_state(step):
      return
    with self._clock.paused():
      scores, score = self._validate(state)
      row = {f"selection_{name}": value for name, value in scores.items()}
      self._write({"step": step, **row})
      self._save(state, score)


class Preemption(loop.Hook):
  """Saves the state and ends a run after SIGTERM or SIGINT."""

  def __init__(
    self,
    signals: guards.Signals,
    save: Callable[[Any], Any],
    wait: Callable[[], None],
    num_steps: int,
  ):
    """Initializes the hook.

    Args:
      signals: notes them.
      save: starts to write a checkpoint of a state.
      wait: waits until it is written.
      num_steps: of the run; after the last, it ends by itself.
    """
    self._signals, self._num_steps = signals, num_steps
    self._save, self._wait = save, wait
    self._signal: int | None = None

  def needs_state(self, step: int) -> bool:
    """Returns whether there was a signal; in all processes the same."""
    self._signal = self._signals.preemption_requested(step)
    return self._signal is not None

  def on_state(self, step: int, state: Any) -> None:
    """Ends the run if there was a signal.

    Raises:
      errors.InterruptedRun: there was one.
    """
    if self._signal is None or step == self._num_steps:
      return
    self._save(state)
    self._wait()
    raise errors.InterruptedRun(
      self._signal,
      f"at step {step} of {self._num_steps}, which is saved; the same command "
      "resumes the run.",
    )


class Profile(loop.Hook):
  """Traces a few steps with `jax.profiler`, for TensorBoard or Perfetto."""

  def __init__(self, folder: epath.Path, start: int, num_steps: int):
    """Initializes the hook.

    Args:
      folder: where the trace is written.
      start: how many steps are done when this process starts.
      num_steps: how many steps to trace; 0 for none.
    """
    self._folder = folder
    self._first = start + 1 + WARMUP_STEPS if num_steps else -1
    self._end = self._first + num_steps
    self._running = False

  def before_step(self, step: int) -> None:
    """Starts or ends the trace, if due."""
    if step == self._first:
      jax.profiler.start_trace(str(self._folder))
      self._running = True
    elif step == self._end:
      self.close()

  def close(self) -> None:
    """Ends a trace that is still running."""
    if self._running:
      self._running = False
      jax.profiler.stop_trace()


def step_losses(
  info: BilevelInfo | baselines.BaselineInfo,
) -> tuple[list[float], bool]:
  """Returns a step's losses, and whether it was skipped as not finite."""
  losses = [float(loss) for loss in np.ravel(info.upper_loss)]
  if isinstance(info, baselines.BaselineInfo):
    return losses, not all(map(math.isfinite, losses))
  # A guided step has no coefficients.
  skipped = 0 < np.size(info.coefficients) == int(info.num_nonfinite)
  skipped |= not np.all(np.isfinite(info.upper_grad_norm))
  return [*map(float, np.ravel(info.lower_loss)), *losses], skipped
