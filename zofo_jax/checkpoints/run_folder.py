"""The folder of a run: whether it can be written to and resumed."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from zofo_jax import errors
from zofo_jax.builders import run as run_lib
from zofo_jax.config import defaults, paths
from zofo_jax.config import fields as fields_lib


def _check_no_checkpoints(folder: epath.Path) -> None:
  """Raises if a folder without a config has checkpoints."""
  place = folder / "checkpoints"
  steps = place.iterdir() if place.is_dir() else ()
  if any(step.name.isdigit() for step in steps):
    raise errors.UserError(
      f"--workdir: {place} has checkpoints, but their config is missing; "
      f"expected {folder / 'config.json'}, or a new folder."
    )


def check_config(fields: Mapping[str, Any], folder: epath.Path) -> None:
  """Checks that a run is resumed with the config that it started with.

  The mesh may differ, and so may fields that `ckpt.may_change` names, except
  for those that `config.defaults` says may never change.

  Args:
    fields: of the config, by name: {"zo.eps": 1e-3, ...}.
    folder: of the run; it may be new.

  Raises:
    UserError: names the fields that differ.
  """
  path = folder / "config.json"
  if not path.exists():
    _check_no_checkpoints(folder)
    return
  saved = defaults.flat(run_lib.read_config(folder))
  # Two names of one folder are the same.
  saved, fields = (
    defaults.map_paths(paths.resolve, part) for part in (saved, fields)
  )
  requested = set(fields["ckpt.may_change"])
  allowed, never = requested | {"ckpt.may_change"}, set()
  for field in defaults.FIELDS.values():
    if field.may_change == fields_lib.ALWAYS:
      allowed.add(field.name)
    elif field.may_change == fields_lib.NEVER:
      never.add(field.name)
  allowed -= never
  different = {
    name
    for name in saved.keys() | fields.keys()
    if saved.get(name) != fields.get(name) and not name.startswith("mesh.")
  }
  changed = [
    f"{name} was {saved.get(name)!r}, is {fields.get(name)!r}"
    for name in sorted(different - allowed)
  ]
  if changed:
    fixed = sorted(different & requested & never)
    raise errors.UserError(
      f"{path} is of a run with another config: {'; '.join(changed[:5])}"
      f"{' and more' if len(changed) > 5 else ''}. Give another --workdir, "
      "remove this one, or name what may change in config.ckpt.may_change"
      + (f" ({', '.join(fixed)} never may)." if fixed else ".")
    )
