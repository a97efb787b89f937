"""Models unlike Llama, trained by every method and exported."""

import json
import pathlib

import numpy as np
import pytest

from tests import tiny
from zofo_jax import report
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
  # Along random directions it takes longer.
  steps, rate = (300, 1e-3) if "mezo" in method else (40, 1e-4)
  code = command_line(
    "train",
    f"--config={LLAMA}:task=rotten_tomatoes,method={method}",
    f"--config.model.name={model}",
    f"--config.data.dir={tiny_rows}",
    "--config.loss=classification",
    "--config.penalty=1",
    "--config.data.num_selection=0",
    "--config.lower.num_steps=2",
    "--config.lower.learning_rate=5e-3",
    "--config.upper.learning_rate=5e-3",
    f"--config.zo.learning_rate={rate}",
    f"--config.train.num_steps={steps}",
    f"--config.train.num_first_steps={steps // 2}",
    f"--config.train.eval_every_steps={steps}",
    f"--workdir={run}",
  )
  assert code == 0
  rows = report.read_jsonl(run / "metrics.jsonl")
  losses = [row["upper_loss"] for row in rows if "upper_loss" in row]
  assert len(losses) == steps and np.isfinite(losses).all()
  assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
  summary = json.loads((run / "summary.json").read_text())
  assert summary["test_accuracy"] > summary["zero_shot_accuracy"] + 0.2
  assert command_line("export", run, tmp_path / "out", "--what=base") == 0
  written = json.loads((tmp_path / "out" / "config.json").read_text())
  assert written["model_type"] == model.name.rstrip("0")
