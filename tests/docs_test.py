"""README and documentation: code runs, commands name what exists."""

import contextlib
import functools
import importlib.util
import io
import pathlib
import pydoc
import re
import shlex

import jax
import pytest

from zofo_jax import main
from zofo_jax.config import defaults, files, validate

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
  """Returns the arguments of every documented command line of ours."""
  text = EVERYTHING.replace("\\\n", " ")
  parsed = []
  for line in re.findall(
    r"(?:^|`)((?:python -m zofo_jax\.|zofo )[^`\n]*)", text, re.M
  ):
    words = shlex.split(line, comments=True)
    if words[0] == "python":
      module = words[2].removeprefix("zofo_jax.")
      assert importlib.util.find_spec(words[2]), line
      words = ["", *([] if module == "main" else [module]), *words[3:]]
    parsed.append(words[1:])
  return parsed


@functools.cache
def flags_of(command):
  """Returns the flags that the help of a command lists."""
  out = io.StringIO()
  arguments = command.split()
  with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
    main.main([*arguments, "--help"])
  return set(re.findall(r"--(\w+)", out.getvalue()))


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
  for words in commands():
    command = words[0] if words and words[0][0] not in "-[" else "train"
    if command.isupper():  # COMMAND
      continue
    assert command in main.COMMANDS, words
    if command == "ledger" and words[1].isalpha():
      command = " ".join(words[:2])
    flags = re.findall(r"--(\w+)(?![\w.])", " ".join(words))
    assert set(flags) <= flags_of(command) | {"help"}, words


def test_the_page_of_commands_has_a_row_for_each():
  page = PAGES["docs/reference/commands.md"]
  assert re.findall(r"^\| `zofo (\w+)", page, re.M) == list(main.COMMANDS)


def configs():
  return sorted(set(re.findall(r"--config=([a-z][^\s`]*)", EVERYTHING)))


@pytest.mark.parametrize("named", configs())
def test_configs(named):
  validate.check(files.load(named))


def test_fields():
  fields = re.findall(r"--config\.([\w.]+)=", EVERYTHING)
  assert fields and set(fields) <= FIELDS.keys()


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
