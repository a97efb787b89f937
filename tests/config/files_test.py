"""Config files: what follows the colon, paths and names."""

import pathlib

import pytest

from zofo_jax import errors
from zofo_jax.commands import arguments
from zofo_jax.config import defaults, files

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
  "arg, expected",
  [
    ("", {"size": "s", "task": "t"}),
    ("task=rte", {"size": "s", "task": "rte"}),
    ("size=1.3b,task=cb", {"size": "1.3b", "task": "cb"}),
    ("task=cb,,size=a=b,", {"size": "a=b", "task": "cb"}),
  ],
)
def test_parse_arg(arg, expected):
  assert files.parse_arg(arg, size="s", task="t") == expected


@pytest.mark.parametrize(
  "arg, expected",
  [
    ("tsk=rte", "there is no 'tsk' to choose; choose from size, task. Did"),
    ("rte", "expected name=value, found 'rte'"),
    ("task=rte,1.3b", "expected name=value, found '1.3b'"),
  ],
)
def test_parse_arg_mistakes(arg, expected):
  with pytest.raises(errors.UserError) as caught:
    files.parse_arg(arg, size="s", task="t")
  assert f"--config=...:{arg}: {expected}" in str(caught.value)


def test_choose():
  assert files.choose("size", "a", {"a": "x"}) == "x"
  with pytest.raises(errors.UserError, match=r"no size 'smal'.*mean 'small'"):
    files.choose("size", "smal", {"small": "x", "large": "y"})


def test_names_are_those_of_the_shipped_files():
  assert files.folder() == ROOT / "configs"
  paths = (ROOT / "configs").glob("*.py")
  assert files.names() == sorted(path.stem for path in paths)


@pytest.mark.parametrize(
  "name, expected",
  [
    ("opt", "configs/opt.py"),
    ("opt.py", "configs/opt.py"),
    ("configs/opt.py", "configs/opt.py"),
    ("sweeps/theta", "configs/sweeps/theta.py"),
  ],
)
def test_find_from_anywhere(monkeypatch, tmp_path, name, expected):
  monkeypatch.chdir(tmp_path)
  assert files.find(name) == ROOT / expected
  (tmp_path / "opt.py").write_text("")
  if name == "opt.py":  # a file comes before a name
    assert files.find(name) == pathlib.Path("opt.py")


def test_a_folder_inside_the_package_comes_first(monkeypatch, tmp_path):
  """As a wheel has it."""
  package = tmp_path / "site" / "zofo_jax"
  (package / "configs").mkdir(parents=True)
  (package / "configs" / "mine.py").write_text("")
  monkeypatch.setattr(files, "__file__", str(package / "config" / "files.py"))
  assert files.names() == ["mine"]
  assert files.find("mine") == package / "configs" / "mine.py"


@pytest.mark.parametrize("name", ["", "optt", "configs/none.py", "/none.py"])
def test_neither_file_nor_name(name):
  with pytest.raises(errors.UserError) as caught:
    files.find(name, "--sweep")
  text = str(caught.value)
  assert text.startswith("--sweep: expected a file or one of adapt, ")
  assert f"found '{name}'" in text
  assert ("mean 'opt'" in text) == (name == "optt")


def test_load_passes_what_follows_the_colon(tmp_path):
  config = files.load("opt:size=350m,task=rte")
  assert config.model.name == "facebook/opt-350m" and config.data.task == "rte"
  path = tmp_path / "mine.py"
  path.write_text(
    "from zofo_jax.config import base_config\n\n\ndef get_config(arg='none'):\n"
    "  config = base_config()\n  config.data.task = arg\n  return config\n"
  )
  for text, task in (("", "none"), (":", ""), (":a:b", "a:b")):
    assert files.load(f"{path}{text}").data.task == task
  with pytest.raises(errors.UserError, match=r"raised TypeError: .*get_config"):
    files.load("demo:1")


@pytest.mark.parametrize(
  "given, expected",
  [
    (["--config.zo.eps=1e-2"], ("zo.eps", 0.01)),
    (["--config.zo.eps", "1e-2"], ("zo.eps", 0.01)),
    (["--config.data.template", "-1"], ("data.template", -1)),
    (["--config.zo.layers=(1, 2)"], ("zo.layers", (1, 2))),
    (["--config.model.remat"], ("model.remat", True)),
    (["--noconfig.icl.balanced"], ("icl.balanced", False)),
    (["--config.data.prompt={text} It was"], ("data.prompt", "{text} It was")),
    (["--config.model.name=a/b"], ("model.name", "a/b")),
  ],
)
def test_set_fields(given, expected):
  config, others = arguments.set_fields(
    defaults.base_config(), [*given, "--other=1"]
  )
  assert others == ["--other=1"]
  assert defaults.flat(config)[expected[0]] == expected[1]
  with pytest.raises(AttributeError):
    config.unknown = 1


@pytest.mark.parametrize(
  "given", ["--config.lora.rank=2.5", "--config.zo=1", "--config.seed=a"]
)
def test_set_fields_mistakes(given):
  with pytest.raises(errors.UserError, match=given.partition("=")[0][2:]):
    arguments.set_fields(defaults.base_config(), [given])


@pytest.mark.parametrize(
  "config, folder",
  [
    ("demo", "runs/demo"),
    ("opt:size=125m,task=rte", "runs/opt,size=125m,task=rte"),
    ("adapt:run=runs/a+runs/b", "runs/adapt,run=runs_a+runs_b"),
    ("configs/demo.py", None),
    ("demo.py", None),
    (None, None),
  ],
)
def test_default_workdir(config, folder):
  assert arguments.default_workdir(config) == folder
