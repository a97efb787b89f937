"""A trace of a few iterations, for TensorBoard, XProf or Perfetto.

`config.train.profile_steps` says how many; the first iterations of a process
are left out, so that what is seen is the steady state.
"""

import contextlib
from typing import Any, Self

import jax
from etils import epath

# Iterations before the trace begins.
SKIPPED = 2


class Profile:
  """Traces iterations with `jax.profiler`, to be used in a `with` statement."""

  def __init__(self, folder: epath.Path, num_steps: int):
    """Says what to trace; nothing begins yet.

    Args:
      folder: where the trace is written.
      num_steps: how many iterations; 0 for none.
    """
    self._folder, self._num_steps = folder, num_steps
    self._running = False

  def __enter__(self) -> Self:
    """Returns itself."""
    return self

  def __exit__(self, *unused: object) -> None:
    """Ends a trace that is not full."""
    self._stop()

  def of(self, number: int) -> contextlib.AbstractContextManager[Any]:
    """Returns what an iteration is to be done in.

    Args:
      number: of the iteration, from 0 in every process.
    """
    if not self._num_steps:
      return contextlib.nullcontext()
    if number == SKIPPED:
      jax.profiler.start_trace(str(self._folder))
      self._running = True
    elif number == SKIPPED + self._num_steps:
      self._stop()
    return jax.profiler.StepTraceAnnotation("outer", step_num=number)

  def _stop(self) -> None:
    if self._running:
      self._running = False
      jax.profiler.stop_trace()
