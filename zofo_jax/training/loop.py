"""The training loop: steps, and hooks between them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax


class Hook:
  """Something that is done between the steps of a loop; by default nothing.

  A step is counted when it is done: the first has the number 1.
  """

  def before_step(self, step: int) -> None:
    """Called before a step is dispatched.

    Args:
      step: its number.
    """

  def on_info(self, step: int, info: Any) -> None:
    """Called once for each step, with its results on the host.

    That is after the next step was dispatched, so that the device never waits,
    or earlier where a hook needs the state.

    Args:
      step: its number.
      info: what the step returned besides the state, in NumPy arrays.
    """

  def needs_state(self, step: int) -> bool:
    """Returns whether the hooks' `on_state` are to be called after a step.

    It is called on every hook after every step, in order.
    """
    del step
    return False

  def on_state(self, step: int, state: Any) -> None:
    """Called after steps for which any hook needs the state.

    All `on_info` have been called by then, that of this step included.

    Args:
      step: its number.
      state: after it; donated to the next step.
    """


def train_loop(
  state: Any,
  step_fn: Callable[[Any, int], tuple[Any, Any]],
  start: int,
  stop: int,
  hooks: Sequence[Hook],
  flush: Callable[[Any], Any] = lambda state: state,
) -> Any:
  """Takes the steps from `start` to `stop`.

  Args:
    state: after `start` steps.
    step_fn: (state, steps done) -> (state, info); it is not waited for.
    start: how many steps are done.
    stop: how many are done in the end.
    hooks: are called in this order; one that raises ends the loop.
    flush: makes a state ready to be read by hooks; donates it.

  Returns:
    The state after `stop` steps.

  Examples:
    >>> from zofo_jax.training import loop
    >>> class Print(loop.Hook):
    ...   def on_info(self, step, info):
    ...     print(step, info)
    >>> loop.train_loop(0.5, lambda x, _: (x / 2, x), 0, 2, [Print()])
    1 0.5
    2 0.25
    0.125
  """
  pending: tuple[int, Any] | None = None

  def fetch() -> None:
    nonlocal pending
    if pending is None:
      return
    done, info = pending[0], jax.device_get(pending[1])
    pending = None
    for hook in hooks:
      hook.on_info(done, info)

  for step in range(start, stop):
    for hook in hooks:
      hook.before_step(step + 1)
    with jax.profiler.StepTraceAnnotation("outer", step_num=step + 1):
      state, info = step_fn(state, step)  # dispatched, not awaited
    fetch()  # of the step before: the device is busy with this one
    pending = step + 1, info
    # A list, not a generator: some hooks synchronise processes.
    if any([hook.needs_state(step + 1) for hook in hooks]):
      fetch()
      state = flush(state)
      for hook in hooks:
        hook.on_state(step + 1, state)
  fetch()
  return flush(state)
