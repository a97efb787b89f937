"""The house: which package may import which, and what an import costs.

`python -m tests.house_test` prints its measures.
"""

import ast
import functools
import os
import pathlib
import subprocess
import sys

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
  "main": "commands plan training config sharding",
  "errors": "",
}
# The public names; and `python -m` doors to a subcommand.
DOORS = {
  "__init__": "core adapters",
  "export": "commands",
  "ledger": "commands",
  "sweep": "commands",
  "plan/__main__": "main",
  "report/__main__": "commands",
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
  """Gives "models" for "zofo_jax.models.opt.Opt", "" for the package itself."""
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
    ours = top == "zofo_jax" and room == "core"
    assert ours or top in allowed, f"{name}.py:{line} imports {imported}"


@pytest.mark.parametrize(
  ("library", "homes"),
  [("orbax", {"checkpoints"}), ("absl", {"main"})],
)
def test_some_libraries_have_one_home(library, homes):
  users = {
    room_of(name.replace("/", "."))
    for name, path in FILES.items()
    for _, imported in imports_of(path)
    if imported.split(".")[0] == library
  }
  assert users <= homes


def test_import_is_light_and_touches_no_device():
  code = """
import sys
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
  found = list(untyped(ast.parse(FILES[name].read_text())))
  assert not found, [f"{name}.py:{f.lineno} {f.name}" for f in found]
