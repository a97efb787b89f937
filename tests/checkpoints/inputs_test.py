"""What a run rests on: a change between two of its commands is noticed.

The folders here have no checkpoint: what has changed is noticed before one is
read. `state_store_test.py` has a run with one.
"""

import json
import shutil

import numpy as np
import pytest
from etils import epath

from tests import tiny
from zofo_jax import errors, report
from zofo_jax.builders import run as run_lib
from zofo_jax.checkpoints import inputs, ledger, manager, state_store
from zofo_jax.checkpoints.ledger import replay
from zofo_jax.commands import evaluate, export, head, icl, predict, probe
from zofo_jax.training import train

ROWS = [
  {"text": f"a {'dull' if i % 2 else 'warm'} film number {i}", "label": i % 2}
  for i in range(120)
]


@pytest.fixture
def config(tiny_model, tmp_path):
  """A config of a model and of one file of 80 rows, which may be changed."""
  shutil.copytree(tiny_model, tmp_path / "model")
  write_rows(tmp_path, ROWS[:80])
  config = tiny.base_config()
  config.model.name = str(tmp_path / "model")
  config.data.task = "mine"
  config.data.prompt = "{text} It was"
  config.data.options = (" terrible", " great")
  config.data.dir = str(tmp_path / "rows.jsonl")
  config.data.num_lower, config.data.num_upper = 20, 10
  config.data.num_selection, config.data.num_test = 10, 20
  return config


def write_rows(folder, rows):
  report.write_lines(folder / "rows.jsonl", rows)


@pytest.fixture
def folder(config, tmp_path):
  """The folder of a run of this config, as if it had begun."""
  run = run_lib.make_run(config)
  folder = epath.Path(tmp_path / "run")
  described = inputs.check(run, folder, run.load_examples().fingerprints)
  report.write_json(folder / "config.json", config.to_dict())
  report.write_json(folder / inputs.FILE, described)
  return folder


def check(config, folder, **options):
  run = run_lib.make_run(config)
  return inputs.check(run, folder, run.load_examples().fingerprints, **options)


def edit(path, change):
  content = json.loads(path.read_text())
  change(content)
  path.write_text(json.dumps(content))


def test_nothing_has_changed(config, folder, caplog):
  described = check(config, folder)
  assert described == json.loads((folder / inputs.FILE).read_text())
  assert described["rows"]["test"]["count"] == 20
  assert not caplog.records


def test_rows_appended_to_the_file(config, folder, tmp_path, monkeypatch):
  """Another number of rows is another split: test rows were trained on."""
  write_rows(tmp_path, ROWS)
  changed = (
    "the rows changed since the run began: other rows in lower (20 then, 20 "
    "now), other rows in upper (10 then, 10 now), other rows in selection (10 "
    "then, 10 now), other rows in test (20 then, 20 now); expected the same, "
    "or 'rows' in "
  )
  monkeypatch.setattr(state_store, "check_exists", lambda folder: None)
  for command, flag in (
    (lambda: evaluate.evaluate_run(str(folder)), "--may_change"),
    (lambda: train.train(config, str(folder)), "config.ckpt.may_change"),
    (lambda: icl.icl(config, str(folder)), "config.ckpt.may_change"),
    (lambda: probe.linear_probe(config, str(folder)), "config.ckpt.may_change"),
    (lambda: head.head(config, str(folder)), "config.ckpt.may_change"),
  ):
    with pytest.raises(errors.UserError) as caught:
      command()
    assert f"{changed}{flag}." in str(caught.value)
  check(config, folder, may_change=["rows"])
  config.ckpt.may_change = ("rows",)
  assert check(config, folder)["rows"] != inputs.read(folder)["rows"]
  with pytest.raises(errors.UserError, match="the rows changed"):
    check(config, folder, may_change=["tokenizer"])


def test_a_row_that_was_corrected(config, folder, tmp_path):
  rows = [dict(row) for row in ROWS[:80]]
  for row in rows[:20]:  # some are in a set, some are not
    row["text"] = row["text"].replace("film", "movie")
  write_rows(tmp_path, rows)
  with pytest.raises(errors.UserError, match=r"began: other rows in \w+"):
    check(config, folder)


def test_other_weights(config, folder, tmp_path, monkeypatch):
  """θ of a checkpoint hides them, where they are not read again."""
  monkeypatch.setattr(state_store, "check_exists", lambda folder: None)
  path = tmp_path / "model" / "model.safetensors"
  content = path.read_bytes()
  path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
  message = r"weights changed since the run began: model\.safetensors; expected"
  with pytest.raises(errors.UserError, match=message):
    train.train(config, str(folder))
  with pytest.raises(errors.UserError, match=message):
    evaluate.evaluate_run(str(folder))
  check(config, folder, may_change=["weights"])
  path.write_bytes(content)
  check(config, folder)


def test_another_tokenizer(config, folder, tmp_path, monkeypatch):
  monkeypatch.setattr(state_store, "check_exists", lambda folder: None)

  def swap(content):
    vocabulary = content["model"]["vocab"]
    a, b = list(vocabulary)[5:7]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]

  edit(tmp_path / "model" / "tokenizer.json", swap)
  write_rows(tmp_path, ROWS[:80])
  changed = r"the tokenizer changed since the run began: tokenizer\.json; "
  for command in (
    lambda: check(config, folder),
    lambda: evaluate.evaluate_run(str(folder)),
    lambda: predict.predict(str(folder), config.data.dir, None),
    lambda: export.export(str(folder), str(tmp_path / "out"), "adapter"),
  ):
    with pytest.raises(errors.UserError, match=changed):
      command()
  check(config, folder, may_change=["tokenizer"])


def test_a_tokenizer_that_gives_the_same_tokens(config, folder, tmp_path):
  path = tmp_path / "model" / "tokenizer.json"
  path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
  edit(
    tmp_path / "model" / "tokenizer_config.json",
    lambda content: content.update(chat_template="{{ messages }}"),
  )
  check(config, folder)


def test_another_model_config(config, folder, tmp_path):
  path = tmp_path / "model" / "config.json"
  edit(path, lambda content: content.update(rms_norm_eps=1e-3))
  with pytest.raises(errors.UserError, match=r"model config .* is 0\.001"):
    check(config, folder)
  check(config, folder, may_change=["model_config"])


def test_other_random_numbers(config, folder):
  path = folder / inputs.FILE
  edit(path, lambda content: content["random"].update(impl="rbg"))
  with pytest.raises(errors.UserError, match=r"impl was 'rbg', .* same\.$"):
    check(config, folder, may_change=["rows"])


def test_other_versions_and_flags_are_a_warning(config, folder, caplog):
  def change(content):
    content["versions"]["jax"] = "0.0.1"
    content["rounding"]["NVIDIA_TF32_OVERRIDE"] = "1"
    content["versions"]["gone"] = "1"

  edit(folder / inputs.FILE, change)
  check(config, folder)
  first, second = caplog.messages
  assert "jax was '0.0.1', is '" in first and "gone" not in first
  assert "NVIDIA_TF32_OVERRIDE was '1', is None" in second


def test_a_run_of_an_older_version_is_read(config, folder, tmp_path):
  write_rows(tmp_path, ROWS)
  (folder / inputs.FILE).unlink()
  assert inputs.read(folder) == {}
  (folder / state_store.LEDGER).write_text(ledger.start({"key": [0, 1]}))
  check(config, folder)


def test_without_the_file_the_ledger_tells(config, folder, tmp_path):
  described = inputs.read(folder)
  (folder / inputs.FILE).unlink()
  text = ledger.start({"inputs": described})
  (folder / state_store.LEDGER).write_text(text)
  assert inputs.read(folder) == described
  (folder / state_store.LEDGER).unlink()
  with manager.Checkpoints(folder / "checkpoints", keep=1) as checkpoints:
    checkpoints.save(1, {"x": np.zeros(3)}, {"ledger": text})
  assert inputs.read(folder) == described
  write_rows(tmp_path, ROWS)
  with pytest.raises(errors.UserError, match="the rows changed"):
    check(config, folder)


def test_a_broken_file_is_one_sentence(config, folder):
  (folder / inputs.FILE).write_text("{")
  with pytest.raises(errors.UserError, match="not the inputs of a run"):
    check(config, folder)


def test_a_ledger_of_other_random_numbers_is_not_replayed():
  header = {"inputs": {"random": replay.RANDOM | {"impl": "rbg"}}}
  with pytest.raises(errors.UserError, match=r"'x' was written with .*'rbg'"):
    replay.advance({}, header, [None], "x")


def test_the_flag_names_what_may_change(command_line, capsys):
  assert command_line("evaluate", "--workdir=x", "--may_change=row") == 2
  shown = capsys.readouterr().err
  assert "--may_change: expected some of rows, tokenizer, model_config" in shown
  assert "found 'row'." in shown
