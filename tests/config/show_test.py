"""What stands in a command: choices, fields, and where they are told."""

import pathlib
import shlex

import pytest

from zofo_jax import errors
from zofo_jax.config import defaults, show

OPT = pathlib.Path(__file__).parents[2] / "configs" / "opt.py"
DEFAULTS = defaults.flat(defaults.base_config())


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
  assert defaults.parse_arg(arg, size="s", task="t") == expected


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
    defaults.parse_arg(arg, size="s", task="t")
  assert f"--config=...:{arg}: {expected}" in str(caught.value)


def test_choose():
  assert defaults.choose("size", "a", {"a": "x"}) == "x"
  with pytest.raises(errors.UserError, match=r"no size 'smal'.*mean 'small'"):
    defaults.choose("size", "smal", {"small": "x", "large": "y"})


def test_flat_and_unknown_field():
  assert DEFAULTS["zo.eps"] == 1e-3 and DEFAULTS["seed"] == 0
  assert DEFAULTS["model.name"] is None
  find = show.unknown_field
  assert find(["x", "--config.zo.eps=1", "--workdir=y"]) == ""
  assert find(["--config.lora.rnk=4"]) == (
    "--config.lora.rnk: there is no such field. Did you mean "
    "'config.lora.rank'?"
  )
  assert find(["--config.qqqq=4"]).startswith("--config.qqqq: there is no ")


@pytest.mark.parametrize(
  "argv, file",
  [
    (["--config=a/b.py"], "a/b.py"),
    (["-config=a.py:size=1"], "a.py"),
    (["train", "--config", "a.py:size=1", "--x"], "a.py"),
    (["--config"], ""),
    (["--config.zo.eps=1"], ""),
  ],
)
def test_file_of(argv, file):
  assert show.file_of(argv) == file


def test_print_config_is_every_field_as_an_argument(command_line, capsys):
  assert (
    command_line(
      f"--config={OPT}:task=rte", "--config.zo.eps=0.01", "--print_config"
    )
    == 0
  )
  lines = capsys.readouterr().out.splitlines()
  found = {}
  for line in lines:
    (argument, *about) = shlex.split(line, comments=True) or [""]
    assert not about
    if argument:
      name, _, value = argument.removeprefix("--config.").partition("=")
      assert name not in found
      found[name] = value
  config = defaults.base_config()
  assert found.keys() == defaults.flat(config).keys()
  assert found["zo.eps"] == "0.01" and found["data.task"] == "rte"
  (line,) = [line for line in lines if "zo.eps=" in line]
  assert line.endswith("# [default 0.001]")
  # What a comment in the source says, here too.
  assert "# of low_rank directions" in "".join(lines)
  assert "# zo: theta, zeroth order" in lines
