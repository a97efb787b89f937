"""Checkpoints of a whole run, written by orbax while training goes on.

A checkpoint is one numbered folder with two items: `state`, any pytree of
arrays and typed PRNG keys, and `extra`, a JSON dictionary (config, data
position, versions). Each appears under its number only when it is complete, and
is sealed then: `checksums.json` has the SHA-256 of its files. No other module
imports orbax.
"""

import json
import math
import sys
import time
from collections.abc import Mapping
from concurrent import futures
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from zofo_jax import errors
from zofo_jax.checkpoints import checksums
from zofo_jax.checkpoints.checksums import DamagedError as DamagedError

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
    self._sound: set[int] = set()  # those whose checksums were compared
    self._damaged: set[int] = set()
    self._sealer = futures.ThreadPoolExecutor(1)
    # To write, orbax reads the metrics of all checkpoints at once; none of them
    # may be damaged.
    if keep is not None:
      self._set_aside_unreadable()
    self._manager = ocp.CheckpointManager(
      self.folder,
      options=ocp.CheckpointManagerOptions(
        create=keep is not None,
        cleanup_tmp_directories=keep is not None,
        preservation_policy=(None if keep is None else _latest_and_best(keep)),
        best_fn=_worth,  # without it orbax does not write the metric
        lightweight_initialize=keep is None,
        # Two folders may be written to at once; without it several processes
        # would take the saves of one for those of the other.
        multiprocessing_options=ocp.options.MultiprocessingOptions(
          barrier_sync_key_prefix=self.folder.name
        ),
      ),
      item_handlers={
        "state": ocp.StandardCheckpointHandler(),
        "extra": ocp.JsonCheckpointHandler(),
      },
    )

  def __enter__(self) -> Self:
    """Returns itself."""
    return self

  def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
    """Closes, also after an exception: what was begun is still committed."""
    try:
      self.close()
    except errors.UserError:
      if kind is None:  # else it is most likely of the same cause
        raise

  def steps(self) -> list[int]:
    """Returns the steps that have a complete checkpoint, in order."""
    return sorted(set(self._manager.all_steps()) - self._damaged)

  def latest_step(self) -> int | None:
    """Returns the latest step that has a complete checkpoint, if any."""
    return max(self.steps(), default=None)

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
    self.wait()
    try:
      begun = self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(jax.tree.map(_kept, state)),
          extra=ocp.args.JsonSave(dict(extra)),
        ),
        metrics={"metric": metric},
        force=True,
      )
    except (OSError, ValueError, RuntimeError) as error:
      raise self._unwritten(error) from error
    self._sound.add(step)
    self._sealer.submit(self._seal, step)
    return begun

  def verify(self, step: int) -> None:
    """Compares a checkpoint with its checksums, once.

    One that is not sealed, as after a process's end, is left to be read.

    Raises:
      DamagedError: names the file.
    """
    folder = self.folder / str(step)
    if step in self._sound or not checksums.is_sealed(folder):
      return
    checksums.check(folder)
    self._sound.add(step)

  def quarantine(self, step: int) -> None:
    """Counts a checkpoint no more; moves it away if these are written to.

    Args:
      step: which one; it goes to `damaged`, under its number.
    """
    self._damaged.add(step)
    if self._keep is None:
      return
    if jax.process_index() == 0:
      self._move_away(self.folder / str(step))
    multihost_utils.sync_global_devices(f"{self.folder} without {step}")
    self._manager.reload()
    self._damaged.discard(step)
    self._sound.discard(step)

  def restore_extra(self, step: int | None = None) -> dict[str, Any]:
    """Reads only the JSON part, for instance the config that shapes the state.

    Args:
      step: which checkpoint; None for the latest.

    Returns:
      The dictionary that was saved.

    Raises:
      UserError: if there is no such checkpoint.
    """
    step = self._existing(step)
    args = ocp.args.Composite(extra=ocp.args.JsonRestore())
    return dict(self._read(step, args).extra)

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
      DamagedError: if a file of it is not as it was written.
    """
    step = self._existing(step)
    self._check(abstract_state, step)
    args = ocp.args.Composite(
      state=ocp.args.StandardRestore(jax.tree.map(_placed, abstract_state)),
      extra=ocp.args.JsonRestore(),
    )
    restored = self._read(step, args)
    return restored.state, dict(restored.extra)

  def wait(self) -> None:
    """Waits until the last save is complete; raises what went wrong in it."""
    try:
      self._manager.wait_until_finished()
    except (OSError, ValueError, RuntimeError) as error:
      raise self._unwritten(error) from error

  def close(self) -> None:
    """Waits for the last save and lets go of the folder."""
    try:
      self.wait()
    finally:
      self._sealer.shutdown()
      self._manager.close()

  def _read(self, step: int, args: Any) -> Any:
    """Reads items of a checkpoint; what cannot be read is damaged."""
    try:
      return self._manager.restore(step, args=args)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
      raise DamagedError(
        f"The checkpoint '{self.folder / str(step)}' cannot be read "
        f"({errors.first_line(error)})."
      ) from error

  def _unwritten(self, error: Exception) -> errors.UserError:
    return errors.UserError(
      f"A checkpoint could not be written to '{self.folder}' "
      f"({errors.first_line(error)}); those before it are as they were."
    )

  def _seal(self, step: int) -> None:
    """Writes a checkpoint's checksums once it is complete."""
    while self._manager.is_saving_in_progress():
      time.sleep(0.02)
    folder = self.folder / str(step)
    if jax.process_index() or not folder.exists():
      return
    checksums.write(folder)

  def _metric(self, step: int) -> float:
    """Returns what a checkpoint is worth; the least where that is damaged."""
    metric = _read_metric(self.folder / str(step))
    return -math.inf if metric is None else metric

  def _set_aside_unreadable(self) -> None:
    """Moves checkpoints away whose metric cannot be read, and says so."""
    if jax.process_index() == 0 and self.folder.is_dir():
      for place in sorted(self.folder.iterdir()):
        if place.name.isdigit() and _read_metric(place) is None:
          print(
            f"zofo_jax: The checkpoint '{place}' is damaged: its metric cannot "
            f"be read. It is moved to '{self.damaged}'.",
            file=sys.stderr,
            flush=True,
          )
          self._move_away(place)
    multihost_utils.sync_global_devices(f"{self.folder} is readable")

  @property
  def damaged(self) -> epath.Path:
    """Folder beside this one that damaged checkpoints go to."""
    return self.folder.parent / "damaged" / self.folder.name

  def _move_away(self, place: epath.Path) -> None:
    self.damaged.mkdir(parents=True, exist_ok=True)
    target = self.damaged / place.name
    if target.exists():
      target.rmtree()
    place.rename(target)

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
        raise DamagedError(
          f"'{name}' is no checkpoint of zofo_jax: it has no folder '{item}'."
        )
    self.verify(step)
    return step

  def _check(self, abstract_state: Any, step: int) -> None:
    """Compares names, shapes and types before anything large is read."""
    name = self.folder / str(step)
    metadata = self._manager.item_metadata(step).state
    if metadata is None or metadata.tree is None:
      raise DamagedError(f"The checkpoint '{name}' has lost its description.")
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


def _read_metric(folder: epath.Path) -> float | None:
  """Reads the metric of a checkpoint; None where it is damaged."""
  try:
    return float(
      _worth(json.loads((folder / "metrics" / "metrics").read_text()))
    )
  except (OSError, ValueError, TypeError, KeyError):
    return None


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
