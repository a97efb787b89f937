"""The outer loop of a run: its iterations, metrics, checkpoints and ledger."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from etils import epath

from zofo_jax import errors, report
from zofo_jax.checkpoints import state_store
from zofo_jax.config import defaults
from zofo_jax.core.types import BilevelState
from zofo_jax.report import profiler, trackers
from zofo_jax.report import progress as progress_lib
from zofo_jax.training import guards


class Work(NamedTuple):
  """What the loop calls.

  Attributes:
    start: () -> the state at step 0, and figures to remember.
    compile: (state, number of the iteration) -> `step`'s program, which its
      first call finds; the training time is without it.
    step: (state, number of the iteration) -> (state, info), not waited for.
    told: (number of the iteration, info on the host) -> what `metrics.jsonl`
      is told; `lower_loss` and `upper_loss` are shown.
    health: (info on the host) -> what `guards.Guard.update` looks at: the
      losses, and whether no direction was finite.
    select: (state) -> what the selection rows say, and its scores: a checkpoint
      of the highest is kept.
    spent: (number of iterations) -> what they cost; see `budget`.
  """

  start: Callable[[], tuple[BilevelState, dict[str, Any]]]
  compile: Callable[[BilevelState, int], jax.stages.Compiled]
  step: Callable[[BilevelState, int], tuple[BilevelState, Any]]
  told: Callable[[int, Any], dict[str, Any]]
  health: Callable[[Any], tuple[list[float], bool]]
  select: Callable[[BilevelState], tuple[dict[str, float], float]]
  spent: Callable[[int], dict[str, float]]


def run(
  trained: state_store.Trained, folder: epath.Path, work: Work
) -> tuple[BilevelState, dict[str, Any]]:
  """Runs to the end, from the latest checkpoint if there is one.

  Args:
    trained: a run whose config `store.check_config` has passed.
    folder: of the run.
    work: what is done.

  Returns:
    The best state on the selection rows, and what is remembered: what `start`
    gave, and `seconds` of training.

  Raises:
    UserError: something cannot be written, or the run went wrong.
    guards.InterruptedRun: SIGTERM or SIGINT came.
  """
  state_store.make_folder(folder / "checkpoints")
  try:
    with state_store.Store(trained, folder, write=True) as store:
      return _run(trained, folder, work, store)
  except OSError as error:
    raise errors.UserError(
      f"{error.filename or folder} cannot be written to "
      f"({error.strerror or errors.first_line(error)}); what was saved before "
      "is as it was."
    ) from error


def _run(trained, folder, work, store):
  """Goes on from the latest checkpoint, or from the beginning."""
  writer = report.JsonlWriter(folder / "metrics.jsonl")
  options = trained.config.train
  resumed = store.resume()
  if resumed is None:
    writer.truncate_after(-1)
    state, record = work.start()
    record |= {"seconds": 0.0, "guard": {}}
    store.start_ledger(state)
  else:
    state, record = resumed
    writer.truncate_after(int(state.step))
  state_store.write_config(trained.config, folder)
  told = trackers.Trackers(
    options.trackers,
    folder,
    defaults.flat(trained.config),
    int(state.step),
  )

  def write(row):
    writer.write(row)
    told.write(row)

  profile = profiler.Profile(folder / "profile", options.profile_steps)
  with writer, told, profile, guards.Signals() as signals:
    state = _iterate(
      trained, work, state, record, write, store, signals, profile
    )
  store.wait()
  if store.checkpoints.best_step() != int(state.step):
    del state  # one backbone at a time
    state, _ = store.best()
  return state, record


def _iterate(trained, work, state, record, write, store, signals, profile):
  """Takes the remaining outer iterations; returns the state."""
  options = trained.config.train
  guard = guards.Guard(
    record["guard"],
    max_nonfinite=options.max_nonfinite,
    max_loss_ratio=options.max_loss_ratio,
  )
  start, total = int(state.step), options.num_steps
  if start < total:
    began = time.monotonic()
    program = work.compile(state, start)
    record["program_bytes"] = progress_lib.program_bytes(program)
    compiling = record.get("compile_seconds", 0.0)
    record["compile_seconds"] = compiling + time.monotonic() - began
  began = time.monotonic() - record["seconds"]
  pending: tuple[int, Any] | None = None
  with progress_lib.Progress(total, start=start) as progress:

    def flush() -> str:
      # Metrics are fetched one step late, so the device never waits for us.
      nonlocal pending
      if pending is None:
        return ""
      step, info = pending[0], jax.device_get(pending[1])
      pending = None
      row = work.told(step - 1, info)
      write(
        {
          "step": step,
          **row,
          "seconds": time.monotonic() - began,
          **work.spent(step),
          **progress_lib.memory(),
        }
      )
      store.append(step, info)
      shown = {name: row.get(f"{name}_loss") for name in ("lower", "upper")}
      progress.update(
        step, **{name: float(v) for name, v in shown.items() if v is not None}
      )
      return guard.update(*work.health(info))

    def save(**options: Any) -> None:
      record["guard"] = guard.state
      store.save(state, record, **options)

    for step in range(start, total):
      with profile.of(step - start):
        state, info = work.step(state, step)
      problem, number = flush(), signals.preemption_requested(step)
      pending = (step + 1, info)
      evaluates = (step + 1) % options.eval_every_steps == 0
      evaluates = evaluates or step + 1 == total
      if problem or number or evaluates:
        problem = flush() or problem
        record["seconds"] = time.monotonic() - began
      if problem:
        save()
        raise errors.UserError(
          f"{problem}; the run stops at step {step + 1} of {total}, which is "
          "saved."
        )
      if evaluates:
        found, metric = work.select(state)
        scores = {f"selection_{name}": v for name, v in found.items()}
        write({"step": step + 1, **scores})
        save(metric=metric)
        # Evaluation is no part of the training time.
        began = time.monotonic() - record["seconds"]
      if number and step + 1 < total:
        save()
        store.wait()
        raise guards.InterruptedRun(
          number,
          f"at step {step + 1} of {total}, which is saved; the same command "
          "goes on from there.",
        )
  return state
