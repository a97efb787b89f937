"""The loop's order of calls, and each hook alone."""

import signal

import jax.numpy as jnp
import numpy as np
import pytest

from zofo_jax import errors
from zofo_jax.core import baselines
from zofo_jax.core.types import BilevelInfo
from zofo_jax.training import guards, hooks, loop


class Record(loop.Hook):
  """Notes what it is called with; needs the state after some steps."""

  def __init__(self, log, needs=()):
    self.log, self.needs = log, needs

  def before_step(self, step):
    self.log.append(("before", step))

  def on_info(self, step, info):
    assert isinstance(info, np.ndarray)
    self.log.append(("info", step, float(info)))

  def needs_state(self, step):
    self.log.append(("asked", step))
    return step in self.needs

  def on_state(self, step, state):
    self.log.append(("state", step, float(state)))


class Clock:
  """Time that is set by hand."""

  now = 0.0

  def __call__(self):
    return self.now


class FakeSignals:
  def __init__(self, at):
    self.at = at

  def preemption_requested(self, step):
    return signal.SIGTERM if step >= self.at else None


class FakeProgress:
  def __init__(self):
    self.shown = []

  def update(self, step, **values):
    self.shown.append((step, values))


def info_of(lower, upper, num_nonfinite=0):
  """An iteration's results, of which only these are looked at."""
  empty = dict.fromkeys(BilevelInfo._fields, ())
  return BilevelInfo(
    **empty
    | {
      "lower_loss": np.array(lower, np.float32),
      "upper_loss": np.float32(upper),
      "num_nonfinite": np.int32(num_nonfinite),
      "coefficients": np.zeros(2, np.float32),
    }
  )


def double(state, step):
  return 2 * state, state


def test_results_are_fetched_one_step_late():
  log = []

  def step_fn(state, step):
    log.append(("step", step))
    return double(state, step)

  state = loop.train_loop(jnp.float32(1), step_fn, 0, 4, [Record(log, {2, 4})])
  assert state == 16
  assert [entry for entry in log if entry[0] != "asked"] == [
    ("before", 1),
    ("step", 0),
    ("before", 2),
    ("step", 1),
    ("info", 1, 1.0),
    # The state is needed: its own results come first.
    ("info", 2, 2.0),
    ("state", 2, 4.0),
    ("before", 3),
    ("step", 2),
    ("before", 4),
    ("step", 3),
    ("info", 3, 4.0),
    ("info", 4, 8.0),
    ("state", 4, 16.0),
  ]


def test_a_state_is_flushed_where_it_is_read_and_in_the_end():
  log = []
  flush = lambda state: state + 100
  state = loop.train_loop(
    jnp.float32(1), double, 0, 3, [Record(log, {2})], flush
  )
  assert [entry for entry in log if entry[0] == "state"] == [("state", 2, 104)]
  assert state == 2 * 104 + 100


def test_every_hook_is_asked_and_called_in_order():
  first, second = [], []
  loop.train_loop(
    jnp.float32(1), double, 2, 5, [Record(first, {3, 5}), Record(second)]
  )
  for log in (first, second):
    assert [entry[1] for entry in log if entry[0] == "asked"] == [3, 4, 5]
    assert [entry[1] for entry in log if entry[0] == "state"] == [3, 5]
    assert [entry[1] for entry in log if entry[0] == "info"] == [3, 4, 5]


def test_a_loop_without_steps_calls_nothing():
  log = []
  assert loop.train_loop(7, double, 3, 3, [Record(log, {3})]) == 7
  assert not log


def test_clock_stands_still_while_paused():
  now = Clock()
  clock = hooks.Clock(10.0, now)
  now.now = 5.0
  assert clock.seconds() == 15.0
  with clock.paused():
    now.now = 100.0
    assert clock.seconds() == 15.0
  now.now = 101.0
  assert clock.seconds() == 16.0


def test_write_metrics():
  rows, now, progress = [], Clock(), FakeProgress()
  hook = hooks.WriteMetrics(
    rows.append,
    lambda before, info: {"lower_loss": info, "before": before},
    lambda done: {"forward_passes": 10 * done},
    hooks.Clock(1.0, now),
    progress,
  )
  now.now = 2.0
  hook.on_info(3, np.float32(0.5))
  (row,) = rows
  assert list(row)[:5] == [
    "step",
    "lower_loss",
    "before",
    "seconds",
    "forward_passes",
  ]
  assert row["step"] == 3 and row["before"] == 2 and row["seconds"] == 3.0
  assert row["forward_passes"] == 30 and row["rss_bytes"] > 0
  # A method without an upper loss shows the one it has.
  assert progress.shown == [(3, {"lower": 0.5})]


def test_append_ledger():
  entries = []
  hooks.AppendLedger(lambda step, info: entries.append((step, info))).on_info(
    4, "info"
  )
  assert entries == [(4, "info")]


def test_check_finite_saves_and_ends_the_run():
  saved = []
  guard = guards.Guard({}, max_nonfinite=2, max_loss_ratio=0.0)
  hook = hooks.CheckFinite(guard, saved.append, 9)
  for step, upper in enumerate((1.0, np.nan, 1.0, np.inf), 1):
    hook.on_info(step, info_of([0.5], upper))
    assert not hook.needs_state(step)
    hook.on_state(step, "another hook needs it")
  assert not saved and guard.state["nonfinite"] == 2
  hook.on_info(5, info_of([0.5], 1.0, num_nonfinite=2))
  assert hook.needs_state(5)
  with pytest.raises(
    errors.UserError,
    match=r"^2 steps in a row were not finite.* stops at step 6 of 9, which is",
  ):
    hook.on_state(6, "state")
  assert saved == ["state"]


def test_step_losses_of_both_kinds_of_info():
  assert hooks.step_losses(info_of([0.5, 0.25], 2.0)) == (
    [0.5, 0.25, 2.0],
    False,
  )
  # One direction of two may break; of none is the step skipped.
  assert not hooks.step_losses(info_of([1.0], 1.0, num_nonfinite=1))[1]
  assert hooks.step_losses(info_of([1.0], 1.0, num_nonfinite=2))[1]
  empty = dict.fromkeys(baselines.BaselineInfo._fields, ())
  info = baselines.BaselineInfo(**empty | {"upper_loss": np.float32(np.nan)})
  assert hooks.step_losses(info)[1]


def test_evaluate_every_few_steps_and_after_the_last():
  now, effects = Clock(), []
  clock = hooks.Clock(0.0, now)

  def validate(state):
    now.now += 50.0
    effects.append(("validate", state))
    return {"accuracy": 0.75, "f1": 0.5}, 0.5

  hook = hooks.Evaluate(
    every=3,
    num_steps=7,
    validate=validate,
    write=lambda row: effects.append(("write", row)),
    save=lambda *call: effects.append(("save", *call, clock.seconds())),
    clock=clock,
  )
  steps = [step for step in range(1, 8) if hook.needs_state(step)]
  assert steps == [3, 6, 7]
  hook.on_state(4, "of another hook's step")
  assert not effects
  now.now = 2.0
  hook.on_state(6, "state")
  row = {"step": 6, "selection_accuracy": 0.75, "selection_f1": 0.5}
  assert effects == [
    ("validate", "state"),
    ("write", row),
    ("save", "state", 0.5, 2.0),
  ]
  assert clock.seconds() == 2.0


def test_preemption_saves_waits_and_ends_the_run():
  effects = []

  def make(at):
    return hooks.Preemption(
      FakeSignals(at),
      lambda state: effects.append(("save", state)),
      lambda: effects.append("wait"),
      5,
    )

  hook = make(at=3)
  assert not hook.needs_state(2)
  hook.on_state(2, "another hook needs it")
  assert hook.needs_state(3) and not effects
  with pytest.raises(errors.InterruptedRun, match="SIGTERM at step 3 of 5"):
    hook.on_state(3, "state")
  assert effects == [("save", "state"), "wait"]
  # After its last step a run ends by itself.
  hook = make(at=5)
  assert hook.needs_state(5)
  hook.on_state(5, "state")
  assert len(effects) == 2


@pytest.mark.parametrize(
  ("num_steps", "stop", "expected"),
  [
    (0, 9, []),
    (2, 9, [("start", 13), ("stop", 15)]),
    (9, 5, [("start", 13), ("stop", "end")]),
    (2, 1, []),
  ],
)
def test_profile_traces_after_the_warm_up(
  tmp_path, monkeypatch, num_steps, stop, expected
):
  calls, at = [], None
  monkeypatch.setattr(
    hooks.jax.profiler, "start_trace", lambda _: calls.append(("start", at))
  )
  monkeypatch.setattr(
    hooks.jax.profiler, "stop_trace", lambda: calls.append(("stop", at))
  )
  hook = hooks.Profile(tmp_path, 10, num_steps)
  for at in range(11, 11 + stop):
    hook.before_step(at)
  at = "end"
  hook.close()
  assert calls == expected
