"""What a shell hands over: paths, escapes, an environment, a umask."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from etils import epath

from tests import tiny
from zofo_jax import errors
from zofo_jax.builders import model
from zofo_jax.builders import run as run_lib
from zofo_jax.checkpoints import run_folder, state_store
from zofo_jax.commands import arguments
from zofo_jax.config import defaults, show
from zofo_jax.data import sources
from zofo_jax.plan import planner
from zofo_jax.report import html

# What takes long.
WORK = (
  (sources, "load"),
  (model, "load_base"),
  (planner, "plan"),
  (html, "page"),
)
# MeZO's step is the least to compile.
CONFIG = (
  "--config=llama:task=rotten_tomatoes,method=mezo",
  "--config.mesh.data=1",
  f"--config.zo.select={tiny.MOVED}",
  "--config.data.num_selection=40",
  "--config.loss=classification",
  "--config.train.num_steps=2",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A home with the model `m` and the rows `d`, which folders link to."""
  home = tmp_path_factory.mktemp("home")
  for name, write in (("m", tiny.write_model), ("d", tiny.write_rows)):
    (home / name).mkdir()
    write(home / name)
  (home / "link").symlink_to(home / "d")
  (home / "a").mkdir()
  (home / "b").mkdir()
  return home


@pytest.fixture
def train(command_line, home, monkeypatch, capsys):
  """Trains in a folder of the home; returns the exit code and sentence."""

  def run(folder, *arguments, command=()):
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / folder)
    capsys.readouterr()
    code = command_line(*command, *CONFIG, *arguments)
    return code, capsys.readouterr().err.strip()

  return run


FILES = ("--config.model.name=~/m", "--config.data.dir=../d/")


@pytest.fixture(scope="module")
def finished(command_line, home):
  """The folder of a run that names every path by a tilde or from here."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("HOME", str(home))
    patch.chdir(home / "a")
    umask = os.umask(0o022)
    try:
      assert command_line(*CONFIG, *FILES, "--workdir=~/run/") == 0
    finally:
      os.umask(umask)
  return home / "run"


def test_a_tilde_is_one_folder(finished, home):
  names = {path.name for path in finished.iterdir()}
  assert {"config.json", "metrics.jsonl", "summary.json"} <= names
  assert {"checkpoints", "ledger.txt"} <= names
  assert not any((home / "a").iterdir())


def test_a_run_is_evaluated_from_anywhere(
  finished, command_line, monkeypatch, tmp_path
):
  """Its rows are named from the folder in which it was started."""
  config = json.loads((finished / "config.json").read_text())
  assert config["data"]["dir"] == "../d"
  monkeypatch.chdir(tmp_path)
  assert command_line("evaluate", f"--workdir={finished}") == 0
  assert (finished / "evaluation.json").exists()


def test_another_folder_with_another_config_stops(finished, train):
  code, text = train(
    "b",
    "--workdir=~/run",
    "--config.model.name=../m",
    "--config.data.dir=../d",
    "--config.lower.learning_rate=0.5",
    "--config.data.seed=3",
  )
  assert code == 2
  assert "lower.learning_rate was 0.0001, is 0.5" in text
  assert "data.seed was 0, is 3" in text
  assert "model.name" not in text and "data.dir" not in text


def test_the_same_rows_by_another_name(finished, home, monkeypatch):
  monkeypatch.setenv("HOME", str(home))
  monkeypatch.chdir(home / "b")
  parser = arguments.make_parser("train", None)
  arguments.add_config(parser)
  for rows in ("~/d", "../link", "../b/../d", "~/link/", "../d/."):
    _, config = arguments.parse_config(
      parser,
      [*CONFIG, "--config.model.name=../m/", f"--config.data.dir={rows}"],
    )
    run_folder.check_config(defaults.flat(config), epath.Path(finished))


def test_a_run_of_relative_paths_is_resumed(finished, train, home):
  """As an earlier version wrote them."""
  old = shutil.copytree(finished, home / "old")
  path = old / "config.json"
  config = json.loads(path.read_text())
  del config["current_folder"]
  config["model"]["name"] = "~/m"
  path.write_text(json.dumps(config))
  code, _ = train("b", *FILES, "--workdir=~/old")
  assert code == 0
  assert (old / "metrics.jsonl").read_bytes() == (
    finished / "metrics.jsonl"
  ).read_bytes()


def test_checkpoints_without_a_config_stop(finished, train, home):
  bare = home / "bare"
  shutil.copytree(finished / "checkpoints", bare / "checkpoints")
  code, text = train(
    "a", *FILES, f"--workdir={bare}", "--config.lower.learning_rate=0.5"
  )
  assert code == 2
  assert str(bare / "checkpoints") in text
  assert f"expected {bare / 'config.json'}" in text
  assert not (bare / "metrics.jsonl").exists()


def test_an_adapter_by_a_tilde(train):
  code, text = train(
    "a",
    *FILES,
    "--workdir=~/x",
    "--config.method=bilevel",
    "--config.adapter.init_from=~/none",
  )
  assert code == 2 and "~" not in text and "/none" in text


def bits_of(folder):
  """Returns the bytes of each leaf of a run's last state."""
  run = run_lib.make_run(run_lib.read_config(epath.Path(folder)))
  with state_store.open_store(run, epath.Path(folder)) as store:
    state, _ = store.restore(2)
  state = state._replace(key=jax.random.key_data(state.key))
  return {
    jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
    for path, leaf in jax.tree.leaves_with_path(state)
  }


def test_no_shell_changes_the_result(
  finished, command_line, home, monkeypatch, tmp_path
):
  """Another folder and umask, no home: the same bits."""
  monkeypatch.delenv("HOME")
  monkeypatch.chdir(tmp_path)
  umask = os.umask(0o077)
  try:
    code = command_line(
      *CONFIG,
      f"--config.model.name={home / 'm'}",
      f"--config.data.dir={home / 'link'}",
      "--workdir=run",
    )
  finally:
    os.umask(umask)
  assert code == 0
  assert bits_of(tmp_path / "run") == bits_of(finished)
  ledgers = [
    (folder / "ledger.txt").read_text().splitlines()[1:]
    for folder in (tmp_path / "run", finished)
  ]
  assert ledgers[0] == ledgers[1] and len(ledgers[0]) == 2


@pytest.mark.parametrize(
  "argument, name, expected",
  [
    (r"--config.generate.stop=\n", "generate.stop", ("\n",)),
    (r"--config.generate.stop=('\n', '\t')", "generate.stop", ("\n", "\t")),
    (r"--config.generate.stop=('\\n',)", "generate.stop", (r"\n",)),
    (r"--config.icl.separator=\n###\n", "icl.separator", "\n###\n"),
    (r"--config.icl.separator=\\n", "icl.separator", r"\n"),
    ("--config.icl.separator=\n", "icl.separator", "\n"),
    (r"--config.data.prompt={q}\nA:", "data.prompt", "{q}\nA:"),
    (r"--config.lora.targets=\bquery", "lora.targets", r"\bquery"),
  ],
)
def test_escapes(argument, name, expected):
  config, _ = arguments.set_fields(defaults.base_config(), [argument])
  assert defaults.flat(config)[name] == expected
  # As two arguments, and as --print_config writes it.
  flag, _, value = argument.partition("=")
  config, _ = arguments.set_fields(defaults.base_config(), [flag, value])
  assert defaults.flat(config)[name] == expected
  (line,) = [
    line for line in show.as_arguments(config).splitlines() if flag in line
  ]
  (argument,) = shlex.split(line, comments=True)
  config, _ = arguments.set_fields(defaults.base_config(), [argument])
  assert defaults.flat(config)[name] == expected


@pytest.mark.parametrize(
  "name, value, expected",
  [
    ("generate.stop", r"(a\nb,", "texts, as ('a', 'b')"),
    ("zo.layers", "(1,", "whole numbers, as (0, 1)"),
    ("zo.eps", "small", "a number"),
    ("zo.num_directions", "2.5", "a whole number"),
    ("data.pooled", "maybe", "true or false"),
  ],
)
def test_a_value_of_another_type(name, value, expected):
  text = f"--config.{name}: expected {expected}; found '{value}'."
  for given in ([f"--config.{name}={value}"], [f"--config.{name}", value]):
    if name == "data.pooled" and len(given) == 2:
      continue  # `--config.data.pooled` alone is true
    with pytest.raises(errors.UserError) as caught:
      arguments.set_fields(defaults.base_config(), given)
    assert str(caught.value) == text


@pytest.mark.parametrize(
  "name", ["JAX_ENABLE_X64", "JAX_DEFAULT_PRNG_IMPL", "JAX_RANDOM_SEED_OFFSET"]
)
def test_a_variable_that_jax_cannot_read(name):
  done = subprocess.run(
    [sys.executable, "-m", "zofo_jax.main", "--help"],
    env={**os.environ, name: "banana"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert done.stderr == (
    f"zofo_jax: {name}: expected a value that jax knows; found 'banana'.\n"
  )


@pytest.mark.parametrize(
  "platform", ["cuda", pytest.param("cpuu", marks=pytest.mark.slow)]
)
def test_a_platform_that_is_not_there(platform):
  """In a process of its own: JAX looks for devices once."""
  code = """
from zofo_jax import errors
from zofo_jax.sharding import mesh
try:
  mesh.make({"data": 1, "fsdp": 1, "model": 1, "pert": 1})
except errors.UserError as error:
  print(error)
"""
  done = subprocess.run(
    [sys.executable, "-c", code],
    env={**os.environ, "JAX_PLATFORMS": platform},
    capture_output=True,
    text=True,
  )
  assert "JAX_PLATFORMS: expected some of cpu" in done.stdout
  assert f"found '{platform}'" in done.stdout
  assert ("Did you mean" in done.stdout) == (platform == "cpuu")
  assert done.stdout.count("\n") == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize(
  "arguments",
  [
    ("predict", "--workdir={run}", "--input={run}/x", "--output={file}/a"),
    ("predict", "--workdir={run}", "--input={run}/x", "--output={run}"),
    ("export", "{run}", "{file}/export", "--what=base"),
    ("plan", "--config=llama", "--topology=cpu:1", "--json={file}/plan.json"),
    ("report", "{run}", "--out={file}/report.html"),
    ("ledger", "replay", "--ledger={run}/ledger.txt", "--out={file}/theta"),
    ("icl", "--config=llama", "--workdir={file}/icl"),
    ("sweep", "--sweep=sweeps/theta", "--workdir={file}/sweep"),
  ],
)
def test_outputs_are_checked_before_the_work(
  finished, command_line, capsys, tmp_path, monkeypatch, arguments
):
  (tmp_path / "file").write_text("")
  monkeypatch.chdir(finished.parent / "a")
  for module, name in WORK:
    monkeypatch.setattr(module, name, None)  # fails if it is called
  names = {"run": finished, "file": tmp_path / "file"}
  assert command_line(*(part.format(**names) for part in arguments)) == 2
  text = capsys.readouterr().err
  assert text.startswith("zofo_jax: ") and text.count("\n") == 1
  assert "cannot be written to" in text or "is a folder" in text
