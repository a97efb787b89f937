"""The states of a run on disk: its checkpoints, its ledger and its backbone.

With `ckpt.base_every_steps` a checkpoint holds all but the backbone θ, which is
written less often, to `bases/`; it is rebuilt from the newest of those, or from
the model's own weights, and the ledger. The ledger up to a checkpoint is in the
checkpoint too, so that nothing is lost with the file `ledger.txt`. If only
an adapter is trained, θ is the model's own weights and is never written.
"""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np
from etils import epath

from zofo_jax import errors
from zofo_jax.builders import model as model_lib
from zofo_jax.builders import run as run_lib
from zofo_jax.checkpoints import ledger, manager
from zofo_jax.config import methods
from zofo_jax.core.types import BilevelState

LEDGER = "ledger.txt"
_log = logging.getLogger("zofo_jax")


class Store:
  """The states of one run, to be used in a `with` statement.

  Attributes:
    checkpoints: of the whole state, or of all but the backbone.
    inputs: of the run besides its config.
  """

  def __init__(
    self,
    folder: epath.Path,
    config: dict[str, Any],
    abstract_state: Callable[[], BilevelState],
    load_base: Callable[[], Any],
    *,
    inputs: Mapping[str, Any] | None = None,
    base_is_trained: bool = True,
    base_every_steps: int = 0,
    keep: int | None = None,
  ):
    """Opens a run's folder.

    Args:
      folder: of the run.
      config: the run's config, which is saved with each state.
      abstract_state: () -> shapes and shardings of a state.
      load_base: () -> the model's own weights: θ before the first step.
      inputs: of the run besides its config, saved with it; see
        `checkpoints.inputs`.
      base_is_trained: whether the backbone changes at all.
      base_every_steps: how often it is written; 0 with every checkpoint.
      keep: how many checkpoints to keep; None if the folder is only read.

    Raises:
      UserError: there are no checkpoints, or none can be made.
    """
    self._folder, self._config = folder, config
    self.inputs = dict(inputs or {})
    self._abstract_state, self._load_base = abstract_state, load_base
    self._base_every_steps = base_every_steps
    self._base_stored_separately = bool(base_every_steps) or not base_is_trained
    self.checkpoints = manager.Checkpoints(folder / "checkpoints", keep=keep)
    self._bases: manager.Checkpoints | None = None
    if base_every_steps:
      self._bases = manager.Checkpoints(
        folder / "bases", keep=None if keep is None else 2
      )
    self._writer: ledger.Writer | None = None

  def __enter__(self) -> Self:
    """Returns itself."""
    return self

  def __exit__(self, *exception: Any) -> None:
    """Closes; after an exception, too, a save in progress is completed."""
    if self._writer is not None:
      self._writer.close()
    if self._bases is not None:
      self._bases.__exit__(*exception)
    self.checkpoints.__exit__(*exception)

  def start_ledger(self, state: BilevelState) -> None:
    """Starts the ledger of a run at its first state."""
    header = ledger.make_header(
      self._config["model"],
      self._config["zo"],
      state.base,
      state.key,
      self.inputs,
    )
    self._write_ledger(ledger.start(header))

  def resume(self) -> tuple[BilevelState, dict[str, Any]] | None:
    """Reads the latest valid checkpoint and cuts the ledger back to it.

    Returns:
      The state and its metadata; None if there is none.

    Raises:
      UserError: the checkpoint does not fit the config.
    """
    restored = self._first_valid(self.checkpoints.latest_step)
    if restored is None:
      return None
    state, run_metadata = restored
    text = run_metadata.pop("ledger")
    run_metadata.pop("config", None)  # has been compared by now
    path = self._folder / LEDGER
    if not path.exists() or not path.read_bytes().startswith(text.encode()):
      _log.warning(
        "'%s' is corrupt; it is written anew from the checkpoint.", path
      )
    self._write_ledger(text)
    return state, run_metadata

  def best(self) -> tuple[BilevelState, dict[str, Any]]:
    """Reads the valid checkpoint of the highest metric.

    Raises:
      UserError: there is none, or it does not fit the config.
    """
    restored = self._first_valid(self.checkpoints.best_step)
    if restored is None:
      raise errors.UserError(
        f"There is no checkpoint in '{self.checkpoints.folder}'."
      )
    return restored

  def append(self, step: int, info: Any) -> None:
    """Appends a step to the ledger."""
    assert self._writer is not None
    self._writer.append(
      ledger.LedgerEntry(step, np.asarray(info.coefficients), info.move)
    )

  def save(
    self,
    state: BilevelState,
    run_metadata: Mapping[str, Any],
    metric: float = -math.inf,
  ) -> None:
    """Starts to write a checkpoint; its arrays may be donated at once.

    Args:
      state: all of its steps are in the ledger.
      run_metadata: JSON values that belong to the state but are not arrays.
      metric: the checkpoint of the highest is kept.

    Raises:
      UserError: it, or the one before, could not be written.
    """
    assert self._writer is not None
    step = int(state.step)
    if self._bases is not None:
      last = self._bases.latest_step() or 0
      if step - last >= self._base_every_steps:
        self._bases.save(step, {"base": state.base}, {})
    if self._base_stored_separately:
      state = state._replace(base={})
    extra = {
      **run_metadata,
      "config": self._config,
      "ledger": self._writer.serialize(),  # its header has the versions
    }
    self.checkpoints.save(step, state, extra, metric=metric)

  def wait(self) -> None:
    """Waits until the last save is complete; raises its errors."""
    if self._bases is not None:
      self._bases.wait()
    self.checkpoints.wait()

  def restore(self, step: int) -> tuple[BilevelState, dict[str, Any]]:
    """Reads a checkpoint, and rebuilds the backbone if it is not in it.

    Raises:
      UserError: there is none of this step, or it does not fit the config.
      CorruptCheckpointError: a file of it differs from what was written.
    """
    abstract = self._abstract_state()
    if not self._base_stored_separately:
      return self.checkpoints.restore(abstract, step)
    state, extra = self.checkpoints.restore(abstract._replace(base={}), step)
    source = f"{self.checkpoints.folder / str(step)}, ledger"
    parsed = ledger.parse(extra["ledger"].encode(), source)
    base = self._rebuild_base(step, abstract.base, parsed, source)
    return state._replace(base=base), extra

  def _write_ledger(self, text: str) -> None:
    self._writer = ledger.Writer(self._folder / LEDGER, text)

  def _first_valid(
    self, choose: Callable[[], int | None]
  ) -> tuple[BilevelState, dict[str, Any]] | None:
    """Restores the chosen checkpoint; quarantines corrupt ones until then."""
    while (step := choose()) is not None:
      try:
        return self.restore(step)
      except manager.CorruptCheckpointError as error:
        _log.warning(
          "%s The one before it is used, if there is any.",
          error,
        )
        self.checkpoints.quarantine(step)
    return None

  def _rebuild_base(
    self, step: int, abstract_base: Any, parsed: ledger.Ledger, source: str
  ) -> Any:
    """Rebuilds the backbone from a stored one and the ledger."""
    first, base = self._newest_base(step, abstract_base)
    if base is None:
      base = self._load_base()
      ledger.check_base(base, parsed.header, self._config["model"]["name"])
    if self._bases is None:  # it is not trained
      return base
    return ledger.advance(base, parsed.header, parsed.lines[first:step], source)

  def _newest_base(self, step: int, abstract_base: Any) -> tuple[int, Any]:
    """Reads the newest valid backbone at or before a step, else (0, None)."""
    if self._bases is None:
      return 0, None
    for number in reversed(self._bases.steps()):
      if number > step:
        continue
      try:
        tree, _ = self._bases.restore({"base": abstract_base}, number)
        return number, tree["base"]
      except manager.CorruptCheckpointError as error:
        _log.warning(
          "%s The one before it is used, or the model's weights.", error
        )
        self._bases.quarantine(number)
    return 0, None


def check_exists(folder: epath.Path) -> None:
  """Checks that a run has a checkpoint, before its rows or weights are read.

  Raises:
    UserError: there is none.
  """
  with manager.Checkpoints(folder / "checkpoints") as checkpoints:
    checkpoints.check_exists()


def open_store(
  run: run_lib.Run,
  folder: epath.Path,
  *,
  abstract_state: Callable[[], BilevelState] | None = None,
  inputs: Mapping[str, Any] | None = None,
  write: bool = False,
) -> Store:
  """Opens the states of a run as its config says.

  Args:
    run: the run.
    folder: its folder.
    abstract_state: () -> shapes and shardings of a state; None for those of a
      run over one task.
    inputs: as of `inputs.check`, of a run that is trained.
    write: whether to train it; else the folder is only read.

  Raises:
    UserError: there are no checkpoints, or none can be made.
  """
  config = run.config
  return Store(
    folder,
    run_lib.saved_config(config.to_dict()),
    abstract_state or run.abstract_state,
    lambda: model_lib.load_base(run.model, run.mesh),
    inputs=inputs,
    base_is_trained=methods.METHODS[config.method].updates_base,
    base_every_steps=config.ckpt.base_every_steps,
    keep=config.ckpt.keep if write else None,
  )
