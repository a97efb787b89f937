"""The benchmark runs and writes what it says, at sizes that take no time."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import launches
import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "experiments" / "benchmark.py"


def run(*arguments):
  paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
  return subprocess.run(
    [sys.executable, str(SCRIPT), *map(str, arguments)],
    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    capture_output=True,
    text=True,
  )


TORCH = [
  "torch_mezo_over_ours",
  "evaluate_over_torch",
  "evaluate_over_torch.one_forward",
]


@pytest.mark.slow
@pytest.mark.parametrize(
  "times, sizes",
  [
    (["zo_over_two_forwards.rademacher"], ["temp_over_params.step"]),
    (
      [
        "zo_over_two_forwards.rademacher",
        "metatrain_over_single",
        "population_over_batch.low_rank.rank_1",
        *TORCH,
      ],
      ["temp_over_params.step", "temp_over_params.population.rank_1"],
    ),
  ],
  ids=["some", "all"],
)
def test_it_writes_the_fields_that_are_asked_for(tmp_path, times, sizes):
  if not importlib.util.find_spec("torch"):
    times = [name for name in times if name not in TORCH]
  path = tmp_path / "results.json"
  done = run(
    "--work=tiny",
    "--repeats=2",
    f"--json={path}",
    f"--only={','.join(times + sizes)}",
  )
  assert done.returncode == 0, done.stderr
  results = json.loads(path.read_text())
  assert set(results) == {*times, *sizes, "machine", "versions"}
  for name in times:
    actual = results[name]
    assert actual["pairs"] == 2
    assert 0 < actual["min"] <= actual["ratio"] <= actual["max"]
    assert actual["a_seconds"] > 0 and actual["b_seconds"] > 0
  for name in sizes:
    actual = results[name]
    assert actual["pairs"] == 1
    assert actual["ratio"] == actual["a_bytes"] / actual["b_bytes"]
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


PROGRAM = """HloModule made_up

%turn (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8]{0} get-tuple-element(%state), index=1
  %j = s32[] fusion(%i), kind=kLoop, calls=%next
  %begun = ((f32[8]{0}), f32[8]{0}) fusion-start(%x), kind=kLoop, calls=%twice
  %y = f32[8]{0} fusion-done(%begun)
  ROOT %new = (s32[], f32[8]{0}) tuple(%j, %y)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %first = (s32[], f32[8]{0}) fusion(%x), kind=kLoop, calls=%make
  %loop = (s32[], /*index=1*/f32[8]{0}) while(%first), condition=%goes_on, \
body=%turn, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %out = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


def test_kernels_are_counted_for_every_turn_of_a_loop():
  assert launches.launches(PROGRAM) == 1 + 5 * 2
  with pytest.raises(ValueError, match="unknown length: turn"):
    launches.launches(PROGRAM.replace("known_trip_count", "guessed"))


def test_kernels_of_a_compiled_program():
  double = lambda x: jax.lax.fori_loop(0, 7, lambda _, x: jnp.sin(x @ x), x)
  text = jax.jit(double).lower(jnp.ones((64, 64))).compile().as_text()
  assert launches.launches(text) >= 7 * 2
