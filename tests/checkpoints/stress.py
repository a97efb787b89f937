"""Saves checkpoints on a busy machine: none may be lost.

`python -m tests.checkpoints.stress --saves 500 --busy 6` starts processes that
do nothing but compute, and saves meanwhile. Before each save the folder is
opened and closed, as by a run that is complete, and every other time a process
that was killed while saving has left something there. It prints a JSON line.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import jax.numpy as jnp
import numpy as np

from zofo_jax import errors
from zofo_jax.checkpoints import checksums, manager
from zofo_jax.report import progress

LEAVES, SIZE, KEEP = 8, 4096, 2
# Of an interrupted save.
FILES = 300


def make_state(step: int):
  """Returns a state that has the step in all of its arrays."""
  return {f"leaf{i}": jnp.full((SIZE,), step + i) for i in range(LEAVES)}


def save(folder: pathlib.Path, step: int) -> str:
  """Opens a folder twice and saves; returns what is wrong, if anything."""
  if step % 2:
    left = folder / f"{step}.orbax-checkpoint-tmp"
    state = left / "state.orbax-checkpoint-tmp"
    state.mkdir(parents=True)
    for number in range(FILES):
      (state / str(number)).write_bytes(b"x")
  try:
    with manager.Checkpoints(folder, keep=KEEP):
      pass
    with manager.Checkpoints(folder, keep=KEEP) as checkpoints:
      checkpoints.save(step, make_state(step), {"step": step}, metric=step)
    with manager.Checkpoints(folder) as checkpoints:
      state, extra = checkpoints.restore(make_state(0))
  except errors.UserError as error:
    return str(error)
  if not checksums.has_checksums(folder / str(step)):
    return f"step {step} has no checksums"
  expected = make_state(step)
  same = all(np.array_equal(state[name], expected[name]) for name in expected)
  return "" if same and extra == {"step": step} else f"step {step} differs"


def main() -> None:
  """Parses the command line and prints the result."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--saves", type=int, default=500)
  parser.add_argument("--busy", type=int, default=6)
  options = parser.parse_args()
  load = [
    subprocess.Popen([sys.executable, "-c", "while True: pass"])
    for _ in range(options.busy)
  ]
  start = time.monotonic()
  problems = []
  try:
    with (
      tempfile.TemporaryDirectory() as folder,
      progress.Progress(options.saves, "saves", unit="saves") as bar,
    ):
      for step in range(1, options.saves + 1):
        if problem := save(pathlib.Path(folder), step):
          problems.append(problem)
          print(problem, file=sys.stderr)
        bar.update(step)
  finally:
    for process in load:
      process.kill()
  result = {
    "saves": options.saves,
    "lost": len(problems),
    "busy_processes": options.busy,
    "seconds": round(time.monotonic() - start, 1),
  }
  print(json.dumps(result))
  sys.exit(bool(problems))


if __name__ == "__main__":
  main()
