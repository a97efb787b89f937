"""Measures the peak memory of a bilevel run in a separate process.

`python memory.py {ours,theirs} {full,large,tiny} [toy]` prints JSON: the peak
memory and the bytes of the backbone. The peak is that of the framework's
allocator on a GPU, and resident memory otherwise.
"""

import json
import pathlib
import subprocess
import sys

NUM_ITERATIONS = 3


def resident_peak_bytes() -> int:
  """Returns the peak resident memory of this process (Linux)."""
  # Not getrusage, whose peak counts the process that started this one.
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith("VmHWM:"):
      return 1024 * int(line.split()[1])
  raise RuntimeError("No VmHWM in /proc/self/status; expected Linux.")


def measure(side: str, *work: str) -> dict[str, int]:
  """Runs this file and returns what it prints.

  Args:
    side: "ours" or "theirs".
    *work: a name in `workload.WORKS`; "toy" after it for next to no model.

  Returns:
    {"peak_bytes": ..., "base_bytes": ...}.
  """
  done = subprocess.run(
    [sys.executable, __file__, side, *work],
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def main(side: str, name: str, model: str = "") -> None:
  """Runs a few iterations of one side."""
  sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
  from bench import workload

  work = workload.WORKS[name]
  if model == "toy":
    work = workload.toy(work)
  if side == "ours":
    from bench import iterations, models

    run = iterations.make_bilevel(work)
    for _ in range(NUM_ITERATIONS):
      run.iteration()
    on_device = models.device_peak_bytes()
  else:
    from bench import theirs

    run = theirs.make_bilevel(work)
    for _ in range(NUM_ITERATIONS):
      run.inner()
      run.outer()
    on_device = theirs.device_peak_bytes()
  peak = resident_peak_bytes() if on_device is None else on_device
  print(json.dumps({"peak_bytes": peak, "base_bytes": run.base_bytes}))


if __name__ == "__main__":
  main(*sys.argv[1:])
