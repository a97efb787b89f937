"""The config as arguments, and as a page."""

import pathlib
import shlex

from zofo_jax.config import defaults, show

OPT = pathlib.Path(__file__).parents[2] / "configs" / "opt.py"


def test_print_config_is_every_field_as_an_argument(command_line, capsys):
  assert (
    command_line(
      f"--config={OPT}:task=rte", "--config.zo.eps=0.01", "--print_config"
    )
    == 0
  )
  lines = capsys.readouterr().out.splitlines()
  actual = {}
  for line in lines:
    (argument, *about) = shlex.split(line, comments=True) or [""]
    assert not about
    if argument:
      name, _, value = argument.removeprefix("--config.").partition("=")
      assert name not in actual
      actual[name] = value
  config = defaults.base_config()
  assert actual.keys() == defaults.flat(config).keys()
  assert actual["zo.eps"] == "0.01" and actual["data.task"] == "rte"
  (line,) = [line for line in lines if "zo.eps=" in line]
  assert line.endswith("# [default 0.001] radius of the finite difference")
  assert "# of low_rank directions" in "".join(lines)
  assert f"# zo: {defaults.SECTIONS['zo']}" in lines


def test_print_config_of_another_command(command_line, capsys):
  arguments = ("plan", "--config=opt", "--config.seed=3", "--print_config")
  assert command_line(*arguments) == 0
  assert "--config.seed=3" in capsys.readouterr().out


def test_the_page_has_every_field():
  page = show.as_markdown()
  for name, field in defaults.FIELDS.items():
    (line,) = [x for x in page.splitlines() if x.startswith(f"| `{name}` |")]
    assert field.help in line
    assert line.count(" | ") == 3
  assert "| `zo.eps` | `0.001` | more than 0 |" in page
  assert "| `keep` | `'p'` | p, s |" in page
