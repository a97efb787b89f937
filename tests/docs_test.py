"""README and documentation: code runs, commands name what exists."""

import contextlib
import importlib.util
import io
import pathlib
import pydoc
import re
import shlex

import absl.flags
import jax
import pytest

from zofo_jax import main
from zofo_jax.config import defaults, validate

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {
  str(path.relative_to(ROOT)): path.read_text()
  for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
EVERYTHING = "\n".join(PAGES.values())
FIELDS = defaults.flat(defaults.base_config())


def blocks(text):
  return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def run_block(code, name):
  out = io.StringIO()
  # As it is for a reader: this project's own tests are stricter.
  with contextlib.redirect_stdout(out), jax.numpy_rank_promotion("allow"):
    exec(compile(code, name, "exec"), {"__name__": "page"})
  return out.getvalue()


def commands():
  """Returns every command that begins with python, whatever its lines."""
  text = EVERYTHING.replace("\\\n", " ")
  return re.findall(r"(?:^|`)(python -m [^`\n]*)", text, re.M)


def test_the_readme_s_block():
  (code,) = blocks(README)
  assert len(code.splitlines()) < 45
  first, last = (
    [float(number) for number in re.findall(r"\d+\.\d+", line)]
    for line in run_block(code, "README.md").splitlines()
  )
  assert len(first) == len(last) == 2
  for before, after in zip(first, last, strict=True):
    assert after < 0.5 * before


@pytest.mark.parametrize(
  "name, number",
  [
    (name, number)
    for name, text in PAGES.items()
    for number in range(len(blocks(text)))
    if name != "README.md"
  ],
)
def test_blocks_of_the_documentation(name, number):
  # What they claim they assert.
  run_block(blocks(PAGES[name])[number], f"{name}, block {number}")


def test_make_targets():
  rules = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
  named = set(re.findall(r"(?:^|`)make (\w+)", EVERYTHING, re.M))
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
  return sorted(set(re.findall(r"--config=([^\s`]+\.py[^\s`]*)", EVERYTHING)))


@pytest.mark.parametrize("named", configs())
def test_configs(named):
  file, _, arg = named.partition(":")
  path = ROOT / file
  spec = importlib.util.spec_from_file_location("readme_config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  validate.check(module.get_config(arg))


def test_fields_and_flags():
  fields = re.findall(r"--config\.([\w.]+)=", EVERYTHING)
  assert fields and set(fields) <= FIELDS.keys()
  text = " ".join(commands())
  flags = set(re.findall(r"--(\w+)=", text)) - {"config"}
  assert flags <= set(absl.flags.FLAGS) | {
    "jobs",
    "json",
    "ledger",
    "run",
    "sweep",
  }


def test_links():
  for name, text in PAGES.items():
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
      here = (ROOT / name).parent / target
      assert target.startswith("https://") or here.is_file(), (name, target)


def test_extras():
  pyproject = (ROOT / "pyproject.toml").read_text()
  for extra in re.findall(r'"\.\[(\w+)\]"', README):
    assert f"\n{extra} = [" in pyproject


def test_import_names():
  """What the README calls is there."""
  for path in re.findall(r"`(zofo_jax\.[\w.]+)`", EVERYTHING):
    assert pydoc.locate(path) is not None, path
