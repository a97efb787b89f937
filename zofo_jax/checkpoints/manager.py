"""Numbered checkpoints of a run, written by orbax while training continues.

A checkpoint is a folder with two items: `state`, any pytree of arrays and typed
PRNG keys, and `extra`, a JSON dictionary. It appears under its number only when
it is complete, and then gets the checksums of its files. This is a thin layer
over `orbax.checkpoint.CheckpointManager` that skips corrupt checkpoints, which
orbax does not. No other package imports orbax.
"""

import math
from collections.abc import Mapping
from concurrent import futures
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from zofo_jax import errors
from zofo_jax.checkpoints import checksums, folders, structure
from zofo_jax.checkpoints.checksums import (
  CorruptCheckpointError as CorruptCheckpointError,
)

_ITEMS = ("state", "extra")


class Checkpoints:
  """The checkpoints of one folder, to be used in a `with` statement.

  Attributes:
    folder: where they are, absolute; local or of another file system that
      etils supports, such as "gs://bucket/run/checkpoints".
  """

  def __init__(self, folder: str | epath.Path, *, keep: int | None = None):
    """Opens a folder of checkpoints.

    Args:
      folder: a path, local or "gs://...".
      keep: how many of the latest checkpoints to keep, besides the best one.
        With a number the folder is made if need be, and incomplete checkpoints
        of an interrupted process are removed; with None the folder is only
        read.

    Raises:
      UserError: the folder is only to be read and does not exist.
    """
    self.folder = folders.absolute(folder)
    if keep is None and not self.folder.is_dir():
      raise errors.UserError(
        f"There is no folder of checkpoints '{self.folder}'."
      )
    if self.folder.is_file():
      raise errors.UserError(
        f"'{self.folder}' is a file, expected a folder of checkpoints."
      )
    self._keep = keep
    self._verified: set[int] = set()  # checksums need not be compared (again)
    self._corrupt: set[int] = set()
    self._executor = futures.ThreadPoolExecutor(1)
    self._sealing: futures.Future[None] | None = None
    if keep is not None:
      folders.prepare(self.folder)
    self._manager = ocp.CheckpointManager(
      self.folder,
      options=ocp.CheckpointManagerOptions(
        create=keep is not None,
        preservation_policy=None if keep is None else _latest_and_best(keep),
        best_fn=folders.metric_of,  # without it orbax does not write the metric
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
    """Closes; after an exception, too, a save in progress is completed."""
    try:
      self.close()
    except errors.UserError:
      if kind is None:  # else it most likely has the same cause
        raise

  def steps(self) -> list[int]:
    """Returns the steps that have a complete checkpoint, in order."""
    return sorted(set(self._manager.all_steps()) - self._corrupt)

  def check_exists(self) -> None:
    """Checks that there is a complete checkpoint.

    Raises:
      UserError: there is none.
    """
    if not self.steps():
      raise errors.UserError(f"There is no checkpoint in '{self.folder}'.")

  def latest_step(self) -> int | None:
    """Returns the latest step that has a complete checkpoint, if any."""
    return max(self.steps(), default=None)

  def best_step(self) -> int | None:
    """Returns the step of the highest metric, if any; ties go to the latest."""

    def rank(step):
      metric = folders.read_metric(self.folder / str(step))
      return -math.inf if metric is None else metric, step

    return max(self.steps(), key=rank, default=None)

  def save(
    self,
    step: int,
    state: Any,
    extra: Mapping[str, Any],
    *,
    metric: float = 0.0,
  ) -> bool:
    """Starts to write a checkpoint; its arrays may be donated at once.

    Waits for the previous save, if it has not ended, and raises its errors.

    Args:
      step: the number of the checkpoint, above the existing ones.
      state: pytree of arrays and typed PRNG keys; NumPy arrays are copied.
      extra: JSON values that belong to the state but are not arrays.
      metric: the checkpoint of the highest is kept; ties go to the latest.

    Returns:
      Whether it was started; False if this step has a checkpoint already.
    """
    if self._keep is None:
      raise ValueError("These checkpoints were opened to be read only.")
    if step in self._manager.all_steps():
      return False
    self.wait()
    try:
      started = self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(
            jax.tree.map(_copy_numpy, structure.without_none(state))
          ),
          extra=ocp.args.JsonSave(dict(extra)),
        ),
        metrics={"metric": metric},
        force=True,
      )
    except (OSError, ValueError, RuntimeError) as error:
      raise self._write_error(error) from error
    self._verified.add(step)
    self._sealing = self._executor.submit(self._write_checksums, step)
    return started

  def verify(self, step: int) -> None:
    """Compares a checkpoint with its checksums, once.

    One without checksums, whose process ended too early, is accepted.

    Raises:
      CorruptCheckpointError: names the file.
    """
    folder = self.folder / str(step)
    if step in self._verified or not checksums.has_checksums(folder):
      return
    checksums.verify(folder)
    self._verified.add(step)

  def quarantine(self, step: int) -> None:
    """Ignores a checkpoint from now on, and moves it away when writing.

    Args:
      step: which one; it is moved to `damaged/`.
    """
    self._corrupt.add(step)
    if self._keep is None:
      return
    if jax.process_index() == 0:
      checksums.quarantine(self.folder / str(step))
    multihost_utils.sync_global_devices(f"without {step}")
    self._manager.reload()
    self._corrupt.discard(step)
    self._verified.discard(step)

  def restore(
    self, abstract_state: Any, step: int | None = None
  ) -> tuple[Any, dict[str, Any]]:
    """Reads a checkpoint into the given structure and shardings.

    Args:
      abstract_state: pytree like the saved state, of arrays or
        `jax.ShapeDtypeStruct`; a leaf without a sharding goes to the first
        device, and a NumPy array is read as one.
      step: which checkpoint; None for the latest.

    Returns:
      (state, extra) as they were saved.

    Raises:
      UserError: there is no such checkpoint, or a leaf of the state is missing,
        is not expected, or has another shape or type.
      CorruptCheckpointError: a file of it differs from what was written.
    """
    step = self._existing(step)
    name = str(self.folder / str(step))
    metadata = self._manager.item_metadata(step).state
    if metadata is None or metadata.tree is None:
      raise CorruptCheckpointError(
        f"The checkpoint '{name}' has lost its description."
      )
    expected = structure.without_none(abstract_state)
    structure.check_structure(metadata.tree, expected, name)
    args = ocp.args.Composite(
      state=ocp.args.StandardRestore(
        jax.tree.map(structure.with_default_sharding, expected)
      ),
      extra=ocp.args.JsonRestore(),
    )
    restored = self._read(step, args)
    state = restored.state
    if expected is not abstract_state:
      state = abstract_state._replace(**state)
    return state, dict(restored.extra)

  def wait(self) -> None:
    """Waits until the last save is complete; raises its errors."""
    try:
      self._manager.wait_until_finished()
    except (OSError, ValueError, RuntimeError) as error:
      raise self._write_error(error) from error
    # The next save may delete this checkpoint, so it is sealed before.
    if self._sealing is not None:
      futures.wait([self._sealing])

  def close(self) -> None:
    """Waits for the last save and releases the folder."""
    try:
      self.wait()
    finally:
      self._executor.shutdown()
      self._manager.close()

  def _write_checksums(self, step: int) -> None:
    """Writes a checkpoint's checksums once it is complete."""
    # Not by orbax's post_finalization_callback: it is called before the last
    # files are written and the folder gets its name.
    self._manager.wait_until_finished()
    folder = self.folder / str(step)
    if jax.process_index() == 0 and folder.exists():
      checksums.write_checksums(folder)

  def _read(self, step: int, args: Any) -> Any:
    """Reads items of a checkpoint; one that cannot be read is corrupt."""
    try:
      return self._manager.restore(step, args=args)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
      raise CorruptCheckpointError(
        f"The checkpoint '{self.folder / str(step)}' cannot be read "
        f"({errors.first_line(error)})."
      ) from error

  def _write_error(self, error: Exception) -> errors.UserError:
    return errors.UserError(
      f"A checkpoint could not be written to '{self.folder}' "
      f"({errors.first_line(error)}); earlier ones are unchanged."
    )

  def _existing(self, step: int | None) -> int:
    """Returns the step of a complete and valid checkpoint."""
    self.check_exists()
    steps = self.steps()
    step = steps[-1] if step is None else step
    if step not in steps:
      raise errors.UserError(
        f"There is no checkpoint of step {step} in '{self.folder}', only of "
        f"{', '.join(map(str, steps))}."
      )
    name = self.folder / str(step)
    for item in _ITEMS:
      if not (name / item).is_dir():
        raise CorruptCheckpointError(
          f"'{name}' is not a checkpoint of zofo_jax: it has no folder "
          f"'{item}'."
        )
    self.verify(step)
    return step


def _latest_and_best(keep: int) -> Any:
  policies = ocp.checkpoint_managers
  return policies.AnyPreservationPolicy(
    [
      policies.LatestN(keep),
      policies.BestN(get_metric_fn=folders.metric_of, n=1),
    ]
  )


def _copy_numpy(leaf: Any) -> Any:
  """Copies a NumPy array, which may be written in place while it is saved."""
  return leaf.copy() if isinstance(leaf, np.ndarray) else leaf
