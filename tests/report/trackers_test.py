"""Dashboards: what is written is what metrics.jsonl has."""

import glob
import json
import pathlib

import pytest
from etils import epath

from zofo_jax import report
from zofo_jax.config import defaults
from zofo_jax.report import trackers

LLAMA = pathlib.Path(__file__).parents[2] / "configs" / "llama.py"


@pytest.fixture(scope="module")
def done(command_line, tiny_model, tiny_rows, tmp_path_factory):
  """A run of 6 steps in two goes, with TensorBoard and a trace of 2 steps."""
  folder = tmp_path_factory.mktemp("runs") / "tracked"
  for steps in (4, 6):
    code = command_line(
      f"--config={LLAMA}:task=rotten_tomatoes,method=mezo",
      *(f"--workdir={folder}", f"--config.model.name={tiny_model}"),
      *(f"--config.data.dir={tiny_rows}", "--config.data.num_selection=20"),
      "--config.data.num_test=20",
      *(f"--config.train.num_steps={steps}", "--config.train.profile_steps=2"),
      "--config.train.eval_every_steps=2",
      "--config.train.trackers=('tensorboard',)",
      "--config.ckpt.may_change=('train.num_steps',)",
    )
    assert code == 0
  return folder


def read_tensorboard(folder):
  """Returns {name: {step: value}} of all event files."""
  from tensorboardX.proto import event_pb2

  actual = {}
  for path in sorted(glob.glob(f"{folder}/tensorboard/events.*")):
    data, at = pathlib.Path(path).read_bytes(), 0
    while at < len(data):  # length, its CRC, an event, its CRC
      size = int.from_bytes(data[at : at + 8], "little")
      event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
      at += 16 + size
      for value in event.summary.value:
        actual.setdefault(value.tag, {})[event.step] = value.simple_value
  return actual


@pytest.mark.slow
def test_tensorboard_has_what_metrics_has(done):
  actual = read_tensorboard(done)
  for name in ("upper_loss", "flops", "selection_accuracy"):
    expected = {
      row["step"]: row[name]
      for row in report.read_jsonl(done / "metrics.jsonl")
      if name in row
    }
    assert actual[name] == pytest.approx(expected), name
  assert "coefficients" not in actual  # a list


@pytest.mark.slow
def test_a_trace_is_written(done):
  assert glob.glob(f"{done}/profile/plugins/profile/*/*.xplane.pb")


@pytest.mark.filterwarnings("ignore")  # of theirs
@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_the_others_write_beside_the_run(name, tmp_path, monkeypatch):
  pytest.importorskip(trackers.TRACKERS[name][0])
  folder = epath.Path(tmp_path / "run")
  folder.mkdir()
  for variable in ("WANDB_MODE", "MLFLOW_TRACKING_URI"):
    monkeypatch.delenv(variable, raising=False)
  for step in (0, 2):
    with trackers.Trackers([name], folder, {"zo.eps": 1e-3}, step) as tracker:
      for number in (step + 1, step + 2):
        tracker.write({"step": number, "upper_loss": 1.0 / number})
  run = json.loads((folder / "trackers.json").read_text())[name]
  if name == "wandb":  # one run, in two files
    assert len(list(folder.glob(f"wandb/offline-run-*-{run}"))) == 2
    return
  import mlflow

  history = mlflow.MlflowClient().get_metric_history(run, "upper_loss")
  assert {m.step: m.value for m in history} == {
    step: 1.0 / step for step in (1, 2, 3, 4)
  }


def test_configs_name_all_trackers():
  assert defaults.TRACKERS == tuple(trackers.TRACKERS)


def test_a_package_that_is_not_there(tmp_path, monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
  with pytest.raises(Exception, match=r"pip install 'zofo-jax\[trackers\]'"):
    trackers.Trackers(["tensorboard"], epath.Path(tmp_path), {})


def test_mistakes(command_line, tmp_path, tiny_model, capsys):
  code = command_line(
    *(f"--config={LLAMA}", f"--workdir={tmp_path}"),
    *(f"--config.model.name={tiny_model}", "--config.train.trackers=('wand',)"),
  )
  stderr = capsys.readouterr().err
  assert code == 2 and "Did you mean 'wandb'" in stderr
