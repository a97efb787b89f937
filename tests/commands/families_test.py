"""Models unlike Llama, trained by every method and exported."""

import json
import pathlib

import pytest

from tests import tiny
from zofo_jax.config import methods

LLAMA = pathlib.Path(__file__).parents[2] / "configs" / "llama.py"
METHODS = [name for name, m in methods.METHODS.items() if not m.by_reward]


@pytest.fixture(scope="module", params=["gpt2", "roberta"])
def model(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp(request.param)
  {"gpt2": tiny.write_gpt2, "roberta": tiny.write_roberta}[request.param](
    folder
  )
  return folder


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(model, method, tiny_rows, command_line, tmp_path):
  run = tmp_path / "run"
  code = command_line(
    "train",
    f"--config={LLAMA}:task=rotten_tomatoes,method={method}",
    f"--config.model.name={model}",
    f"--config.data.dir={tiny_rows}",
    "--config.loss=classification",
    "--config.data.num_lower=24",
    "--config.data.num_upper=24",
    "--config.data.num_selection=0",
    "--config.data.num_test=16",
    "--config.lower.num_steps=2",
    "--config.train.num_steps=2",
    f"--workdir={run}",
  )
  assert code == 0
  assert json.loads((run / "summary.json").read_text())
  assert command_line("export", run, tmp_path / "out", "--what=base") == 0
  written = json.loads((tmp_path / "out" / "config.json").read_text())
  assert written["model_type"] == model.name.rstrip("0")
