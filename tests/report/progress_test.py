"""Progress on plain streams and in a real terminal."""

import io
import os
import pty
import subprocess
import sys

from zofo_jax.report import progress


class Clock:
  now = 0.0

  def __call__(self):
    return self.now


def test_plain_lines_where_there_is_no_terminal():
  clock, stream = Clock(), io.StringIO()
  with progress.Progress(
    100, start=20, stream=stream, clock=clock, seconds_between_lines=10
  ) as bar:
    clock.now += 60  # the compilation
    bar.update(21, lower=0.123456, upper=2.0)
    for step in range(22, 101):
      clock.now += 0.5
      bar.update(step, lower=0.25, upper=0.5)
      if step == 50:
        bar.write_line("saved [50]")
  lines = stream.getvalue().splitlines()
  assert lines[0].startswith("train 21/100  lower 0.1235  upper 2  0.0167 ")
  # Ten seconds on; the rate no longer holds the compilation.
  assert lines[1].startswith(
    "train 41/100  lower 0.25  upper 0.5  2 steps/s  0:30 left  "
  )
  assert lines[1].endswith(" GB")
  assert "saved [50]" in lines
  assert lines[-1].startswith("train 100/100 ")
  assert len(lines) == 1 + 3 + 1 + 1


def test_a_clock_that_stands_still_does_no_harm():
  stream = io.StringIO()
  with progress.Progress(2, stream=stream, clock=lambda: 0.0) as bar:
    bar.update(1)
    bar.update(2)
  assert "? left" in stream.getvalue()


def test_a_bar_on_a_terminal():
  code = (
    "from zofo_jax.report import progress\n"
    "with progress.Progress(40) as p:\n"
    "  for i in range(1, 41):\n"
    "    p.update(i, lower=1 / i, upper=2 / i)\n"
    "    if i == 20:\n"
    "      p.write_line('half [way]')\n"
    "      with progress.Progress(9, 'selection', unit='rows') as inner:\n"
    "        inner.update(9, accuracy=0.75)\n"
  )
  reader, terminal = pty.openpty()
  with subprocess.Popen(
    [sys.executable, "-c", code],
    stderr=terminal,
    env={**os.environ, "COLUMNS": "140", "TERM": "xterm"},
  ) as process:
    os.close(terminal)
    shown = b""
    try:
      while chunk := os.read(reader, 4096):
        shown += chunk
    except OSError:
      pass  # how Linux says that the other end was closed
    finally:
      os.close(reader)
  assert process.returncode == 0
  text = shown.decode()
  assert "40/40" in text
  assert "lower 0.025" in text and "upper 0.05" in text
  assert "steps/s" in text and "0:00 left" in text and "GB" in text
  assert "half [way]" in text
  assert "selection" in text and "9/9" in text and "accuracy 0.75" in text
  assert "━" in text
