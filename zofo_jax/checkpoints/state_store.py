"""The states of a run on disk: its checkpoints, its ledger, theta now and then.

With `ckpt.base_every_steps` a checkpoint holds all but theta, which lies rarely
in `bases/`; it is rebuilt from the newest of those, or from the model's own
weights, and the ledger. The ledger up to a checkpoint is in the checkpoint too,
so that damage to the file `ledger.txt` loses nothing. Where an adapter alone is
trained, theta is the model's own weights and is never written.
"""

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self

import jax
import ml_collections
import numpy as np
from etils import epath

from zofo_jax import errors, report
from zofo_jax.builders import model as model_lib
from zofo_jax.builders import run as run_lib
from zofo_jax.checkpoints import ledger, manager
from zofo_jax.config import defaults, methods
from zofo_jax.core.types import BilevelState
from zofo_jax.sharding import mesh as mesh_lib

LEDGER = "ledger.txt"
# A ledger's lines, and the states, would be another run's with these changed.
_NEVER = (
  "seed",
  "model.name",
  "model.revision",
  "model.dtype",
  "zo.direction",
  "zo.rank",
  "zo.threshold",
  "zo.select",
  "zo.layers",
  "zo.frame_steps",
  "zo.optimizer",
  "ckpt.base_every_steps",
)


class Trained(Protocol):
  """What is trained: a `runs.Run`, or a family of tasks."""

  @property
  def config(self) -> ml_collections.ConfigDict:
    """The resolved config."""

  @property
  def model(self) -> model_lib.Model:
    """The model without weights."""

  @property
  def mesh(self) -> mesh_lib.AnyMesh:
    """The grid of devices."""

  def abstract_state(self) -> BilevelState:
    """Returns the shapes and shardings of a state; reads no weights."""


class Store:
  """The states of one run, to be used in a `with` statement.

  Attributes:
    checkpoints: all but theta, or everything.
  """

  def __init__(self, run: Trained, folder: epath.Path, *, write: bool = False):
    """Opens a run's folder.

    Args:
      run: the run.
      folder: its folder.
      write: whether to train it; else the folder is only read.

    Raises:
      UserError: there are no checkpoints, or none can be made.
    """
    self._run, self._folder = run, folder
    keep = run.config.ckpt.keep
    self.checkpoints = manager.Checkpoints(
      folder / "checkpoints", keep=keep if write else None
    )
    # Whether checkpoints hold all but theta.
    self._base_stored_separately = bool(run.config.ckpt.base_every_steps)
    self._base_stored_separately |= not methods.METHODS[
      run.config.method
    ].updates_base
    self._bases: manager.Checkpoints | None = None
    if run.config.ckpt.base_every_steps:
      self._bases = manager.Checkpoints(
        folder / "bases", keep=2 if write else None
      )
    self._writer: ledger.Writer | None = None

  def __enter__(self) -> Self:
    """Returns itself."""
    return self

  def __exit__(self, *exception: Any) -> None:
    """Closes, also after an exception: what was begun is still committed."""
    if self._writer is not None:
      self._writer.close()
    if self._bases is not None:
      self._bases.__exit__(*exception)
    self.checkpoints.__exit__(*exception)

  def start_ledger(self, state: BilevelState) -> None:
    """Starts the ledger of a run at its first state."""
    header = ledger.make_header(self._run.config, state.base, state.key)
    self._write_ledger(ledger.start(header))

  def resume(self) -> tuple[BilevelState, dict[str, Any]] | None:
    """Reads the latest checkpoint that is as it was written.

    Returns:
      The state and its record; None if there is none.

    Raises:
      UserError: the checkpoint is not of this config.
    """
    found = self._first_sound(self.checkpoints.latest_step)
    if found is None:
      return None
    state, record = found
    text = record.pop("ledger")
    record.pop("config", None)  # the run's own, which is checked by then
    path = self._folder / LEDGER
    if not path.exists() or not path.read_bytes().startswith(text.encode()):
      _say(f"'{path}' is damaged; it is written anew from the checkpoint.")
    self._write_ledger(text)
    return state, record

  def best(self) -> tuple[BilevelState, dict[str, Any]]:
    """Reads the best checkpoint that is as it was written.

    Raises:
      UserError: there is none, or it is not of this config.
    """
    found = self._first_sound(self.checkpoints.best_step)
    if found is None:
      raise errors.UserError(
        f"There is no checkpoint in '{self.checkpoints.folder}'."
      )
    return found

  def append(self, step: int, info: Any) -> None:
    """Writes what a step did to the ledger."""
    assert self._writer is not None
    self._writer.append(
      ledger.LedgerEntry(step, np.asarray(info.coefficients), info.move)
    )

  def save(
    self,
    state: BilevelState,
    record: Mapping[str, Any],
    metric: float = -math.inf,
  ) -> None:
    """Begins to write a checkpoint; its arrays may be donated at once.

    Args:
      state: with every step of it in the ledger.
      record: what belongs to the state and is no array; JSON.
      metric: what the state is worth; the highest is kept.

    Raises:
      UserError: it, or the one before, could not be written.
    """
    assert self._writer is not None
    step = int(state.step)
    if self._bases is not None:
      last = self._bases.latest_step() or 0
      if step - last >= self._run.config.ckpt.base_every_steps:
        self._bases.save(step, {"base": state.base}, {})
    if self._base_stored_separately:
      state = state._replace(base={})
    extra = {
      **record,
      "config": self._run.config.to_dict(),
      "ledger": self._writer.serialize(),  # its header has the versions
    }
    self.checkpoints.save(step, state, extra, metric=metric)

  def wait(self) -> None:
    """Waits until the last save is complete; raises what went wrong in it."""
    if self._bases is not None:
      self._bases.wait()
    self.checkpoints.wait()

  def _write_ledger(self, text: str) -> None:
    self._writer = ledger.Writer(self._folder / LEDGER, text)

  def _first_sound(
    self, choose: Callable[[], int | None]
  ) -> tuple[BilevelState, dict[str, Any]] | None:
    while (step := choose()) is not None:
      try:
        return self.restore(step)
      except manager.CorruptCheckpointError as error:
        _say(f"{error} The one before it is used, if there is any.")
        self.checkpoints.quarantine(step)
    return None

  def restore(self, step: int) -> tuple[BilevelState, dict[str, Any]]:
    """Reads a checkpoint; theta is rebuilt if it is not in it.

    Raises:
      UserError: there is none of this step, or it is not of this config.
      CorruptCheckpointError: it is not as it was written.
    """
    abstract = self._run.abstract_state()
    if not self._base_stored_separately:
      return self.checkpoints.restore(abstract, step)
    abstract = abstract._replace(base={})
    state, extra = self.checkpoints.restore(abstract, step)
    where = f"{self.checkpoints.folder / str(step)}, ledger"
    found = ledger.parse(extra["ledger"].encode(), where)
    base = self._rebuild_base(step, found, where)
    return state._replace(base=base), extra

  def _start(self, found: ledger.Ledger) -> Any:
    run = self._run
    return ledger.load_start(run.config, run.model, found.header, run.mesh)

  def _rebuild_base(self, step: int, found: ledger.Ledger, where: str) -> Any:
    """Rebuilds theta from the newest sound base at or before a step."""
    if self._bases is None:
      return self._start(found)
    start, base = 0, None
    earlier = [number for number in self._bases.steps() if number <= step]
    for number in reversed(earlier):
      abstract = self._run.abstract_state().base
      try:
        tree, _ = self._bases.restore({"base": abstract}, number)
        start, base = number, tree["base"]
        break
      except manager.CorruptCheckpointError as error:
        _say(f"{error} The one before it is used, or the model's weights.")
        self._bases.quarantine(number)
    if base is None:
      base = self._start(found)
    return ledger.advance(base, found.header, found.lines[start:step], where)


def make_folder(folder: epath.Path) -> None:
  """Makes a folder in a run's, unless it is there, and can be written to.

  Raises:
    UserError: it cannot be made or written to.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe-{jax.process_index()}"
    probe.write_text("")
    probe.unlink()
  except OSError as error:
    raise errors.UserError(
      f"--workdir: {folder} cannot be written to ({error.strerror}); expected "
      "a folder to write into."
    ) from error


def check_config(config: Any, folder: epath.Path) -> None:
  """Stops before a run goes on under another config than it began with.

  It may go on on another mesh. Fields that `ckpt.may_change` names may be
  others as well, but for those that decide what the ledger's lines mean.

  Raises:
    UserError: names the fields that differ.
  """
  path = folder / "config.json"
  if not path.exists():
    return
  before = defaults.flat(run_lib.read_config(folder))
  now = defaults.flat(config)
  allowed = {"ckpt.may_change", *config.ckpt.may_change} - set(_NEVER)
  # What no number depends on.
  allowed |= {name for name in now if name.startswith("mesh.")}
  allowed |= {"train.trackers", "train.profile_steps"}
  different = {
    name
    for name in before.keys() | now.keys()
    if before.get(name) != now.get(name)
  }
  changed = [
    f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
    for name in sorted(different - allowed)
  ]
  if changed:
    fixed = sorted(different & set(config.ckpt.may_change) & set(_NEVER))
    raise errors.UserError(
      f"{path} is of a run with another config: {'; '.join(changed[:5])}"
      f"{' and more' if len(changed) > 5 else ''}. Give another --workdir, "
      "remove this one, or name what may change in config.ckpt.may_change"
      + (f" ({', '.join(fixed)} never may)." if fixed else ".")
    )


def write_config(config: Any, folder: epath.Path) -> None:
  """Leaves the config for every later command."""
  report.write_json(folder / "config.json", config.to_dict())


def _say(text: str) -> None:
  print(f"zofo_jax: {text}", file=sys.stderr, flush=True)
