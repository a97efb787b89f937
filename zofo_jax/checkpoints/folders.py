"""The folder of a run's checkpoints: its path, leftovers and metrics."""

import json
import logging
import os
import sys
from collections.abc import Mapping

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from zofo_jax import errors
from zofo_jax.checkpoints import checksums

_log = logging.getLogger("zofo_jax")


def absolute(folder: str | epath.Path) -> epath.Path:
  """Returns an absolute path; names are relative to the current folder.

  Raises:
    UserError: TensorStore, which writes arrays, cannot have this name.
  """
  path = epath.Path(folder)
  # `resolve` would take "gs://..." for a relative path.
  path = path if path.is_absolute() else path.resolve()
  try:
    str(path).encode()  # not bytes that the locale cannot decode
    os.fsencode(str(path))
  except UnicodeEncodeError as error:
    raise errors.UserError(
      f"{path}: expected a name in UTF-8, and a locale such as C.UTF-8; found "
      f"the locale's encoding {sys.getfilesystemencoding()}."
    ) from error
  return path


def prepare(folder: epath.Path) -> None:
  """Removes incomplete checkpoints and quarantines those without a metric.

  Orbax, too, can remove incomplete ones, but does so in a thread that nobody
  waits for if nothing is saved. It then removes what is being written by the
  next manager of the folder. And orbax reads the metrics of all checkpoints at
  once: it must be able to read each of them.
  """
  if jax.process_index() == 0 and folder.is_dir():
    for incomplete in ocp.path.step.all_temporary_paths(folder):
      incomplete.get().rmtree()
    for path in sorted(folder.iterdir()):
      if path.name.isdigit() and read_metric(path) is None:
        target = checksums.quarantine(path)
        _log.warning(
          "The checkpoint '%s' is corrupt: its metric cannot be read. It is "
          "moved to '%s'.",
          path,
          target.parent,
        )
  multihost_utils.sync_global_devices("checkpoints are readable")


def read_metric(folder: epath.Path) -> float | None:
  """Reads the metric of a checkpoint; None if it is corrupt."""
  try:
    metrics = json.loads((folder / "metrics" / "metrics").read_text())
    return float(metric_of(metrics))
  except (OSError, ValueError, TypeError, KeyError):
    return None


def metric_of(metrics: Mapping[str, float]) -> float:
  """Returns the metric among those that orbax writes."""
  return metrics["metric"]
