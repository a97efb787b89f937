"""Checkpoints of a whole run, written by orbax while training goes on.

A checkpoint is one numbered folder with two items: `state`, any pytree of
arrays and typed PRNG keys, and `extra`, a JSON dictionary (config, data
position, versions). Each appears under its number only when it is complete. No
other module imports orbax.
"""

import math
from collections.abc import Mapping
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from zofo_jax import errors

_ITEMS = ("state", "extra")


class Checkpoints:
  """The checkpoints of one folder, to be used in a `with` statement.

  Attributes:
    folder: where they lie, absolute; local or of another file system that etils
      knows, such as "gs://bucket/run/checkpoints".
  """

  def __init__(self, folder: str | epath.Path, *, keep: int | None = None):
    """Opens a folder of checkpoints.

    Args:
      folder: a path, local or "gs://...".
      keep: how many of the latest checkpoints to keep, beside the best one.
        With a number the folder is made if need be, and the first save removes
        what an interrupted one left; with None the folder is only read.

    Raises:
      UserError: if the folder is only to be read and is not there.
    """
    self.folder = _absolute(folder)
    if keep is None and not self.folder.is_dir():
      raise errors.UserError(
        f"There is no folder of checkpoints '{self.folder}'."
      )
    if self.folder.is_file():
      raise errors.UserError(
        f"'{self.folder}' is a file, expected a folder of checkpoints."
      )
    self._keep = keep
    self._manager = ocp.CheckpointManager(
      self.folder,
      options=ocp.CheckpointManagerOptions(
        create=keep is not None,
        cleanup_tmp_directories=keep is not None,
        preservation_policy=(None if keep is None else _latest_and_best(keep)),
        best_fn=_worth,  # without it orbax does not write the metric
      ),
      item_handlers={
        "state": ocp.StandardCheckpointHandler(),
        "extra": ocp.JsonCheckpointHandler(),
      },
    )

  def __enter__(self) -> Self:
    """Returns itself."""
    return self

  def __exit__(self, *unused: object) -> None:
    """Closes, also after an exception: what was begun is still committed."""
    self.close()

  def steps(self) -> list[int]:
    """Returns the steps that have a complete checkpoint, in order."""
    return sorted(self._manager.all_steps())

  def latest_step(self) -> int | None:
    """Returns the latest step that has a complete checkpoint, if any."""
    return self._manager.latest_step()

  def best_step(self) -> int | None:
    """Returns the step of the highest metric, the last of equals, if any."""
    return max(
      self.steps(), key=lambda step: (self._metric(step), step), default=None
    )

  def save(
    self,
    step: int,
    state: Any,
    extra: Mapping[str, Any],
    *,
    metric: float = 0.0,
  ) -> bool:
    """Begins to write a checkpoint; its arrays may be donated at once.

    Waits for the save before it, if that still runs, and raises what went wrong
    there.

    Args:
      step: the number of the checkpoint, above those already there.
      state: pytree of arrays and typed PRNG keys; NumPy arrays are copied.
      extra: what belongs to the state and is no array; JSON.
      metric: what the state is worth; the highest is kept, the last of equals.

    Returns:
      Whether it was begun; False if this step has a checkpoint already.
    """
    if self._keep is None:
      raise ValueError("These checkpoints were opened to be read only.")
    if step in self._manager.all_steps():
      return False
    return self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(jax.tree.map(_kept, state)),
        extra=ocp.args.JsonSave(dict(extra)),
      ),
      metrics={"metric": metric},
      force=True,
    )

  def restore_extra(self, step: int | None = None) -> dict[str, Any]:
    """Reads only the JSON part, for instance the config that shapes the state.

    Args:
      step: which checkpoint; None for the latest.

    Returns:
      The dictionary that was saved.

    Raises:
      UserError: if there is no such checkpoint.
    """
    restored = self._manager.restore(
      self._existing(step),
      args=ocp.args.Composite(extra=ocp.args.JsonRestore()),
    )
    return dict(restored.extra)

  def restore(
    self, abstract_state: Any, step: int | None = None
  ) -> tuple[Any, dict[str, Any]]:
    """Reads a checkpoint into the structure and the shardings asked for.

    Args:
      abstract_state: pytree like the saved state, of arrays or
        `jax.ShapeDtypeStruct`; a leaf without a sharding goes to the first
        device, and where a NumPy array stands it stays one.
      step: which checkpoint; None for the latest.

    Returns:
      (state, extra) as they were saved.

    Raises:
      UserError: if there is no such checkpoint, or if a leaf of the state is
        missing, is one too many, or has another shape or type.
    """
    step = self._existing(step)
    self._check(abstract_state, step)
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(jax.tree.map(_placed, abstract_state)),
        extra=ocp.args.JsonRestore(),
      ),
    )
    return restored.state, dict(restored.extra)

  def wait(self) -> None:
    """Waits until the last save is complete; raises what went wrong in it."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the last save and lets go of the folder."""
    self._manager.close()

  def _metric(self, step: int) -> float:
    metrics = self._manager.metrics(step)
    return -math.inf if metrics is None else _worth(metrics)

  def _existing(self, step: int | None) -> int:
    steps = self.steps()
    if not steps:
      raise errors.UserError(f"There is no checkpoint in '{self.folder}'.")
    step = steps[-1] if step is None else step
    if step not in steps:
      raise errors.UserError(
        f"There is no checkpoint of step {step} in '{self.folder}', only of "
        f"{', '.join(map(str, steps))}."
      )
    name = self.folder / str(step)
    for item in _ITEMS:
      if not (name / item).is_dir():
        raise errors.UserError(
          f"'{name}' is no checkpoint of zofo_jax: it has no folder '{item}'."
        )
    return step

  def _check(self, abstract_state: Any, step: int) -> None:
    """Compares names, shapes and types before anything large is read."""
    name = self.folder / str(step)
    metadata = self._manager.item_metadata(step).state
    found = {k: _shape_of(v) for k, v in _flat(metadata.tree).items()}
    wanted = {k: _shape_of(v) for k, v in _flat(abstract_state).items()}
    different = [
      leaf
      for leaf in sorted(found.keys() | wanted.keys())
      if found.get(leaf) != wanted.get(leaf)
    ]
    if different:
      leaf = different[0]
      raise errors.UserError(
        f"The checkpoint '{name}' does not fit this configuration: leaf "
        f"'{leaf}' is {found.get(leaf, 'missing')} there, expected "
        f"{wanted.get(leaf, 'no such leaf')}."
        + ("" if leaf in found else errors.nearest(leaf, found))
      )


def _worth(metrics: Mapping[str, float]) -> float:
  return metrics["metric"]


def _latest_and_best(keep: int) -> Any:
  policies = ocp.checkpoint_managers
  return policies.AnyPreservationPolicy(
    [
      policies.LatestN(keep),
      policies.BestN(get_metric_fn=_worth, n=1),
    ]
  )


def _absolute(folder: str | epath.Path) -> epath.Path:
  path = epath.Path(folder).expanduser()
  # `resolve` would take "gs://..." for a name in the current folder.
  return path if path.is_absolute() else path.resolve()


def _flat(tree: Any) -> dict[str, Any]:
  """Flattens to names such as "upper/layers/attention/query/lora/a"."""
  flat = ocp.tree.to_flat_dict(tree)
  return {"/".join(map(str, path)): leaf for path, leaf in flat.items()}


def _shape_of(leaf: Any) -> str:
  """Writes a leaf's type and shape, a typed key's as those of its data."""
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.eval_shape(jax.random.key_data, leaf)
  return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _kept(leaf: Any) -> Any:
  """Copies a NumPy array, which may be written in place while it is saved."""
  return leaf.copy() if isinstance(leaf, np.ndarray) else leaf


def _placed(leaf: Any) -> Any:
  """Describes a leaf: a NumPy array, or one with a sharding in any case."""
  if isinstance(leaf, np.ndarray):
    return leaf
  sharding = getattr(leaf, "sharding", None)
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
