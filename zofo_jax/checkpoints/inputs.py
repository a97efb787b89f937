"""Inputs of a run besides its config: rows, tokenizer, model, versions.

They are described in `inputs.json` in the folder of the run and in the header
of its ledger, which every checkpoint holds, and compared by all commands that
read the run. Of large files of weights, blocks are compared here; all of it is
compared where they are read, by the ledger.
"""

import dataclasses
import json
import logging
from collections.abc import Collection, Mapping
from importlib import metadata
from typing import Any

from etils import epath

from zofo_jax import errors
from zofo_jax.builders import model as model_lib
from zofo_jax.builders import run as run_lib
from zofo_jax.checkpoints import ledger, state_store
from zofo_jax.checkpoints.ledger import replay
from zofo_jax.config import jax_flags, validate

FILE = "inputs.json"
_LIBRARIES = ("jaxlib", "flax", "optax", "numpy", "tokenizers", "transformers")
# Changed sets of rows that a message lists.
_MAX_SETS = 4


def describe(
  model: model_lib.Model,
  rows: Mapping[str, Any] | None = None,
  *,
  chat: bool = False,
) -> dict[str, Any]:
  """Describes the inputs of a run of this process.

  Args:
    model: its model.
    rows: by set, as of `fingerprints.of_splits`; None for a command that reads
      none of the run's rows.
    chat: whether the chat template renders the rows.

  Returns:
    A dictionary of JSON.
  """
  described = {
    "random": replay.RANDOM,
    "weights": model_lib.weights_digests(model),
    "tokenizer": model_lib.tokenizer_digests(model, chat=chat),
    "model_config": dataclasses.asdict(model.module.config),
    "rows": dict(rows or {}),
    "versions": replay.versions()
    | {name: metadata.version(name) for name in _LIBRARIES},
    "rounding": jax_flags.rounding(),
  }
  return json.loads(json.dumps(described, default=str))


def read(folder: epath.Path) -> dict[str, Any]:
  """Reads the inputs of a folder's run.

  Returns:
    The dictionary of `describe`; {} for a new run, and for one of a version
    that did not write it.

  Raises:
    UserError: the file is no JSON dictionary.
  """
  path = folder / FILE
  if path.exists():
    try:
      return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
      raise errors.UserError(
        f"{path}: not the inputs of a run ({errors.first_line(error)})."
      ) from error
  path = folder / state_store.LEDGER
  try:
    if path.exists():
      return ledger.read(path).header.get("inputs", {})
  except errors.UserError:  # reported by the store
    pass
  # Without orbax: of several processes one may see a folder that another has
  # just made, and orbax would wait for all of them.
  files = (folder / "checkpoints").glob("*/extra/metadata")
  steps = {int(f.parts[-3]): f for f in files if f.parts[-3].isdigit()}
  for _, path in sorted(steps.items(), reverse=True):
    try:
      text = json.loads(path.read_text())["ledger"]
      return ledger.parse(text.encode(), str(path)).header.get("inputs", {})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
      continue  # reported by the store
  return {}


def check(
  run: run_lib.Run,
  folder: epath.Path,
  rows: Mapping[str, Any] | None = None,
  may_change: Collection[str] | None = None,
) -> dict[str, Any]:
  """Compares a run's inputs with those that it began with.

  Other versions, devices and compiler flags are a warning: they may change the
  last bits of a number.

  Args:
    run: the run.
    folder: its folder; it may be new.
    rows: as of `describe`.
    may_change: which of `validate.INPUTS` may differ; None for those in
      `config.ckpt.may_change`.

  Returns:
    `describe` of this process.

  Raises:
    UserError: says what has changed.
  """
  then, now = (
    read(folder),
    describe(run.model, rows, chat=run.task.document is not None),
  )
  flag = "--may_change"
  if may_change is None:
    flag, may_change = "config.ckpt.may_change", run.config.ckpt.may_change
  for name, describe_change in (
    ("random", _describe_fields),
    ("weights", _describe_files),
    ("tokenizer", _describe_files),
    ("model_config", _describe_fields),
    ("rows", _describe_rows),
  ):
    change = describe_change(then.get(name, {}), now[name])
    if change and name not in may_change:
      raise errors.UserError(
        f"{folder}: the {name.replace('_', ' ')} changed since the run began: "
        f"{change}; expected the same"
        + (f", or '{name}' in {flag}." if name in validate.INPUTS else ".")
      )
  for name in ("versions", "rounding"):
    if change := _describe_fields(then.get(name, {}), now[name]):
      logging.getLogger("zofo_jax").warning(
        "%s: %s since it was written; last bits may differ.", folder, change
      )
  return now


def _describe_fields(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
  """Describes the fields that differ; one side may have more of them."""
  return "; ".join(
    f"{name} was {then[name]!r}, is {now[name]!r}"
    for name in then
    if name in now and _differ(then[name], now[name])
  )


def _differ(then: Any, now: Any) -> bool:
  """Returns whether two values differ; one side may have more fields."""
  if isinstance(then, Mapping) and isinstance(now, Mapping):
    return bool(_describe_fields(then, now))
  return then != now


def _describe_files(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
  """Names the files that differ."""
  names = sorted(then.keys() | now.keys()) if then else []
  return ", ".join(name for name in names if then.get(name) != now.get(name))


def _describe_rows(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
  """Describes the sets that hold other rows."""
  changes = [
    f"other rows in {name} ({then[name]['count']} then, {now[name]['count']} "
    "now)"
    for name in then
    if name in now and then[name] != now[name]
  ]
  more = ["and more"] if len(changes) > _MAX_SETS else []
  return ", ".join(changes[:_MAX_SETS] + more)
