"""Replays the lines of a ledger on the backbone that they started from.

Steps are applied by the code that training uses, in one compiled program for
all, and give the same bits on the same kind of machine.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from zofo_jax import errors
from zofo_jax.builders import base_update
from zofo_jax.checkpoints.ledger import format as ledger_format
from zofo_jax.config import defaults, jax_flags, validate
from zofo_jax.core import keys, outer
from zofo_jax.core import tree as tree_lib
from zofo_jax.sharding import mesh

# How keys are made and split, on which all directions depend.
RANDOM = {"impl": keys.IMPL, "threefry_partitionable": True}


def fingerprint(tree: Any) -> str:
  """Returns the SHA-256 of a tree's paths, types, shapes and bytes."""
  digest = hashlib.sha256()
  for name, leaf in tree_lib.named_leaves(tree).items():
    description = f"{name} {leaf.dtype} {leaf.shape}\n"
    digest.update(description.encode())
    if not getattr(leaf, "is_fully_addressable", True):
      # Other processes hold parts of it: one leaf at a time is gathered.
      leaf = multihost_utils.process_allgather(leaf, tiled=True)
    digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
  return digest.hexdigest()


def make_header(
  model: Mapping[str, Any],
  zo: Mapping[str, Any],
  base: Any,
  key: jax.Array,
  inputs: Mapping[str, Any],
) -> dict[str, Any]:
  """Returns the header of a run's ledger: what its entries depend on.

  Args:
    model: the section `model` of the run's config.
    zo: the section `zo`.
    base: θ before the first step.
    key: the run's typed PRNG key.
    inputs: of the run besides its config; see `checkpoints.inputs`.

  Returns:
    A dictionary of JSON.
  """
  # The entries are the same however many updates are written together.
  fields = {name: value for name, value in zo.items() if name != "write_every"}
  return {
    "model": dict(model),
    "zo": _jsonable(fields),
    "base_sha256": fingerprint(base),
    "key": np.asarray(jax.random.key_data(key)).tolist(),
    "versions": versions(),
    "inputs": dict(inputs),
  }


def versions() -> dict[str, str]:
  """Returns the versions that may affect the last bit of a step."""
  try:
    version = metadata.version("zofo-jax")
  except metadata.PackageNotFoundError:  # A checkout on PYTHONPATH.
    version = "not installed"
  return {
    "zofo_jax": version,
    "jax": jax.__version__,
    "device": mesh.all_devices()[0].device_kind,
  }


def config_of(header: dict[str, Any], source: str) -> ml_collections.ConfigDict:
  """Returns a config with the `model` and the `zo` of a header.

  Raises:
    UserError: the header lacks them.
  """
  config = defaults.base_config()
  try:
    config.model.update(header["model"])
    config.zo.update({k: _tupled(v) for k, v in header["zo"].items()})
    validate.check(config)
  except errors.UserError:  # names the field
    raise
  except (KeyError, TypeError, AttributeError, ValueError) as error:
    raise errors.UserError(
      f"'{source}' line 1: not the header of a run "
      f"({errors.first_line(error)})."
    ) from error
  return config


def check_base(base: Any, header: Mapping[str, Any], source: str) -> None:
  """Checks that a backbone is the one that a ledger starts from.

  Args:
    base: θ before the first step.
    header: of the ledger.
    source: from which the weights were read, for the message.

  Raises:
    UserError: their checksums differ.
  """
  expected, actual = header.get("base_sha256", ""), fingerprint(base)
  if actual != expected:
    raise errors.UserError(
      f"{source}: these are not the weights that the ledger started from: "
      f"expected SHA-256 {expected[:12]}…, found {actual[:12]}…"
    )


def advance(
  base: Any,
  header: dict[str, Any],
  lines: Sequence[ledger_format.LedgerEntry],
  source: str,
) -> Any:
  """Replays steps on the backbone.

  Args:
    base: θ before the first of them; donated.
    header: of the ledger that contains the lines.
    lines: consecutive steps.
    source: the ledger's file, for messages.

  Returns:
    θ after the last of them.

  Raises:
    UserError: the updates of these lines cannot be replayed, or keys are now
      split in another way than when they were written.
  """
  if not lines:
    return base
  jax_flags.check()
  random = header.get("inputs", {}).get("random", RANDOM)
  if random != RANDOM:
    raise errors.UserError(
      f"'{source}' was written with the random numbers {random}, and this "
      f"version draws {RANDOM}; its updates cannot be replayed."
    )
  config = config_of(header, source)
  check_replayable(config.zo.optimizer, config.zo.direction)
  key = jax.random.wrap_key_data(
    jnp.asarray(header["key"], jnp.uint32), impl=keys.IMPL
  )
  step_fn = _step_fn(json.dumps(header["zo"], sort_keys=True))
  for line in lines:
    move = jax.tree.map(jnp.asarray, line.move)
    base = step_fn(base, key, jnp.int32(line.step - 1), move)
  return base


@functools.lru_cache(maxsize=4)
def _step_fn(zo: str) -> Callable[..., Any]:
  """Returns the jitted update of a header's `zo`, traced only once."""
  config = config_of({"model": {"name": "any"}, "zo": json.loads(zo)}, zo)
  zo_options = base_update.make_base_update(config).zo
  return jax.jit(
    functools.partial(
      outer.replay_update,
      sampler=zo_options.sampler,
      subspace_steps=zo_options.subspace_steps,
    ),
    donate_argnums=0,
  )


def check_replayable(optimizer: str, direction: str) -> None:
  """Checks that the lines of a ledger determine the updates.

  Args:
    optimizer: `zo.optimizer` of the run.
    direction: `zo.direction` of the run.

  Raises:
    UserError: the optimizer keeps a state of the size of θ, or the directions
      come from an adapter.
  """
  if direction == "guided":
    raise errors.UserError(
      "zo.direction 'guided' moves theta along what an adapter has learned, "
      "which a ledger does not hold, so theta cannot be rebuilt from it; its "
      "checkpoints have theta."
    )
  if optimizer not in validate.IN_PLACE:
    raise errors.UserError(
      f"zo.optimizer '{optimizer}' keeps more than a ledger holds, "
      "so theta cannot be rebuilt from it; expected one of "
      f"{', '.join(validate.IN_PLACE)}."
    )


def _jsonable(fields: dict[str, Any]) -> dict[str, Any]:
  return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


def _tupled(value: Any) -> Any:
  return tuple(value) if isinstance(value, list) else value
