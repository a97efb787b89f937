"""Signals: the first asks to save, its echo is ignored, a third kills."""

import contextlib
import signal
import subprocess
import sys
import types

import pytest

from zofo_jax.training import guards

SAVE = """
import sys, time
from zofo_jax.training import guards
with guards.Signals() as signals:
  print("ready", flush=True)
  while signals.preemption_requested(0) is None:
    time.sleep(0.01)
  print("saving", flush=True)
  for _ in range(int(sys.argv[1])):  # of 0.01 s
    time.sleep(0.01)
print("saved", flush=True)
"""


@pytest.fixture
def clock(monkeypatch):
  """A clock that is set by hand, and which signals killed this process."""

  clock = types.SimpleNamespace(now=100.0, killed_by=[])
  monkeypatch.setattr(guards.time, "monotonic", lambda: clock.now)
  monkeypatch.setattr(guards.time, "sleep", lambda seconds: None)
  monkeypatch.setattr(guards.signal, "raise_signal", clock.killed_by.append)
  return clock


@pytest.mark.parametrize("second", guards.SIGNALS)
def test_an_echo_is_ignored(clock, second):
  before = [signal.getsignal(number) for number in guards.SIGNALS]
  with guards.Signals() as signals:
    assert signals.preemption_requested(1) is None
    signals._note(signal.SIGINT, None)
    assert signals.preemption_requested(2) == signal.SIGINT
    clock.now += 0.2
    signals._note(second, None)
    assert not clock.killed_by
    assert signals.preemption_requested(3) == signal.SIGINT
    # A third one does not wait for Python.
    for number in guards.SIGNALS:
      assert signal.getsignal(number) is signal.SIG_DFL
  assert before == [signal.getsignal(number) for number in guards.SIGNALS]


def test_a_late_second_one_kills(clock):
  with guards.Signals() as signals:
    signals._note(signal.SIGTERM, None)
    clock.now += 1.5
    signals._note(signal.SIGTERM, None)
    assert clock.killed_by == [signal.SIGTERM]


def started(hundredths):
  process = subprocess.Popen(
    [sys.executable, "-c", SAVE, str(hundredths)],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  assert process.stdout.readline() == "ready\n"
  process.send_signal(signal.SIGINT)
  assert process.stdout.readline() == "saving\n"
  process.send_signal(signal.SIGINT)  # at once, as `uv run` passes it on
  return process


def test_a_second_ctrl_c_does_not_end_the_save():
  process = started(20)
  out, _ = process.communicate()
  assert (out, process.returncode) == ("saved\n", 0)


def test_a_third_ctrl_c_ends_the_process():
  process = started(6000)
  while process.poll() is None:
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(0.1)
  out, _ = process.communicate()
  assert (out, process.returncode) == ("", -signal.SIGINT)
