"""The adapter that is kept selects, answers and is exported."""

import json
import pathlib

import jax
import numpy as np
import pytest
from etils import epath

from tests import tiny
from zofo_jax import main
from zofo_jax.builders import run as run_lib
from zofo_jax.commands import evaluate
from zofo_jax.config.validate import check
from zofo_jax.errors import UserError
from zofo_jax.models.hf import peft

LLAMA = pathlib.Path(__file__).parents[2] / "configs" / "llama.py"


@pytest.mark.slow
def test_s_may_be_kept(command_line, tmp_path, tiny_model, tiny_rows, capsys):
  folder = tmp_path / "run"
  code = command_line(
    "train",
    f"--config={LLAMA}:task=rotten_tomatoes",
    f"--workdir={folder}",
    f"--config.model.name={tiny_model}",
    f"--config.data.dir={tiny_rows}",
    "--config.data.num_selection=40",
    "--config.loss=classification",
    "--config.keep=s",
    "--config.lower.num_steps=5",
    "--config.lower.learning_rate=3e-2",
    # Neither p nor theta moves: p acts as none.
    "--config.upper.learning_rate=0",
    "--config.zo.learning_rate=0",
    "--config.train.num_steps=8",
    "--config.train.eval_every_steps=4",
  )
  assert code == 0
  assert "adapter s, kept" in capsys.readouterr().out
  summary = json.loads((folder / "summary.json").read_text())
  assert summary["test_accuracy_p"] == summary["zero_shot_accuracy"]
  assert summary["test_accuracy"] > 0.8 > summary["test_accuracy_p"]
  assert summary["selection_accuracy"] > 0.8

  assert command_line("evaluate", f"--workdir={folder}") == 0
  evaluation = json.loads((folder / "evaluation.json").read_text())
  assert evaluation["accuracy"] == summary["test_accuracy"]

  exported = tmp_path / "adapter"
  assert (
    main.main(["export", str(folder), str(exported), "--what=adapter"]) == 0
  )
  run = run_lib.make_run(run_lib.read_config(epath.Path(folder)))
  exported_adapter = peft.load(
    exported, run.model.family, run.model.module.config
  )
  saved_adapter = evaluate.restore(run, epath.Path(folder)).lower
  jax.tree.map(
    np.testing.assert_array_equal,
    *(jax.tree.leaves(tree) for tree in (exported_adapter, saved_adapter)),
  )


@pytest.mark.parametrize(
  "changes", [{"method": "peft"}, {"command": "metatrain"}]
)
def test_s_is_bilevel_zofos_on_one_task(changes):
  config = tiny.base_config()
  config.keep = "s"
  config.update(changes)
  with pytest.raises(UserError, match=r"^config\.keep: "):
    check(config)
