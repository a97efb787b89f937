"""Experiment trackers: TensorBoard, Weights & Biases, MLflow.

`config.train.trackers` names them; `metrics.jsonl` is written in any case. They
write into the run's folder, to be viewed or synced later, unless
WANDB_MODE=online or MLFLOW_TRACKING_URI is set. A resumed run continues in the
same tracker run.
"""

import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

from etils import epath

from zofo_jax import errors
from zofo_jax.report import jsonl
from zofo_jax.sharding import multihost


class Tracker(NamedTuple):
  """An open tracker.

  Attributes:
    write: (step, {name: number}) -> None.
    close: () -> None.
  """

  write: Callable[[int, dict[str, float]], Any]
  close: Callable[[], Any]


class Trackers:
  """The trackers of a run, to be used in a `with` statement."""

  def __init__(
    self,
    names: Sequence[str],
    folder: epath.Path,
    fields: Mapping[str, Any],
    step: int = 0,
  ):
    """Opens the trackers; of several processes only the first does.

    Args:
      names: of TRACKERS.
      folder: of the run.
      fields: of its config, {"zo.eps": 1e-3, ...}.
      step: iterations done so far.

    Raises:
      UserError: a package is not installed.
    """
    self._open: list[Tracker] = []
    if not multihost.is_primary():
      return
    for name in names:
      package, make = TRACKERS[name]
      try:
        self._open.append(make(folder, fields, step))
      except ModuleNotFoundError as error:
        raise errors.UserError(
          f"config.train.trackers: '{name}' needs the package "
          f"{package}: pip install 'zofo-jax[trackers]' ({error})."
        ) from error

  def __enter__(self) -> Self:
    """Returns itself."""
    return self

  def __exit__(self, *unused: object) -> None:
    """Closes the trackers."""
    for tracker in self._open:
      tracker.close()

  def write(self, row: Mapping[str, Any]) -> None:
    """Writes the numbers of a row of `metrics.jsonl`; lists are left out."""
    numbers = {
      name: float(value)
      for name, value in row.items()
      if name != "step" and getattr(value, "ndim", 0) == 0
      # NumPy's and Python's, no text and no lists.
      if isinstance(value, int | float) or hasattr(value, "item")
    }
    for tracker in self._open:
      tracker.write(int(row["step"]), numbers)


def _tensorboard(folder, fields, step):
  import tensorboardX

  del fields
  writer = tensorboardX.SummaryWriter(
    str(folder / "tensorboard"), purge_step=step + 1 if step else None
  )

  def write(step, numbers):
    for name, number in numbers.items():
      writer.add_scalar(name, number, step)

  return Tracker(write, writer.close)


def _wandb(folder, fields, step):
  del step
  import wandb

  run = wandb.init(
    dir=str(folder),
    project=os.environ.get("WANDB_PROJECT", "zofo_jax"),
    id=_run_id(folder, "wandb", lambda: uuid.uuid4().hex[:8]),
    name=folder.name,
    config=dict(fields),
    resume="allow",
    mode=None if "WANDB_MODE" in os.environ else "offline",
  )
  return Tracker(lambda step, numbers: run.log(numbers, step=step), run.finish)


def _mlflow(folder, fields, step):
  import mlflow

  if "MLFLOW_TRACKING_URI" not in os.environ:
    mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
  client = mlflow.MlflowClient()
  existing = client.get_experiment_by_name("zofo_jax")
  experiment = (
    existing.experiment_id if existing else client.create_experiment("zofo_jax")
  )
  run_id = _run_id(
    folder,
    "mlflow",
    lambda: client.create_run(experiment, run_name=folder.name).info.run_id,
  )
  if not step:
    for name, value in fields.items():
      client.log_param(run_id, name, str(value)[:500])

  def write(step, numbers):
    for name, number in numbers.items():
      client.log_metric(run_id, name, number, step=step)

  return Tracker(write, lambda: client.set_terminated(run_id))


# Name in configs -> (package, (folder, fields, step) -> Tracker).
TRACKERS: dict[str, tuple[str, Callable[..., Tracker]]] = {
  "tensorboard": ("tensorboardX", _tensorboard),
  "wandb": ("wandb", _wandb),
  "mlflow": ("mlflow", _mlflow),
}


def _run_id(folder, name: str, make: Callable[[], str]) -> str:
  """Returns a run's id in a tracker, which is kept in `trackers.json`."""
  path = folder / "trackers.json"
  ids = json.loads(path.read_text()) if path.exists() else {}
  if name not in ids:
    ids[name] = make()
    jsonl.write_json(path, ids)
  return ids[name]
