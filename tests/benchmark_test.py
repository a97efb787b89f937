"""The benchmark runs and writes what it says, at sizes that take no time."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / "experiments" / "benchmark.py"


def run(*arguments):
  paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
  return subprocess.run(
    [sys.executable, str(SCRIPT), *map(str, arguments)],
    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    capture_output=True,
    text=True,
  )


def test_it_writes_the_fields_that_are_asked_for(tmp_path):
  times = ["zo_over_two_forwards.rademacher", "metatrain_over_single"]
  if importlib.util.find_spec("torch"):
    times += [
      "torch_mezo_over_ours",
      "evaluate_over_torch",
      "evaluate_over_torch.one_forward",
    ]
  sizes = ["temp_over_params.step"]
  path = tmp_path / "results.json"
  done = run(
    "--tiny",
    "--repeats=2",
    f"--json={path}",
    f"--only={','.join(times + sizes)}",
  )
  assert done.returncode == 0, done.stderr
  results = json.loads(path.read_text())
  assert set(results) == {*times, *sizes, "machine", "versions"}
  for name in times:
    found = results[name]
    assert found["pairs"] == 2
    assert 0 < found["min"] <= found["ratio"] <= found["max"]
    assert found["a_seconds"] > 0 and found["b_seconds"] > 0
  for name in sizes:
    found = results[name]
    assert found["pairs"] == 1
    assert found["ratio"] == found["a_bytes"] / found["b_bytes"]
  assert results["machine"]["cores"] == os.cpu_count()
  assert results["versions"]["jax"]


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--only=evaluate_over_torc", "Did you mean 'evaluate_over_torch'?"),
    ("--repeats=0", "expected at least 1"),
    ("--json=/nowhere/results.json", "no folder"),
  ],
)
def test_it_says_what_is_wrong(tmp_path, argument, message):
  done = run(f"--json={tmp_path / 'results.json'}", argument)
  assert done.returncode == 2
  assert message in done.stderr
