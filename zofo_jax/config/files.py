"""Config files: by path or by the name of a shipped one, and their arguments.

`--config=FILE.py:ARG` calls the file's `get_config(ARG)`. The files of configs/
are shipped with the package; `demo` stands for configs/demo.py.
"""

import contextlib
import importlib.util
import pathlib
import traceback
import types
from collections.abc import Iterator, Mapping
from typing import TypeVar

import ml_collections

from zofo_jax import errors
from zofo_jax.config import paths

_T = TypeVar("_T")


def folder() -> pathlib.Path:
  """Returns the folder of shipped configs: the package's, or the clone's."""
  package = pathlib.Path(__file__).parents[1]
  installed = package / "configs"  # a wheel has them inside the package
  return installed if installed.is_dir() else package.parent / "configs"


def names() -> list[str]:
  """Returns the names of the shipped configs."""
  return sorted(path.stem for path in folder().glob("*.py"))


def find(name: str, flag: str = "--config") -> pathlib.Path:
  """Returns the path of a config file.

  Args:
    name: path of a file, or name of a shipped one, such as "demo".
    flag: the flag that it was given with, for errors.

  Raises:
    errors.UserError: there is neither such a file nor such a name.
  """
  path = pathlib.Path(paths.expand(name))
  if path.is_file():
    return path
  stem = name.removeprefix("configs/").removesuffix(".py")
  shipped = folder() / f"{stem}.py"
  if stem and shipped.is_file():
    return shipped
  raise errors.UserError(
    f"{flag}: expected a file or one of {', '.join(names())}; found "
    f"'{name}'.{errors.nearest(stem, names())}"
  )


def load_module(path: pathlib.Path, flag: str = "--config") -> types.ModuleType:
  """Runs a Python file and returns its module.

  Raises:
    errors.UserError: the file cannot be run.
  """
  spec = importlib.util.spec_from_file_location(f"_zofo_{path.stem}", path)
  if spec is None or spec.loader is None:
    raise errors.UserError(f"{flag}: expected a Python file; found '{path}'.")
  module = importlib.util.module_from_spec(spec)
  with _in_one_sentence(path, flag):
    spec.loader.exec_module(module)
  return module


def load(text: str) -> ml_collections.ConfigDict:
  """Returns the config of "FILE" or "FILE:ARG".

  Args:
    text: a path or the name of a shipped config; what follows a colon is the
      argument of its `get_config`.

  Raises:
    errors.UserError: there is no such file, or it gives no config.
  """
  name, separator, arg = text.partition(":")
  path = find(name)
  module = load_module(path)
  if not hasattr(module, "get_config"):
    raise errors.UserError(f"--config: {path} has no function get_config.")
  with _in_one_sentence(path, "--config"):
    config = module.get_config(arg) if separator else module.get_config()
  if not isinstance(config, ml_collections.ConfigDict):
    raise errors.UserError(
      f"--config: get_config of {path} returned "
      f"{type(config).__name__}; expected a ConfigDict."
    )
  return config


@contextlib.contextmanager
def _in_one_sentence(path: pathlib.Path, flag: str) -> Iterator[None]:
  """Raises a `UserError` with the line of what a config file raises."""
  try:
    yield
  except errors.UserError:
    raise
  except Exception as error:
    lines = [
      frame.lineno
      for frame in traceback.extract_tb(error.__traceback__)
      if frame.filename == str(path)
    ]
    place = f"{path}:{lines[-1]}" if lines else f"{path}"
    raise errors.UserError(
      f"{flag}: {place} raised {type(error).__name__}: "
      f"{errors.first_line(error)}."
    ) from error


def parse_arg(arg: str, **defaults: str) -> dict[str, str]:
  """Parses what follows the colon in `--config=FILE:size=1.3b,task=sst2`.

  Args:
    arg: comma-separated `name=value` pairs, or "".
    **defaults: the valid names, with their defaults.

  Returns:
    A value for every name.

  Raises:
    errors.UserError: a pair is malformed or has an unknown name.
  """
  values = dict(defaults)
  for pair in filter(None, arg.split(",")):
    name, separator, text = pair.partition("=")
    if not separator:
      raise errors.UserError(
        f"--config=...:{arg}: expected name=value, found '{pair}'."
      )
    if name not in defaults:
      raise errors.UserError(
        f"--config=...:{arg}: there is no '{name}' to choose; choose from "
        f"{', '.join(defaults)}.{errors.nearest(name, defaults)}"
      )
    values[name] = text
  return values


def choose(what: str, name: str, table: Mapping[str, _T]) -> _T:
  """Returns `table[name]`.

  Raises:
    errors.UserError: there is no such name; it suggests the nearest.
  """
  if name not in table:
    raise errors.UserError(
      f"--config: there is no {what} '{name}'; choose from "
      f"{', '.join(table)}.{errors.nearest(name, table)}"
    )
  return table[name]
