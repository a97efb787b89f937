"""Fault injection: kill, fill the disk, flip and truncate files.

`python experiments/faults.py --trials N --json FILE` runs the tiny
configuration in processes of its own, injects one fault into each at a random
point, resumes it, and compares its results with an uninterrupted run, bit for
bit. README.md describes the faults.
"""

import argparse
import gc
import json
import os
import pathlib
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

# The tiny model is the tests'.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from fault import trial

from tests import tiny


class Case(NamedTuple):
  """A trial.

  Attributes:
    home: has the model, the rows and the compiled programs.
    folder: of the run.
    rare: whether the backbone is stored separately and rebuilt from the ledger.
    draw: chooses the point of the fault.
    seconds: the time of an uninterrupted run.
    reference: folder of an uninterrupted run.
  """

  home: pathlib.Path
  folder: pathlib.Path
  rare: bool
  draw: random.Random
  seconds: float
  reference: pathlib.Path

  def start(self, **options: Any) -> int:
    """Starts or resumes the run."""
    return trial.start(self.home, self.folder, rare=self.rare, **options)

  def output(self) -> str:
    """Returns the output of the run."""
    path = pathlib.Path(f"{self.folder}.log")
    return path.read_text() if path.exists() else ""


def _signal(case: Case, number: int) -> tuple[int, ...]:
  process = case.start()
  if trial.wait(process, case.draw.uniform(0.1, case.seconds)) is None:
    os.kill(process, number)
    code = trial.wait(process)
    # Before the first step and after the last nothing is left to be saved.
    return (code,) if number == signal.SIGTERM and code != 143 else ()
  return ()


def kill(case: Case) -> None:
  """Kills the process."""
  _signal(case, signal.SIGKILL)


def sigterm(case: Case) -> None:
  """Asks the process to end, which it does after a last save."""
  codes = _signal(case, signal.SIGTERM)
  assert not set(codes) - {0, -signal.SIGTERM}, codes


def disk_full(case: Case) -> None:
  """Limits the size of files: writes fail as on a full disk."""
  code = trial.wait(case.start(max_bytes=int(10 ** case.draw.uniform(2, 5.5))))
  assert code in (0, 2), code
  assert (code == 2) == ("zofo_jax: " in case.output()), case.output()


def _files(case: Case) -> list[pathlib.Path]:
  """Runs for a while; returns the files of its states and the ledger."""
  process = case.start()
  if trial.wait(process, case.draw.uniform(0.5, 1.0) * case.seconds) is None:
    os.kill(process, signal.SIGKILL)
    trial.wait(process)
  names = ("checkpoints", "bases")
  paths = [p for name in names for p in (case.folder / name).rglob("*")]
  # What is half-written at the end of a process is no checkpoint, and one
  # without checksums is read on trust.
  sealed = [
    path
    for path in paths
    if path.is_file()
    and path.stat().st_size
    and any((up / "checksums.json").exists() for up in path.parents)
  ]
  ledger = case.folder / "ledger.txt"
  return sealed + [ledger] * ledger.exists()


def flip(case: Case) -> None:
  """Changes a bit of a file."""
  if files := _files(case):
    path = case.draw.choice(files)
    content = bytearray(path.read_bytes())
    content[case.draw.randrange(len(content))] ^= 1 << case.draw.randrange(8)
    path.write_bytes(content)


def truncate(case: Case) -> None:
  """Truncates a file, or removes it."""
  if files := _files(case):
    path = case.draw.choice(files)
    if case.draw.random() < 0.3:
      path.unlink()
    else:
      os.truncate(path, case.draw.randrange(path.stat().st_size))


def truncate_ledger(case: Case) -> None:
  """Truncates the ledger within a line, or adds half of one."""
  _files(case)
  path = case.folder / "ledger.txt"
  if not path.exists():
    return
  if case.draw.random() < 0.5:
    os.truncate(path, case.draw.randrange(path.stat().st_size))
  else:
    with path.open("ab") as file:
      file.write(b"21 1 38d1b717 000"[: case.draw.randrange(1, 17)])


def nan(case: Case) -> None:
  """Makes batches NaN from some step on.

  The run stops by itself; the state that it saved is compared with that of the
  uninterrupted run at that step, and the run is then started anew.
  """
  first = case.draw.randrange(1, trial.STEPS // trial.EVAL_EVERY)
  first *= trial.EVAL_EVERY
  code = trial.wait(case.start(nan_from=first))
  assert code == 2 and "were not finite" in case.output(), (code, case.output())
  last = max(int(p.name) for p in (case.folder / "checkpoints").iterdir())
  saved = trial.result(case.home, case.folder, last)
  expected = trial.result(case.home, case.reference, first)
  # All but the step: (theta, p, s, optimizer states, key).
  states = [
    {k.removeprefix(str(step)): v for k, v in state.items()}
    for step, state in ((last, saved), (first, expected))
  ]
  for state in states:
    del state[".step"]
  assert states[0] == states[1], "a step that is not finite left traces"
  case.folder.rename(f"{case.folder}.stopped")


def second_writer(case: Case) -> None:
  """Starts a second process in the folder of a run."""
  first = case.start()
  code = trial.wait(first, case.draw.uniform(0.1, case.seconds))
  second = trial.wait(case.start())
  # Either is refused while the other holds the folder, and says who does; the
  # last to come finds the run ended.
  codes = {second, trial.wait(first) if code is None else code}
  assert codes in ({0}, {0, 2}), codes
  assert (2 in codes) == ("in use" in case.output()), case.output()


def changed_inputs(case: Case) -> None:
  """Changes rows or weights between a run's start and its resumption."""
  process = case.start()
  if trial.wait(process, case.draw.uniform(0.5, 1.0) * case.seconds) is None:
    os.kill(process, signal.SIGKILL)
    trial.wait(process)
  if not any((case.folder / "checkpoints").glob("*/checksums.json")):
    return  # nothing to resume: a new run would begin
  path = case.draw.choice(
    [
      case.home / "rows" / "train.jsonl",
      case.home / "rows" / "validation.jsonl",
      case.home / "model" / "model.safetensors",
      case.home / "model" / "tokenizer.json",
    ]
  )
  content = path.read_bytes()
  try:
    if path.suffix == ".jsonl":  # a row less
      path.write_bytes(content[: content[:-1].rindex(b"\n") + 1])
    elif path.suffix == ".safetensors":  # another weight
      path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:  # two tokens change places
      path.write_bytes(_swap_tokens(content))
    code = trial.wait(case.start())
  finally:
    path.write_bytes(content)
  assert code == 2 and "changed" in case.output(), (path.name, code)


def _swap_tokens(content: bytes) -> bytes:
  fields = json.loads(content)
  vocabulary = fields["model"]["vocab"]
  first, second = sorted(vocabulary)[100:102]
  vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
  return json.dumps(fields).encode()


def kill_twice(case: Case) -> None:
  """Kills the process, and then that which resumes it, or its last save."""
  if case.draw.random() < 0.5:
    kill(case)
    kill(case)
    return
  process = case.start()
  if trial.wait(process, case.draw.uniform(0.1, case.seconds)) is None:
    os.kill(process, signal.SIGTERM)
    if trial.wait(process, case.draw.uniform(0.0, 0.3)) is None:
      os.kill(process, signal.SIGKILL)
      trial.wait(process)


FAULTS: dict[str, Callable[[Case], None]] = {
  "kill -9": kill,
  "SIGTERM": sigterm,
  "disk full": disk_full,
  "flipped bit": flip,
  "truncated or missing file": truncate,
  "torn ledger": truncate_ledger,
  "NaN batches": nan,
  "second writer": second_writer,
  "changed inputs": changed_inputs,
  "killed twice": kill_twice,
}


def attempt(case: Case, fault: str, expected: dict[str, str]) -> str:
  """Injects a fault, resumes, compares; returns what is wrong, if anything."""
  try:
    FAULTS[fault](case)
  except AssertionError as error:
    return f"silently wrong: {error}"
  codes = []
  while not codes or (codes[-1] != 0 and len(codes) < 3):
    codes.append(trial.wait(case.start()))
  if codes[-1] != 0:
    return f"lost: exit codes {codes}"
  actual = trial.result(case.home, case.folder)
  different = sorted(
    name
    for name in actual.keys() | expected.keys()
    if actual.get(name) != expected.get(name)
  )
  if different:
    kind = "lost" if "zofo_jax: " in case.output() else "silently wrong"
    return f"{kind}: {', '.join(different[:3])} differ"
  return ""


def campaign(
  trials: int,
  folder: pathlib.Path,
  seed: int,
  path: pathlib.Path,
  faults: list[str],
  first: int = 0,
) -> dict[str, Any]:
  """Runs trials, each fault in turn; writes the file after each."""
  for name in ("model", "rows"):
    (folder / name).mkdir()
  tiny.write_rows(folder / "rows")
  _fork_to_write_model(folder)
  rows = {name: dict.fromkeys(("trials", *WRONG), 0) for name in faults}
  wrong: list[str] = []
  begun = time.monotonic()
  seconds, references, expected = {}, {}, {}
  for rare in (False, True, False, True):  # the first of each compiles
    reference = folder / f"reference-{rare}-{len(seconds)}"
    before = time.monotonic()
    code = trial.wait(trial.start(folder, reference, rare=rare))
    if code != 0:
      sys.exit(pathlib.Path(f"{reference}.log").read_text())
    seconds[rare] = time.monotonic() - before
    references[rare] = reference
    expected[rare] = trial.result(folder, reference)
  if expected[False] != expected[True]:
    sys.exit("Runs of the two kinds of checkpoints differ.")
  for number in range(first, trials):
    draw = random.Random(f"{seed} {number}")
    fault, rare = faults[number % len(faults)], draw.random() < 0.5
    run = folder / f"run-{number}"
    case = Case(folder, run, rare, draw, seconds[rare], references[rare])
    problem = attempt(case, fault, expected[rare])
    rows[fault]["trials"] += 1
    for name in WRONG:
      rows[fault][name] += problem.startswith(name.replace("_", " "))
    if problem:
      wrong.append(f"trial {number}, {fault}, rare {rare}: {problem}")
      print(wrong[-1], case.output(), sep="\n", file=sys.stderr)
    summary = {
      "trials": number + 1 - first,
      **{n: sum(row[n] for row in rows.values()) for n in WRONG},
      "seconds": time.monotonic() - begun,
      "faults": rows,
      "wrong": wrong,
    }
    path.write_text(json.dumps(summary, indent=2) + "\n")
  return summary


WRONG = ("lost", "silently_wrong")


def _fork_to_write_model(folder: pathlib.Path) -> None:
  # In a process of its own, like all uses of a device: this one is forked.
  def work() -> int:
    tiny.write_model(folder / "model")
    return 0

  if trial.wait(trial.fork(folder, work, folder / "model.log")):
    sys.exit((folder / "model.log").read_text())


def main() -> None:
  """Parses the command line and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--trials", type=int, default=200)
  parser.add_argument("--json", type=pathlib.Path, required=True)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--first", type=int, default=0, help="number of the first trial"
  )
  parser.add_argument("--only", choices=FAULTS, help="one kind of fault")
  parser.add_argument(
    "--offload",
    action="store_true",
    help="with weights in the host's memory, written every third step",
  )
  given = parser.parse_args()
  if given.offload:
    trial.CHANGES.update({"model.offload": "host", "zo.write_every": 3})
  os.environ["TOKENIZERS_PARALLELISM"] = "false"
  # Imported once, before the forks.
  import matplotlib.figure  # noqa: F401
  import orbax.checkpoint  # noqa: F401
  import transformers

  import zofo_jax.training.train  # noqa: F401
  from zofo_jax import report

  transformers.AutoTokenizer  # noqa: B018 - is read lazily
  # What is imported stays: the processes need not look through it again.
  gc.freeze()
  gc.set_threshold(50_000)
  with tempfile.TemporaryDirectory() as folder:
    summary = campaign(
      given.trials,
      pathlib.Path(folder),
      given.seed,
      given.json,
      [given.only] if given.only else list(FAULTS),
      given.first,
    )
  report.results_table(
    [{"fault": name, **row} for name, row in summary["faults"].items()],
    title=f"{summary['trials']} trials in {summary['seconds']:.0f} s",
  )
  sys.exit(1 if any(summary[name] for name in WRONG) else 0)


if __name__ == "__main__":
  main()
