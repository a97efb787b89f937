"""Every mistake of a user ends in one sentence, before anything is compiled."""

import json
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import warnings

import jax
import pytest

from tests import tiny
from zofo_jax import main
from zofo_jax.commands import arguments as arguments_lib
from zofo_jax.config import defaults

ROOT = pathlib.Path(__file__).parents[2]
LLAMA = ROOT / "configs" / "llama.py"
COUNTS = {"lower": 96, "upper": 48, "selection": 48, "test": 64}


@pytest.fixture
def complaint(command_line, capsys):
  """Runs a wrong command and returns its one sentence."""
  compiled = []

  def note(event, duration, **details):
    if event == "/jax/core/compile/backend_compile_duration":
      compiled.append(details)

  def run(*arguments):
    capsys.readouterr()
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
      code = command_line(*arguments)
    finally:
      jax.monitoring.unregister_event_duration_listener(note)
    lines = capsys.readouterr().err.splitlines()
    assert code == 2
    assert len(lines) == 1 and lines[0].startswith("zofo_jax: "), lines
    assert not compiled
    return lines[0].removeprefix("zofo_jax: ")

  return run


@pytest.fixture
def train(complaint, tiny_model, tiny_rows, tmp_path):
  """Trains, as it were, on good files but for what is given."""

  def run(*changes, config=LLAMA, model=tiny_model, rows=tiny_rows):
    return complaint(
      f"--config={config}",
      f"--workdir={tmp_path / 'run'}",
      f"--config.model.name={model}",
      f"--config.data.dir={rows}",
      "--config.data.task=rotten_tomatoes",
      # As many as there are: nothing to warn of.
      *(f"--config.data.num_{name}={count}" for name, count in COUNTS.items()),
      *changes,
    )

  return run


def parts(text, *expected):
  for part in expected:
    assert str(part) in text, text


# The command.


@pytest.mark.parametrize(
  "arguments, expected",
  [
    (["trian"], ["trian", "train, evaluate, predict, icl", "mean 'train'"]),
    (["train", "now"], ["expected one command", "train now"]),
    (["--wrokdir=x"], ["wrokdir", "mean", "workdir"]),
    ([], ["--workdir", "expected a folder"]),
    (["--workdir=x"], ["--config", "configs/demo.py"]),
    (["--config.zo.eps=1"], ["--config", "configs/demo.py"]),
    (["plan"], ["--config", "configs/demo.py"]),
    (["plan", "--config=opt"], ["--topology", "v5e:4x4"]),
    (["evaluate", "--config=opt"], ["--config", "zofo evaluate", "no such"]),
    (["tasks", "now"], ["expected one command", "tasks now"]),
    (["ledger", "inf"], ["zofo ledger", "'inf'", "info", "replay"]),
    (["export", "run"], ["zofo export", "folder, --what"]),
    (["icl", "--process_id=1", "--config=opt", "--workdir=x"], ["HOST:PORT"]),
  ],
)
def test_command(complaint, arguments, expected):
  parts(complaint(*arguments), *expected)


def test_commands_that_a_config_can_name():
  assert set(arguments_lib._RUNNERS) == set(defaults.COMMANDS)


def test_commands_of_a_saved_run_need_one(complaint, tmp_path):
  for command in (["evaluate"], ["predict", "--input=rows.jsonl"]):
    text = complaint(*command, f"--workdir={tmp_path}")
    parts(text, tmp_path, "no run", "config.json")


def test_predict_needs_rows(complaint, tmp_path):
  text = complaint("predict", f"--workdir={tmp_path}")
  parts(text, "--input", "expected a file")


def test_predict_reads_one_file_and_writes_another(
  complaint, tmp_path, monkeypatch
):
  monkeypatch.setenv("HOME", str(tmp_path))
  text = complaint("predict", f"--workdir={tmp_path}", "--input=~/")
  parts(text, f"--input: {tmp_path} is a folder; expected a file")
  rows = tmp_path / "answers.jsonl"
  rows.write_text('{"text": "a film"}')
  (tmp_path / "link.jsonl").symlink_to(rows)
  for output in ([], [f"--output={rows}"], ["--output=~/link.jsonl"]):
    text = complaint(
      "predict", f"--workdir={tmp_path}", "--input=~/answers.jsonl", *output
    )
    parts(text, "--output", "is the file of --input", "another file")
  assert rows.read_text() == '{"text": "a film"}'


def test_compiling_is_noticed(complaint, monkeypatch):
  from zofo_jax import errors, main

  def compile_and_fail(argv):
    jax.jit(lambda x: x + 1)(1.0)
    raise errors.UserError("Too late.")

  monkeypatch.setattr(main, "_run", compile_and_fail)
  with pytest.raises(AssertionError, match="fun_name"):
    complaint("train")


def test_exit_code_and_traceback_of_a_real_process():
  done = subprocess.run(
    [sys.executable, "-m", "zofo_jax.main", "evaluat", "--workdir=x"],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  assert done.returncode == 2 and not done.stdout
  assert done.stderr == (
    "zofo_jax: expected one command of train, evaluate, predict, icl, "
    "probe, head, metatrain, adapt, plan, export, ledger, report, sweep, "
    "models, tasks, assets; found 'evaluat'. Did you mean 'evaluate'?\n"
  )


# The config.


@pytest.mark.parametrize(
  "change, expected",
  [
    ("--config.zo.esp=1e-3", ["config.zo.esp", "mean 'config.zo.eps'"]),
    ("--config.zo.eps=small", ["config.zo.eps", "small"]),
    ("--config.lora.rank=2.5", ["config.lora.rank", "2.5"]),
    ("--config.model.remat=often", ["config.model.remat", "often"]),
    ("--config.zo.eps=0", ["config.zo.eps", "more than 0", "found 0"]),
    ("--config.zo.eps=nan", ["config.zo.eps", "more than 0", "found nan"]),
    (
      "--config.lower.learning_rate=-1e-3",
      ["config.lower.learning_rate", "0 or more", "-0.001"],
    ),
    ("--config.penalty=-1", ["config.penalty", "0 or more", "-1"]),
    ("--config.train.num_steps=0", ["config.train.num_steps", "found 0"]),
    ("--config.loss=clasification", ["config.loss", "mean 'classification'"]),
    ("--config.zo.optimizer=adm", ["config.zo.optimizer", "mean 'adam'"]),
    ("--config.zo.direction=gauss", ["zo.direction", "mean 'gaussian'"]),
    ("--config.zo.estimator=centre", ["zo.estimator", "central, forward"]),
    ("--config.model.dtype=float16", ["model.dtype", "mean 'bfloat16'"]),
    ("--config.data.long_rows=trunc", ["long_rows", "mean 'truncate'"]),
    (
      "--config.lora.targets=atention/q",
      ["targets", "'atention/q'", "attention/query"],
    ),
    ("--config.lora.targets=(query", ["lora.targets", "(query"]),
    ("--config.zo.objective=acuracy", ["objective", "mean 'accuracy'"]),
    ("--config.zo.objective=nowhere:f", ["objective", "import", "nowhere"]),
    ("--config.zo.select=(head", ["zo.select", "(head"]),
    ("--config.zo.select=hed", ["zo.select", "'hed'", "head/embedding"]),
    ("--config.zo.layers=(1, 2)", ["zo.layers", "0 to 1", "(1, 2)"]),
    ("--config.data.metric=acc", ["data.metric", "accuracy, macro_f1"]),
    ("--config.data.options=(' a', ' b')", ["data.options", "data.prompt"]),
    ("--config.data.prompt={text} It", ["data.prompt", "rotten_tomatoes"]),
    ("--config.data.shots=200", ["label", "400 rows per label"]),
    ("--config.icl.calibration=sfc", ["calibration", "contextual, domain"]),
    ("--config.data.task=ssst2", ["'ssst2'", "mean 'sst2'"]),
    ("--config.data.task=squad", ["task squad", "no column 'title'"]),
    ("--config.data.template=7", ["rotten_tomatoes", "7", "0, 1"]),
    ("--config.model.name=", ["config.model.name", "found nothing"]),
  ],
)
def test_field(train, change, expected):
  parts(train(change), *expected)


@pytest.mark.parametrize(
  "choice, expected",
  [
    ("size=smollm-135m", ["size", "mean 'smollm2-135m'"]),
    ("szie=2-7b", ["szie", "size, task, preset", "mean 'size'"]),
    ("size", ["name=value", "'size'"]),
    ("preset=refrence", ["preset", "mean 'reference'"]),
    ("preset=reference,task=mpqa", ["mpqa", "boolq, cb"]),
  ],
)
def test_choice(train, choice, expected):
  parts(train(config=f"{LLAMA}:{choice}"), *expected)


def test_config_file(complaint, tmp_path):
  text = complaint("--config=configs/optt.py", "--workdir=x")
  parts(text, "configs/optt.py", "demo, gemma", "mean 'opt'")
  empty = tmp_path / "empty.py"
  empty.write_text("")
  parts(complaint(f"--config={empty}", "--workdir=x"), empty, "get_config")


@pytest.mark.parametrize(
  "body, expected",
  [
    ("import nowhere\n", ["config.py:1 raised ModuleNotFound", "nowhere"]),
    ("def get_config(:\n", ["config.py", "SyntaxError"]),
    ("def get_config():\n  return x.y\n", ["config.py:2 raised NameError"]),
    ("def get_config():\n  pass\n", ["NoneType", "expected a ConfigDict"]),
    (
      "from zofo_jax import errors\n"
      "def get_config():\n  raise errors.UserError('So it is.')\n",
      ["So it is."],
    ),
  ],
)
def test_broken_config_file(complaint, tmp_path, body, expected):
  path = tmp_path / "config.py"
  path.write_text(body)
  parts(complaint(f"--config={path}", "--workdir=x"), *expected)


# The model.


@pytest.fixture
def model_copy(tiny_model, tmp_path):
  return shutil.copytree(tiny_model, tmp_path / "copy")


def test_model_folder(train, tmp_path):
  text = train(model=tmp_path / "gone")
  parts(text, tmp_path / "gone", "does not exist")
  (tmp_path / "empty").mkdir()
  text = train(model=tmp_path / "empty")
  parts(text, "no checkpoint", "no config.json and no model.safetensors")


def test_truncated_weights(train, model_copy):
  path = model_copy / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-100])
  parts(train(model=model_copy), path, "truncated")


@pytest.mark.parametrize(
  "changes, expected",
  [
    (
      {"intermediate_size": 48},
      ["mlp.down_proj", "(32, 64)", "config.json", "(32, 48)"],
    ),
    ({"num_hidden_layers": 3}, ["no tensor", "layers.2"]),
    ({"num_hidden_layers": 1}, ["no place", "layers.1"]),
    ({"model_type": "lama"}, ["model_type", "mean 'llama'"]),
    ({"vocab_size": 300}, ["train.jsonl row", "the model has 300 tokens"]),
  ],
)
def test_model_of_another_shape(train, model_copy, changes, expected):
  path = model_copy / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))
  parts(train(model=model_copy), *expected)


def test_mistake_in_the_weights_can_be_mended(train, model_copy, tmp_path):
  """Nothing of a run that never began stands in the way of the next."""
  path = model_copy / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-100])
  train(model=model_copy)
  text = train("--config.data.max_length=30", model=model_copy)
  parts(text, path, "truncated")


def test_broken_config_of_a_model(train, model_copy):
  (model_copy / "config.json").write_text("{")
  parts(train(model=model_copy), model_copy / "config.json", "not a JSON")


def test_model_without_tokenizer(train, model_copy):
  (model_copy / "tokenizer.json").unlink()
  parts(train(model=model_copy), model_copy, "tokenizer")


# The rows.


@pytest.fixture
def rows_with(tiny_rows, tmp_path):
  """A folder of rows with another line 3 in train.jsonl."""

  def make(line):
    folder = shutil.copytree(tiny_rows, tmp_path / "rows")
    path = folder / "train.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = line
    path.write_text("\n".join(lines) + "\n")
    return folder

  return make


@pytest.mark.parametrize(
  "line, expected",
  [
    ('{"text": "a film", "label":', ["broken JSON"]),
    ('["a film", 1]', ['found ["a film", 1]', "expected a JSON object"]),
    ('{"txt": "a film", "label": 1}', ["no column 'text'", "mean 'txt'"]),
    ('{"text": "a film"}', ["no column 'label'"]),
    ('{"text": "a film", "label": 2}', ["label", "2", "from 0 to 1"]),
    ('{"text": "a film", "label": "good"}', ["label", "good", "0 to 1"]),
    ('{"text": " ", "label": 1}', ["column 'text'", "empty"]),
    ('{"text": 3, "label": 1}', ["column 'text'", "int", "text"]),
    (
      json.dumps({"text": "a cold film " * 60, "label": 0}),
      ["tokens", "at most 64", "long_rows"],
    ),
  ],
)
def test_row(train, rows_with, line, expected):
  parts(train(rows=rows_with(line)), "train.jsonl row 3", *expected)


def test_prompt_longer_than_asked(train):
  parts(train("--config.data.max_length=4"), "tokens", "at most 4", "row ")
  text = train("--config.data.max_length=4", "--config.data.long_rows=drop")
  parts(text, "none of", "fits in 4 tokens")


def test_data_folder(train, tmp_path, tiny_rows):
  near = str(tiny_rows)[:-1] + "z"
  parts(train(rows=near), "No data folder", near, f"mean '{tiny_rows.name}'")
  (tmp_path / "bare").mkdir()
  (tmp_path / "bare" / "notes.txt").touch()
  text = train(rows=tmp_path / "bare")
  parts(text, "no train.jsonl", "notes.txt")


def test_empty_split(train, rows_with):
  folder = rows_with("")
  (folder / "validation.jsonl").write_text("")
  parts(train(rows=folder), "validation", "no rows")


# The folder of the run.


def test_file_in_the_way_of_the_run(train, tmp_path):
  (tmp_path / "run").write_text("")
  parts(train(), "--workdir", tmp_path / "run", "a folder to write")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs Linux")
def test_unwritable_workdir(train):
  text = train("--workdir=/proc/run")  # refused even to root
  parts(text, "--workdir", "/proc/run", "a folder to write")


def test_another_config_than_the_run_began_with(
  train, command_line, tmp_path, tiny_model, tiny_rows
):
  config = tiny.base_config()
  config.model.name = str(tiny_model)
  config.data.dir = str(tiny_rows)
  config.data.task = "rotten_tomatoes"
  for name, count in COUNTS.items():
    config.data[f"num_{name}"] = count
  (tmp_path / "run" / "checkpoints").mkdir(parents=True)
  (tmp_path / "run" / "config.json").write_text(json.dumps(config.to_dict()))
  text = train("--config.zo.eps=0.01", "--config.seed=1")
  parts(text, "zo.eps was 0.001, is 0.01", "seed was 0, is 1", "--workdir")


def test_broken_config_of_a_run(complaint, tmp_path):
  (tmp_path / "config.json").write_text('{"seed": ')
  text = complaint("evaluate", f"--workdir={tmp_path}")
  parts(text, tmp_path / "config.json", "not a run's config")


@pytest.mark.parametrize("command", main.COMMANDS)
def test_every_command_has_a_module_and_help(command, capsys):
  with pytest.raises(SystemExit) as end:
    main.main([command, "--help"])
  assert end.value.code == 0
  out = capsys.readouterr().out
  assert out.startswith(f"usage: zofo {command} ")


@pytest.mark.parametrize(
  "module", ["main", "export", "ledger", "plan", "report", "sweep", "tasks"]
)
def test_modules_that_are_commands(module, monkeypatch, capsys):
  """`python -m zofo_jax.MODULE --help` shows the help of the command."""
  monkeypatch.setattr(sys, "argv", ["x", "--help"])
  with pytest.raises(SystemExit) as end, warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)  # it is imported already
    runpy.run_module(f"zofo_jax.{module}", run_name="__main__", alter_sys=True)
  assert end.value.code == 0
  name = "[COMMAND]" if module == "main" else module
  assert f"usage: zofo {name} " in capsys.readouterr().out


def test_a_config_names_the_command(monkeypatch, tmp_path):
  from zofo_jax.training.meta import adapt, train

  calls = []
  for module, name in ((adapt, "adapt"), (train, "metatrain")):
    monkeypatch.setattr(
      module, name, lambda config, workdir: calls.append((config, workdir))
    )
  assert main.main(["--config=metatrain:model=m", "--workdir=w"]) == 0
  assert main.main(["adapt", "--config=metatrain:group=nli"]) == 0
  (first, second) = calls
  assert (first[0].command, first[1]) == ("metatrain", "w")
  assert (second[0].command, second[1]) == (
    "adapt",
    "runs/metatrain,group=nli",
  )


def test_a_config_that_names_no_command(complaint):
  text = complaint("--config=opt", "--workdir=x", "--config.command=trian")
  parts(text, "config.command", "metatrain", "mean 'train'")


def test_help_is_no_mistake(command_line, capsys):
  assert command_line("--help") == 0
  out = capsys.readouterr().out
  for word in ("train", "evaluate", "predict", "--config", "--workdir"):
    assert re.search(rf"(?<!\w){word}", out), out
