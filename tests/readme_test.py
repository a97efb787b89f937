"""The README's code runs, and its commands name what exists."""

import contextlib
import importlib.util
import io
import pathlib
import pydoc
import re
import shlex

import jax
import pytest

from zofo_jax import checks, main
from zofo_jax import config as config_lib

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FIELDS = config_lib.flat(config_lib.base_config())


def blocks(language):
  return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def commands():
  """Returns every command that begins with python, whatever its lines."""
  text = README.replace("\\\n", " ")
  return re.findall(r"(?:^|`)(python -m [^`\n]*)", text, re.M)


def test_python_block():
  (code,) = blocks("python")
  assert len(code.splitlines()) < 45
  out = io.StringIO()
  with contextlib.redirect_stdout(out), jax.numpy_rank_promotion("allow"):
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
  first, last = (
    [float(number) for number in re.findall(r"\d+\.\d+", line)]
    for line in out.getvalue().splitlines()
  )
  assert len(first) == len(last) == 2
  for before, after in zip(first, last, strict=True):
    assert after < 0.5 * before


def test_make_targets():
  rules = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
  named = set(re.findall(r"(?:^|`)make (\w+)", README, re.M))
  assert {"demo", "test"} <= named <= rules
  first = re.search(r"^```\n(.*?)^```", README, re.M | re.S)[1]
  assert [line.split("#")[0].split() for line in first.splitlines()] == [
    ["make", "demo"],
    ["make", "test"],
  ]


def test_commands():
  assert len(commands()) > 3
  for command in commands():
    module = command.split()[2]
    spec = importlib.util.find_spec(module)
    assert spec, command
    if spec.submodule_search_locations:
      assert importlib.util.find_spec(f"{module}.__main__"), command
    if module == "zofo_jax.main":
      words = shlex.split(command)[3:]
      arguments = [a for a in words if not a.startswith("--")]
      assert set(arguments) <= set(main.COMMANDS)


def configs():
  return sorted(set(re.findall(r"--config=([^\s`]+)", README)))


@pytest.mark.parametrize("named", configs())
def test_configs(named):
  file, _, arg = named.partition(":")
  path = ROOT / file
  spec = importlib.util.spec_from_file_location("readme_config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  checks.check(module.get_config(arg))


def test_fields_and_flags():
  fields = re.findall(r"--config\.([\w.]+)=", README)
  assert fields and set(fields) <= FIELDS.keys()
  flags = set(re.findall(r"--(\w+)=", README))
  assert flags <= {"config", "workdir", "input", "output", "topology"}


def test_links():
  for target in re.findall(r"\]\(([^)#]+)\)", README):
    assert target.startswith("https://") or (ROOT / target).is_file(), target


def test_extras():
  pyproject = (ROOT / "pyproject.toml").read_text()
  for extra in re.findall(r'"\.\[(\w+)\]"', README):
    assert f"\n{extra} = [" in pyproject


def test_import_names():
  """What the README calls is there."""
  for path in re.findall(r"`(zofo_jax\.[\w.]+)`", README):
    assert pydoc.locate(path) is not None, path
