"""The house: which module may import which, and what an import costs."""

import ast
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

# From the roof to the ground. A module imports only from lines below its own; a
# folder counts as one module, and is free inside. A new file needs a place.
FLOORS = (
  ("plan",),
  ("main",),
  ("modes", "planning"),
  ("adapt", "metatrain"),
  ("metarun",),
  ("export",),
  ("compiling",),
  ("costs",),
  ("saved", "sweep", "train", "tuning"),
  ("loop",),
  ("store",),
  ("demonstrate", "ledger"),
  ("runs",),
  ("objectives",),
  ("families",),
  ("evaluate", "experiment", "probe"),
  ("backbone", "budget"),
  ("generate",),
  ("batches", "calibrate", "incontext", "questions"),
  ("encode",),
  ("tasks",),
  ("beams",),
  ("checks",),
  ("hlo", "mesh", "topologies"),
  ("arguments", "assets", "checkpoint", "data", "metrics"),
  ("models", "report"),
  ("config",),
  ("adapters", "algorithms", "guards", "profiling", "progress", "recipes"),
  ("rows", "seals", "trackers"),
  # The core.
  ("baselines", "multitask"),
  ("bilevel",),
  ("terms",),
  ("inner", "losses", "outer", "state"),
  ("moves",),
  ("zo",),
  ("sampler",),
  ("perturbed",),
  ("directions",),
  ("noise",),
  # May be imported from everywhere but the core.
  ("processes",),
  ("errors",),
)
CORE = set(
  """
baselines bilevel directions inner losses moves multitask noise outer perturbed
sampler state terms zo
""".split()
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


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


@pytest.mark.parametrize("name", FILES)
def test_imports_run_downwards(name):
  room = room_of(name.replace("/", "."))
  if room == "__init__":
    return
  assert room in FLOOR_OF, f"{name}.py has no place in FLOORS"
  for line, imported in imports_of(FILES[name]):
    top, target = imported.split(".")[0], room_of(imported)
    if top != "zofo_jax" or target == room:
      continue
    where = f"{name}.py:{line} imports {imported}"
    assert target in FLOOR_OF, f"{where}: no module"
    assert FLOOR_OF[target] > FLOOR_OF[room], f"{where}: not downwards"


@pytest.mark.parametrize("name", ["__init__", *sorted(CORE)])
def test_the_core_stands_alone(name):
  allowed = {"jax", "numpy", "optax", *sys.stdlib_module_names}
  for line, imported in imports_of(FILES[f"zofo_jax/{name}"]):
    if imported.split(".")[0] == "zofo_jax":
      ours = room_of(imported) in CORE
    else:
      ours = imported.split(".")[0] in allowed
    assert ours, f"zofo_jax/{name}.py:{line} imports {imported}"


@pytest.mark.parametrize(
  ("library", "homes"),
  [("orbax", {"checkpoint"}), ("absl", {"main"})],
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
