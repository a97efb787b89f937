"""Python functions of users, which a field of the config names."""

import importlib
import pathlib
from collections.abc import Callable
from typing import Any

from zofo_jax import errors


def load(name: str, field: str) -> Callable[..., Any]:
  """Imports the function that `MODULE:FUNCTION` names.

  Args:
    name: of the function.
    field: that names it, such as "config.zo.objective".

  Raises:
    UserError: the module or the function does not exist.
  """
  module_name, _, function_name = name.partition(":")
  try:
    module = importlib.import_module(module_name)
  except Exception as error:  # whatever the module's own code raises
    hint = ""
    if (pathlib.Path.cwd() / f"{module_name}.py").exists():
      hint = " PYTHONPATH=. lets modules of the current folder be imported."
    raise errors.UserError(
      f"{field}: cannot import the module of '{name}' "
      f"({errors.first_line(error)}).{hint}"
    ) from error
  function = getattr(module, function_name, None)
  if not callable(function):
    raise errors.UserError(
      f"{field}: module '{module_name}' has no function "
      f"'{function_name}'.{errors.nearest(function_name, dir(module))}"
    )
  return function
