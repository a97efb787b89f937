"""The house: which package may import which, and what an import costs.

`python -m tests.house_test` prints its measures.
"""

import ast
import functools
import io
import os
import pathlib
import re
import subprocess
import sys
import tokenize

import pytest

import zofo_jax

PACKAGE = pathlib.Path(zofo_jax.__file__).parent
FILES = {
  path.relative_to(PACKAGE.parent).with_suffix("").as_posix(): path
  for path in sorted(PACKAGE.rglob("*.py"))
}

# What each package may import of the others. `errors` may be imported from
# everywhere but the core, which knows nothing of files, configs or models.
MAY_IMPORT = {
  "core": "",
  "config": "",
  "tasks": "",
  "adapters": "core",
  "sharding": "core",
  "report": "sharding",
  "models": "adapters core",
  "data": "tasks core",
  "evaluation": "data tasks models report core",
  "builders": """
    evaluation config sharding report data tasks models adapters core
  """,
  "checkpoints": "builders config report sharding core",
  "training": """
    checkpoints builders evaluation config report sharding data tasks models
    adapters core
  """,
  "plan": """
    builders evaluation config report sharding data tasks models adapters core
  """,
  "commands": """
    training plan checkpoints builders evaluation config report sharding data
    tasks models adapters core
  """,
  "main": "commands config sharding",
  "errors": "",
}
# The public names; and `python -m` doors to a subcommand.
DOORS = {
  "__init__": "core adapters",
  "export": "main",
  "ledger": "main",
  "sweep": "main",
  "plan/__main__": "main",
  "report/__main__": "main",
  "tasks/__main__": "main",
}


def imports_of(path):
  """Yields (line, dotted name) of all imports, those in functions included."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield node.lineno, alias.name
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}:{node.lineno}: a relative import"
      for alias in node.names:
        yield node.lineno, f"{node.module}.{alias.name}"


def room_of(name):
  """Gives "models" for "zofo_jax.models.opt.x", "" for the package itself."""
  return (*name.split("."), "")[1]


def rooms_imported(name):
  """Yields (line, imported name, its package) of what is imported of ours."""
  for line, imported in imports_of(FILES[name]):
    if imported.split(".")[0] == "zofo_jax":
      yield line, imported, room_of(imported)


@pytest.mark.parametrize("name", FILES)
def test_imports_follow_the_table(name):
  inside = name.removeprefix("zofo_jax/")
  room = inside.split("/")[0]
  if inside in DOORS:
    allowed = {*DOORS[inside].split(), room, "errors"}
  else:
    assert room in MAY_IMPORT, f"{name}.py is in no package of the table"
    allowed = {room, *MAY_IMPORT[room].split()}
    if room != "core":
      allowed.add("errors")
  for line, imported, target in rooms_imported(name):
    assert target in allowed, f"{name}.py:{line} imports {imported}"


@functools.cache
def floor_of(room):
  """Length of the longest chain of packages that starts at this one."""
  below = MAY_IMPORT[room].split()
  return 1 + max((floor_of(other) for other in below), default=0)


def modules_at_the_top():
  return [name for name in FILES if name.count("/") == 1]


def test_few_modules_lie_at_the_top():
  at_top = [n for n in modules_at_the_top() if not n.endswith("__init__")]
  assert len(at_top) <= 5, at_top
  assert max(map(floor_of, MAY_IMPORT)) <= 10


@pytest.mark.parametrize(
  "name", [n for n in FILES if n.startswith("zofo_jax/core/")]
)
def test_the_core_stands_alone(name):
  allowed = {"jax", "numpy", "optax", *sys.stdlib_module_names}
  for line, imported in imports_of(FILES[name]):
    top, room = imported.split(".")[0], room_of(imported)
    in_core = top == "zofo_jax" and room == "core"
    assert in_core or top in allowed, f"{name}.py:{line} imports {imported}"


@pytest.mark.parametrize(
  ("library", "homes"),
  [("orbax", {"checkpoints"}), ("absl", {"commands"})],
)
def test_some_libraries_have_one_home(library, homes):
  users = {
    room_of(name.replace("/", "."))
    for name, path in FILES.items()
    for _, imported in imports_of(path)
    if imported.split(".")[0] == library
  }
  assert users <= homes


def test_the_architecture_page_names_packages_and_files_that_exist():
  page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
  packages = re.findall(r"^\| `(\w+)` \|", page, re.M)
  assert set(packages) == MAY_IMPORT.keys() - {"main", "errors"}
  files = re.findall(r"`([\w/]+/[\w/]*(?:\.py)?)`", page)
  assert len(files) > 20
  for file in files:
    places = PACKAGE / file, PACKAGE.parent / file
    assert any(place.exists() for place in places), file


def test_the_architecture_page_has_the_table_of_imports():
  page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
  above = set()
  for room, cell in re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", page, re.M):
    named = set(re.findall(r"`(\w+)`", cell))
    listed = above - named if "all of the above" in cell else named
    assert listed == set(MAY_IMPORT[room].split()), room
    above.add(room)


def test_the_architecture_page_has_the_order_of_the_core():
  page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
  (order,) = re.findall(r"in this order: (.*?)\.\n", page, re.S)
  before = set()
  for group in order.split("→"):
    modules = re.findall(r"`(\w+)`", group)
    for module in modules:
      for _, imported, room in rooms_imported(f"zofo_jax/core/{module}"):
        assert room == "core"
        assert imported.split(".")[2] in before, f"{module} imports {imported}"
    before.update(modules)
  stems = {path.stem for path in (PACKAGE / "core").glob("*.py")} - {"__init__"}
  assert before == stems


def test_import_is_light_and_touches_no_device():
  code = """
import sys
import tokenize
import zofo_jax
heavy = {"datasets", "flax", "huggingface_hub", "matplotlib",
         "ml_collections", "orbax", "rich", "sklearn", "torch", "transformers"}
print(sorted(heavy & set(sys.modules)))
import jax
try:
  jax.devices()
except RuntimeError:
  print("devices were not asked for before")
"""
  # A platform that does not exist: to ask for any device is an error.
  process = subprocess.run(
    [sys.executable, "-c", code],
    env={**os.environ, "JAX_PLATFORMS": "none_such"},
    capture_output=True,
    text=True,
  )
  assert process.returncode == 0, process.stderr
  assert process.stdout.splitlines() == [
    "[]",
    "devices were not asked for before",
  ]


def untyped(tree):
  """Yields public functions and methods with a part of the signature bare."""
  for node in tree.body:
    if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
      yield from untyped(node)
    if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
      continue
    args = node.args
    named = [*args.posonlyargs, *args.args, *args.kwonlyargs]
    named += [a for a in (args.vararg, args.kwarg) if a]
    bare = [a for a in named if a.annotation is None]
    if node.returns is None or [
      a for a in bare if a.arg not in {"self", "cls"}
    ]:
      yield node


@pytest.mark.parametrize("name", FILES)
def test_public_signatures_are_typed(name):
  missing = list(untyped(ast.parse(FILES[name].read_text())))
  assert not missing, [f"{name}.py:{f.lineno} {f.name}" for f in missing]


# Names that say nothing of what they hold, or that the field calls otherwise.
DIALECT_NAMES = set(
  """
  again anywhere apart asked ask began beside dear each everywhere found goes
  here held judge kept known mine one ours own rest say shown sound
  spent stead tell theirs there together told torn where worth
  """.split()
)
# Turns of phrase that a reader has to translate, in docstrings and comments.
DIALECT_PROSE = {
  name: re.compile(pattern, re.I | re.M)
  for name, pattern in {
    "resume, continue": r"\b(go|goes|going|went|gone) on\b",
    "result": r"\b(come|comes|came) of\b",
    "default": r"\bhere (not|so)\b",
    "instead of": r"\bstead\b(?<!instead)",
    "unchanged": r"\bas (it is|they are)\b",
    "baselines": r"\bwhat \S+ (is|are) compared with\b|\bto compare with\b",
    "replay": r"\b(take|takes|taken|took) again\b",
    "besides, next to": r"\bbeside\b",
    "expensive": r"\bdear(er)?\b",
    "metrics, score": r"\bworth\b",
    "first-order": r"\bby (first|zeroth) order\b",
    "passed, reported": r"\btold\b",
    "returns whether": r"^\W*(Says|Tells|Gives)\b",
    "truncated": r"\btorn\b",
    "corrupt": r"\bdamaged?\b(?!/)",
    "valid, finite": r"\bsound\b",
    "except": r"\bbut for\b",
    "frozen, unchanged": r"\b(stands?|stood) still\b",
    "at most": r"\bat (its|their) most\b",
    "there is": r"\bwhat there (is|are)\b|\b(is|are) there\b[.,;:]",
    "raises": r"\bcomplains?\b",
    "atomically": r"\bin one piece\b|\bwhole or not at all\b",
    "of its own": r"\bone's own\b",
  }.items()
}


def dialect_names(path):
  """Yields (line, name) of variables, arguments and definitions."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
      name = node.id
    elif isinstance(node, ast.arg):
      name = node.arg
    elif isinstance(node, ast.FunctionDef | ast.ClassDef):
      # `tree.where` is numpy's term for a choice by a condition.
      name = "" if node.name == "where" else node.name
    else:
      continue
    if name.strip("_").lower() in DIALECT_NAMES:
      yield node.lineno, name


def dialect_prose(path):
  """Yields (line, phrase) of docstrings and comments."""
  text = path.read_text()
  passages = [
    (token.start[0], token.string)
    for token in tokenize.generate_tokens(io.StringIO(text).readline)
    if token.type == tokenize.COMMENT
  ]
  for node in ast.walk(ast.parse(text)):
    if isinstance(
      node, ast.Module | ast.ClassDef | ast.FunctionDef
    ) and isinstance(ast.get_docstring(node), str):
      passages.append((node.body[0].lineno, ast.get_docstring(node)))
  for line, passage in passages:
    for better, pattern in DIALECT_PROSE.items():
      for match in pattern.finditer(" ".join(passage.split())):
        yield line, f"'{match[0]}' (better: {better})"


def dialect():
  """Returns a line for every word of the old dialect in the package."""
  return [
    f"{name}.py:{line} {word}"
    for name, path in FILES.items()
    for line, word in [*dialect_names(path), *dialect_prose(path)]
  ]


def test_names_and_prose_are_in_the_field_s_terms():
  assert dialect() == []


# Who may take a ConfigDict: what turns it into explicit arguments, what a
# command calls, and `config` itself, whose checks and tables are not counted.
MAY_TAKE_A_CONFIG = ("builders/", "commands/")
TOPS = (
  "plan/planner",
  "training/train",
  "training/fit",
  "training/meta/train",
  "training/meta/adapt",
)


def takes_a_config(function, room):
  """Whether a parameter is a ConfigDict, by its annotation or by its name."""
  args = function.args
  for arg in [*args.posonlyargs, *args.args, *args.kwonlyargs]:
    kind = ast.unparse(arg.annotation) if arg.annotation else "Any"
    if "ConfigDict" in kind:
      return True
    # The `config` of a module of `models` is its dataclass.
    named = arg.arg in ("config", "zo_config")
    if named and kind == "Any" and room != "models":
      return True
  return False


def functions_that_take_a_config():
  """Returns "module.function" of all of them outside `config`."""
  return [
    f"{name.removeprefix('zofo_jax/')}.{node.name}"
    for name, path in FILES.items()
    if not name.startswith("zofo_jax/config/")
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef)
    and takes_a_config(node, room_of(name.replace("/", ".")))
  ]


def test_few_functions_take_a_config():
  functions = functions_that_take_a_config()
  for function in functions:
    module = function.rsplit(".", 1)[0]
    allowed = module.startswith(MAY_TAKE_A_CONFIG) or module in TOPS
    assert allowed, f"{function} takes a config; give it arguments"
  assert len(functions) <= 20, functions


def main():
  """Prints the measures; with an argument, what they count as well."""
  print("modules at the top:", len(modules_at_the_top()) - 1)
  print("longest chain of packages:", max(map(floor_of, MAY_IMPORT)))
  for title, lines in (
    ("functions that take a ConfigDict", functions_that_take_a_config()),
    ("words of the old dialect", dialect()),
  ):
    print(f"{title}: {len(lines)}")
    if len(sys.argv) > 1:
      print(*lines, sep="\n")


if __name__ == "__main__":
  main()
