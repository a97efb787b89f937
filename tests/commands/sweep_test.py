"""Sweeps: what is run, what is run again, what is said."""

import json
import pathlib
import shlex

import pytest

from zofo_jax import errors, main
from zofo_jax.commands import sweep

ROOT = pathlib.Path(__file__).parents[2]


def write(folder, body):
  path = folder / "some_sweep.py"
  path.write_text(
    f"CONFIG = {str(ROOT / 'configs' / 'llama.py')!r} + ':task=rotten_tomatoes'"
    f"\n\n\ndef get_sweep():\n{body}"
  )
  return str(path)


def test_commands_for_elsewhere(tmp_path, capsys):
  path = str(ROOT / "configs" / "sweeps" / "theta.py")
  arguments = [f"--sweep={path}", "--workdir=runs/x", "--print"]
  assert main.main(["sweep", *arguments, "--config.train.num_steps=7"]) == 0
  lines = [shlex.split(x) for x in capsys.readouterr().out.splitlines()]
  assert len(lines) == 6 and len({tuple(line) for line in lines}) == 6
  for line in lines:
    assert line[:3] == ["python", "-m", "zofo_jax.main"]
    assert line[-1] == "--config.train.num_steps=7"
  assert "--workdir=runs/x/eps=0.001,learning_rate=1e-08" in lines[0]
  assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_runs_and_runs_no_more_than_needed(
  tmp_path, tiny_model, tiny_rows, capsys
):
  path = write(
    tmp_path,
    "  yield {'zo.eps': 1e-3}\n  yield {'zo.eps': -1.0}\n",
  )
  arguments = [
    *(f"--sweep={path}", f"--workdir={tmp_path / 'runs'}", "--jobs=2"),
    *(f"--config.model.name={tiny_model}", f"--config.data.dir={tiny_rows}"),
    *("--config.method=mezo", "--config.zo.select=attention_norm"),
    "--config.train.num_steps=1",
    *("--config.data.num_test=8", "--config.data.num_selection=8"),
  ]
  assert main.main(["sweep", *arguments]) == 2
  shown = capsys.readouterr().out
  good, bad = json.loads((tmp_path / "runs" / "sweep.json").read_text())
  assert 0 <= good["test_accuracy"] <= 1 and "failed" not in good
  assert "zo.eps" in bad["failed"] and "zo.eps" in shown
  log = tmp_path / "runs" / "eps=0.001" / "log.txt"
  before = log.read_bytes()
  assert main.main(["sweep", *arguments]) == 2
  assert log.read_bytes() == before


@pytest.mark.parametrize(
  "body, message",
  [
    ("  yield {'zo.epss': 1}\n", "Did you mean 'zo.eps'"),
    ("  yield {'seed': 1}\n  yield {'seed': 1}\n", "'seed=1' twice"),
    ("  return []\n", "yields no run"),
  ],
)
def test_mistakes(tmp_path, body, message):
  with pytest.raises(errors.UserError, match=message):
    sweep.load(write(tmp_path, body), "runs")
  with pytest.raises(errors.UserError, match="--sweep: expected a file"):
    sweep.load(str(tmp_path / "none.py"), "runs")


def test_no_run_at_a_time(tmp_path, capsys):
  path = write(tmp_path, "  yield {'seed': 1}\n")
  arguments = [f"--sweep={path}", f"--workdir={tmp_path / 'runs'}"]
  assert main.main(["sweep", *arguments, "--jobs=0"]) == 2
  assert "--jobs: expected 1 or more" in capsys.readouterr().err
  folder = tmp_path / "runs" / "seed=1"
  folder.mkdir(parents=True)
  (folder / "summary.json").write_text("{")
  assert main.main(["sweep", *arguments]) == 2
  assert "summary.json' is not JSON" in capsys.readouterr().err
