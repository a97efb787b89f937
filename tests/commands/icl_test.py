"""In-context learning, linear probe and head on a tiny model, end to end."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from tests import tiny
from zofo_jax import errors
from zofo_jax.commands import head, icl, probe
from zofo_jax.evaluation import in_context

LLAMA = pathlib.Path(__file__).parents[2] / "configs" / "llama.py"


@pytest.fixture
def config(tiny_model, tiny_rows):
  fields = tiny.base_config()
  fields.model.name = str(tiny_model)
  fields.data.dir = str(tiny_rows)
  fields.data.task = "rotten_tomatoes"
  fields.data.num_selection = 8
  return fields


def write_rows(folder, make_row):
  """Writes rows of (number, text), to train on and to validate by."""
  folder.mkdir()
  for split, count in (("train", 12), ("validation", 3)):
    rows = [make_row(i, f"a {split} {i}") for i in range(count)]
    text = "\n".join(map(json.dumps, rows))
    (folder / f"{split}.jsonl").write_text(text)
  return str(folder)


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_command_line(command_line, tiny_model, tiny_rows, tmp_path):
  code = command_line(
    "icl",
    f"--config={LLAMA}",
    f"--workdir={tmp_path}",
    f"--config.model.name={tiny_model}",
    f"--config.data.dir={tiny_rows}",
    # A task of one's own, under the rows' own column names.
    "--config.data.task=mine",
    "--config.data.prompt={text} It was",
    "--config.data.options=(' terrible', ' great')",
    "--config.data.num_selection=8",
    "--config.icl.num_shots=0",
  )
  assert code == 0
  outcome = json.loads((tmp_path / "icl.json").read_text())
  assert outcome["task"] == "mine" and outcome["num_test_rows"] == 64
  answers = lines(tmp_path / "icl.jsonl")
  right = [line["prediction"] in line["right"] for line in answers]
  assert outcome["accuracy"] == pytest.approx(np.mean(right))
  low, high = outcome["accuracy_interval"]
  assert low <= outcome["accuracy"] <= high


def test_rows_too_long_to_be_trained_on_are_answered(config, tmp_path):
  config.icl.num_shots = 2
  whole = icl.icl(config, str(tmp_path))
  scores = [line["scores"] for line in lines(tmp_path / "icl.jsonl")]
  config.data.max_length = 4
  with pytest.raises(errors.UserError, match="at most 4 fit"):
    icl.icl(config, str(tmp_path))
  config.data.long_rows = "drop"
  assert icl.icl(config, str(tmp_path)) == whole
  assert [x["scores"] for x in lines(tmp_path / "icl.jsonl")] == scores


def test_sets_of_demonstrations_and_calibration(config, tmp_path):
  config.icl.num_shots = 2
  config.icl.num_sets = 2
  plain = icl.icl(config, str(tmp_path))
  accuracies = [one["accuracy"] for one in plain["sets"]]
  assert plain["accuracy"] == pytest.approx(np.mean(accuracies))
  assert plain["worst_accuracy"] == min(accuracies)
  before = [line["scores"] for line in lines(tmp_path / "icl.jsonl")]
  config.icl.calibration = "domain"
  icl.icl(config, str(tmp_path))
  after = [line["scores"] for line in lines(tmp_path / "icl.jsonl")]
  # Options of one token: the same is taken off every row of a set.
  off = np.array(before) - np.array(after)
  np.testing.assert_allclose(
    off, np.broadcast_to(off[:1], off.shape), atol=1e-4
  )
  assert abs(off[0, 0] - off[0, 1]) > 1e-3


def test_demonstrations_are_read_once(config, tmp_path, monkeypatch):
  """Scores are those of rows that hold them, with a window too."""
  config.icl.num_shots = 4
  seen, split = [], in_context.split_shared

  def watched(examples):
    seen.append(len(split(examples)[0]))
    return split(examples)

  scores = []
  for change in (watched, lambda examples: ((), examples)):
    monkeypatch.setattr(in_context, "split_shared", change)
    icl.icl(config, str(tmp_path))
    scores.append([line["scores"] for line in lines(tmp_path / "icl.jsonl")])
  np.testing.assert_allclose(*scores, atol=2e-5)
  assert seen[0] > 12
  folder = tmp_path / "windowed"
  shutil.copytree(config.model.name, folder)
  fields = json.loads((folder / "config.json").read_text())
  fields |= {"model_type": "mistral", "sliding_window": 8}
  (folder / "config.json").write_text(json.dumps(fields))
  config.model.name = str(folder)
  windowed = []
  for change in (watched, lambda examples: ((), examples)):
    monkeypatch.setattr(in_context, "split_shared", change)
    icl.icl(config, str(tmp_path))
    windowed.append([line["scores"] for line in lines(tmp_path / "icl.jsonl")])
  np.testing.assert_allclose(*windowed, atol=2e-5)
  assert np.abs(np.subtract(scores[0], windowed[0])).max() > 1e-3


def test_probe_and_head_learn(config, tmp_path):
  """One word decides the label, and random features keep it."""
  assert probe.linear_probe(config, str(tmp_path))["accuracy"] > 0.9
  config.head.num_steps = 60
  config.head.learning_rate = 0.1
  for rows in ("labels", "all"):
    config.head.rows = rows
    assert head.head(config, str(tmp_path))["accuracy"] > 0.8
  assert len(lines(tmp_path / "head.jsonl")) == 64


def test_probe_needs_fixed_options(config, tmp_path):
  config.data.task = "copa"
  with pytest.raises(errors.UserError, match=r"linear probe.*multiple choice"):
    probe.linear_probe(config, str(tmp_path))


def test_generated_answers(config, tmp_path):
  """Zero-shot and with demonstrations; no head, and nothing to calibrate."""
  config.data.dir = write_rows(
    tmp_path / "rows", lambda i, text: {"q": text, "a": ["dull", "warm"]}
  )
  config.data.task = "mine"
  config.data.prompt = "{q} It was"
  config.data.label = "a"
  config.data.num_selection = 2
  config.generate.max_new_tokens = 3
  prompts = []
  for shots in (0, 2):
    config.icl.num_shots = shots
    outcome = icl.icl(config, str(tmp_path))
    assert 0 <= outcome["exact_match"] <= outcome["token_f1"] <= 1
    answers = lines(tmp_path / "icl.jsonl")
    assert [line["answers"] for line in answers] == [["dull", "warm"]] * 3
    prompts.append([line["prediction"] for line in answers])
  assert prompts[0] != prompts[1]
  with pytest.raises(errors.UserError, match=r"head is trained on options"):
    head.head(config, str(tmp_path))
  config.icl.calibration = "domain"
  with pytest.raises(errors.UserError, match=r"icl\.calibration.*'none'"):
    icl.icl(config, str(tmp_path))


@pytest.mark.slow
def test_every_row_is_calibrated_by_its_own_options(config, tmp_path):
  pairs = [("dull", "warm"), ("film", "sea"), ("cast", "dog")]

  def row(i, text):
    x, y = pairs[i % 3]
    return {"q": text, "x": x, "y": y, "label": i % 2}

  config.data.dir = write_rows(tmp_path / "rows", row)
  config.data.task = "mine"
  config.data.prompt = "{q} It"
  config.data.options = (" {x}", " {y}")
  config.data.num_selection = 2
  config.icl.num_shots = 0
  scores = []
  for calibration in ("none", "contextual"):
    config.icl.calibration = calibration
    icl.icl(config, str(tmp_path))
    scores.append([line["scores"] for line in lines(tmp_path / "icl.jsonl")])
  off = np.array(scores[0]) - np.array(scores[1])
  # A share of the two options each, of other options in every row.
  np.testing.assert_allclose(np.exp(off).mean(), 0.5, atol=0.05)
  assert len(np.unique(np.round(off, 4), axis=0)) == 3
