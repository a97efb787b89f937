"""Several processes on this machine: one run, and mistakes that end them all.

They are real ones, that speak over 127.0.0.1.
"""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests import tiny
from zofo_jax import errors, report
from zofo_jax.sharding import multihost

pytestmark = pytest.mark.many_devices

LLAMA = pathlib.Path(__file__).parents[2] / "configs" / "llama.py"


def free_port():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  """A folder of compiled programs, which the runs here have in common."""
  return tmp_path_factory.mktemp("cache")


def launch(cache, num_processes, *arguments, extra=None, meanwhile=None):
  """Types a command in each of several processes; returns (code, errors)s."""
  where = f"127.0.0.1:{free_port()}"
  running = []
  for index in range(num_processes):
    joined = [
      f"--distributed={where}",
      f"--num_processes={num_processes}",
      f"--process_id={index}",
      "--timeout=600",  # more than what is waited for them below
    ]
    command = [sys.executable, "-m", "zofo_jax.main", *map(str, arguments)]
    command += joined if num_processes > 1 else []
    command += (extra or {}).get(index, [])
    environment = {
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "JAX_NUM_CPU_DEVICES": str(8 // num_processes),
      "JAX_COMPILATION_CACHE_DIR": str(cache),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    running.append(
      subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True
      )
    )
  try:
    if meanwhile:
      meanwhile(running)
    errors_of = [process.communicate(timeout=400)[1] for process in running]
  finally:
    for process in running:
      process.kill()
  return [
    (process.returncode, text)
    for process, text in zip(running, errors_of, strict=True)
  ]


def command_of(folder, model, rows, method="bilevel"):
  return (
    f"--config={LLAMA}:task=rotten_tomatoes,method={method}",
    f"--workdir={folder}",
    f"--config.model.name={model}",
    f"--config.data.dir={rows}",
    "--config.data.num_lower=16",
    "--config.data.num_upper=16",
    "--config.data.num_selection=8",
    "--config.data.num_test=8",
    "--config.eval.batch_size=8",
    "--config.lower.num_steps=1",
    "--config.zo.learning_rate=1e-4",
    f"--config.zo.select={tiny.MOVED}",
    "--config.mesh.fsdp=2",
    "--config.mesh.model=2",
    "--config.train.num_steps=4",
    "--config.train.eval_every_steps=2",
    "--config.ckpt.keep=2",
  )


@pytest.mark.slow
def test_one_process_goes_on_where_two_were(
  cache, tmp_path, tiny_model, tiny_rows, command_line
):
  # The step that is the least to compile; the next test has the bilevel one.
  folder = tmp_path / "run"
  command = (
    *command_of(folder, tiny_model, tiny_rows, method="mezo"),
    *("--config.mesh.model=1", "--config.zo.select=attention_norm"),
    "--config.train.num_steps=2",
    "--config.train.eval_every_steps=1",
  )
  for code, text in launch(cache, 2, *command):
    assert code == 0, text

  def losses():
    rows = report.read_jsonl(folder / "metrics.jsonl")
    steps = [row for row in rows if "upper_loss" in row]
    assert [row["step"] for row in steps] == [1, 2]  # one process writes
    return [row["upper_loss"] for row in steps]

  whole = losses()
  shutil.rmtree(folder / "checkpoints" / "2")
  assert command_line(*command) == 0
  assert losses()[0] == whole[0]
  assert losses()[1] == pytest.approx(whole[1], rel=1e-4)


@pytest.mark.slow
def test_train_and_resume_on_other_processes(
  cache, tmp_path, tiny_model, tiny_rows
):
  folder = tmp_path / "run"
  command = command_of(folder, tiny_model, tiny_rows)

  def losses():
    rows = report.read_jsonl(folder / "metrics.jsonl")
    steps = [row for row in rows if "upper_loss" in row]
    # One process writes, once.
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    names = ("upper_loss", "lower_loss", "objective")
    return [[row[name] for name in names] for row in steps]

  def go_on(num_processes):
    for code, text in launch(cache, num_processes, *command):
      assert code == 0, text
    return losses()

  whole = go_on(2)  # of four devices each
  for num_processes in (1, 2):
    shutil.rmtree(folder / "checkpoints" / "4")
    again = go_on(num_processes)
    assert again[:2] == whole[:2]
    np.testing.assert_allclose(again, whole, rtol=1e-4, atol=1e-4)
  assert (folder / "summary.json").exists() and (folder / "curves.png").exists()


@pytest.mark.slow
def test_a_signal_to_one_process_loses_nothing(
  cache, tmp_path, tiny_model, tiny_rows
):
  steps = 24

  def go_on(name, **options):
    folder = tmp_path / name
    command = (
      *command_of(folder, tiny_model, tiny_rows),
      f"--config.train.num_steps={steps}",
      f"--config.train.eval_every_steps={steps // 2}",
      "--config.ckpt.base_every_steps=8",
    )
    return launch(cache, 2, *command, **options)

  def signalled(running):
    # Once it is under way, one of the two, and not the one that writes.
    ledger, end = tmp_path / "stopped" / "ledger.txt", time.monotonic() + 300
    while not ledger.exists() or len(ledger.read_bytes().splitlines()) < 6:
      assert time.monotonic() < end and running[1].poll() is None
      time.sleep(0.02)
    running[1].send_signal(signal.SIGTERM)

  whole = go_on("whole")
  assert [code for code, _ in whole] == [0, 0], whole
  stopped = go_on("stopped", meanwhile=signalled)
  assert [code for code, _ in stopped] == [143, 143], stopped
  assert "which is saved" in stopped[0][1]
  lines = (tmp_path / "stopped" / "ledger.txt").read_bytes().splitlines()
  assert 6 <= len(lines) < steps
  resumed = go_on("stopped")
  assert [code for code, _ in resumed] == [0, 0], resumed
  # Bit for bit: the coefficients of all steps, and what came of them.
  whole, other = tmp_path / "whole", tmp_path / "stopped"
  assert (whole / "ledger.txt").read_bytes() == (
    other / "ledger.txt"
  ).read_bytes()
  clock = ("seconds", "rss_bytes", "peak_rss_bytes")
  rows = [
    [
      {name: row[name] for name in row if name not in clock}
      for row in report.read_jsonl(folder / "metrics.jsonl")
    ]
    for folder in (whole, other)
  ]
  assert rows[0] == rows[1] and len(rows[0]) == steps + 2


def test_processes_that_disagree(cache, tmp_path, tiny_model, tiny_rows):
  results = launch(
    cache,
    2,
    *command_of(tmp_path / "run", tiny_model, tiny_rows),
    extra={1: ["--config.zo.eps=0.5"]},
  )
  for code, text in results:
    assert code == 2
    (line,) = [line for line in text.splitlines() if "zofo_jax:" in line]
    assert "config.zo.eps: process 1 was given another" in line


def join(where, **options):
  with pytest.raises(errors.UserError) as caught:
    multihost.initialize(where, **options)
  return str(caught.value)


def test_nobody_at_the_coordinator():
  where = f"127.0.0.1:{free_port()}"
  text = join(where, num_processes=2, process_id=1, timeout=1)
  assert where in text and "did not answer" in text and "1 s" in text


def test_a_process_that_does_not_come():
  where = f"127.0.0.1:{free_port()}"
  text = join(where, num_processes=3, process_id=0, timeout=1)
  assert "of 3 processes 1, 2 did not come" in text


@pytest.mark.parametrize(
  "where, options, message",
  [
    ("localhost", {}, "expected auto or HOST:PORT; found 'localhost'"),
    ("h:1", {"num_processes": 2}, "found None of 2"),
    ("h:1", {"num_processes": 2, "process_id": 2}, "found 2 of 2"),
    ("auto", {"process_id": 0}, "--process_id: 'auto' finds it itself"),
  ],
)
def test_arguments_that_do_not_fit(where, options, message):
  assert message in join(where, **options)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["icl", "probe", "head", "squad"])
def test_what_two_processes_answer(command, cache, tmp_path, tiny_model):
  # The same as one process says, of the same eight devices.
  rows = tmp_path / "rows"
  rows.mkdir()
  words = ("good", "bad")
  lines = [
    {
      "text": f"number {i} was {words[i % 2]}",
      "label": i % 2,
      "said": words[i % 2],
    }
    for i in range(96)
  ]
  for split in ("train", "validation"):
    report.write_lines(
      rows / f"{split}.jsonl", lines[: 24 if split == "validation" else None]
    )
  generated = command == "squad"
  declared = ["--config.data.task=mine", "--config.data.prompt={text}. It was"]
  declared += (
    ["--config.data.label=said", "--config.generate.max_new_tokens=3"]
    if generated
    else ["--config.data.options=(' bad', ' good')"]
  )
  outputs = []
  for num_processes in (1, 2):
    folder = tmp_path / str(num_processes)
    arguments = [
      *([] if generated else [command]),
      *command_of(folder, tiny_model, rows),
      *declared,
      "--config.icl.num_shots=2",
      "--config.head.num_steps=4",
      "--config.train.num_steps=2",
    ]
    for code, text in launch(cache, num_processes, *arguments):
      assert code == 0, text
    (name,) = {"summary", command} & {p.stem for p in folder.glob("*.json")}
    outputs.append(json.loads((folder / f"{name}.json").read_text()))
  scores = [
    {
      k: v
      for k, v in one.items()
      if isinstance(v, float) and "second" not in k and "flops" not in k
    }
    for one in outputs
  ]
  assert scores[0] and scores[0] == pytest.approx(scores[1], abs=1e-6)


# Notes in files what a process scores, and what it exchanges.
SCORED = """
import json
import pathlib

import jax

from zofo_jax.sharding import multihost

FOLDER = pathlib.Path(__file__).parent
_sum = multihost.sum_over_processes


def note(name, value):
  count, index = jax.process_count(), jax.process_index()
  with open(FOLDER / f"{name}_{index}_of_{count}.jsonl", "a") as file:
    file.write(json.dumps(value) + "\\n")


def sum_over_processes(array):
  note("exchanged", [*array.shape, array.dtype.name])
  return _sum(array)


multihost.sum_over_processes = sum_over_processes


def reward(completions, prompts, **columns):
  note("scored", prompts)
  return [sum(letter in "aeiou" for letter in text) for text in completions]
"""


@pytest.mark.slow
def test_processes_score_their_own_rows(
  cache, tmp_path, tiny_model, monkeypatch
):
  (tmp_path / "scored.py").write_text(SCORED)
  monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
  rows = tmp_path / "rows"
  rows.mkdir()
  for split, count in (("train", 24), ("validation", 8)):
    lines = [{"name": f"{split} {i}"} for i in range(count)]
    report.write_lines(rows / f"{split}.jsonl", lines)
  seen = []
  for num_processes in (1, 2):
    folder = tmp_path / str(num_processes)
    command = (
      *command_of(folder, tiny_model, rows, method="es"),
      *("--config.data.task=pets", "--config.data.prompt={name} has a"),
      *("--config.data.label=", "--config.generate.max_new_tokens=3"),
      "--config.reward.functions=('scored:reward',)",
      *("--config.reward.temperature=1.0", "--config.upper.batch_size=8"),
      *("--config.zo.direction=low_rank", "--config.zo.num_directions=2"),
      *("--config.zo.eps=0.1", "--config.train.num_steps=2"),
    )
    for code, text in launch(cache, num_processes, *command):
      assert code == 0, text
    metrics = report.read_jsonl(folder / "metrics.jsonl")
    seen.append([row["reward"] for row in metrics if "reward" in row])

    def notes(name, index, count=num_processes):
      path = tmp_path / f"{name}_{index}_of_{count}.jsonl"
      return [json.loads(line) for line in path.read_text().splitlines()]

    for step in range(2):
      shares = []
      for index in range(num_processes):
        assert notes("exchanged", index)[step] == [1, 2, 2, 8, "float32"]
        # Those of evaluations have a prompt each, once.
        calls = [p for p in notes("scored", index) if len({*p}) < len(p)]
        assert len(calls[step]) == 4 * 8 // num_processes
        shares.append({*calls[step]})
      assert len(set().union(*shares)) == sum(map(len, shares)) == 8
  assert len(seen[0]) == 2 and seen[0] == pytest.approx(seen[1], rel=1e-4)
