"""A run of the tiny configuration in a process, and its results."""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import resource
import subprocess
import sys
import time
import traceback
from typing import Any

import ml_collections
import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
# Changes of the tiny configuration, by name of a field; of the whole campaign.
CHANGES: dict[str, Any] = {}
STEPS, EVAL_EVERY, BASE_EVERY, MAX_NONFINITE = 20, 4, 8, 2
# The processes that copy the output of a run to its log, by its id.
_KEEPERS: dict[int, subprocess.Popen] = {}
SCRATCH = (
  "seconds",
  "compile_seconds",
  "rss_bytes",
  "train_seconds",
  "peak_rss_bytes",
)


def make_config(home: pathlib.Path, rare: bool) -> ml_collections.ConfigDict:
  """Returns the tiny configuration.

  Args:
    home: has the model and the rows.
    rare: whether the backbone is written less often than the rest.
  """
  from zofo_jax.config import defaults

  config = defaults.base_config()
  config.loss = "classification"
  config.penalty = 1.0
  config.model.name = str(home / "model")
  config.data.task = "rotten_tomatoes"
  config.data.dir = str(home / "rows")
  config.data.num_selection = config.data.num_test = 16
  # All rows, so that no message says how many there are.
  config.data.num_lower, config.data.num_upper = 118, 58
  config.lower.num_steps = 2
  config.lower.learning_rate = config.upper.learning_rate = 1e-2
  config.zo.learning_rate = 1e-4
  config.train.num_steps = STEPS
  config.train.eval_every_steps = EVAL_EVERY
  config.train.max_nonfinite = MAX_NONFINITE
  config.ckpt.keep = STEPS
  config.ckpt.base_every_steps = BASE_EVERY if rare else 0
  config.update_from_flattened_dict(CHANGES)
  return config


def start(
  home: pathlib.Path,
  folder: pathlib.Path,
  *,
  rare: bool,
  max_bytes: int | None = None,
  nan_from: int | None = None,
) -> int:
  """Starts a run in a process of its own.

  Args:
    home: has the model, the rows and the programs compiled before.
    folder: of the run; its output goes to `folder.log`.
    rare: as for `make_config`.
    max_bytes: the largest file that the process may write, as on a full disk.
    nan_from: the first step whose batches are NaN.

  Returns:
    The process's id.
  """

  def work() -> int:
    from zofo_jax import errors
    from zofo_jax.training import train

    handler = logging.StreamHandler()  # warnings, as the command line does
    handler.setFormatter(logging.Formatter("zofo_jax: %(message)s"))
    logger = logging.getLogger("zofo_jax")
    logger.handlers, logger.propagate = [handler], False
    if nan_from is not None:
      _break_batches(train, nan_from)
    if max_bytes is not None:
      hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
      resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, hard))
    try:
      train.train(make_config(home, rare), str(folder))
    except errors.UserError as error:
      print(f"zofo_jax: {error}", file=sys.stderr)
      return 2
    except errors.InterruptedRun as error:
      print(f"zofo_jax: {error}", file=sys.stderr)
      return error.code
    return 0

  return fork(home, work, pathlib.Path(f"{folder}.log"))


def wait(process: int, seconds: float | None = None) -> int | None:
  """Waits for a process; returns its exit code, -N for a signal, or None."""
  end = None if seconds is None else time.monotonic() + seconds
  while True:
    done, status = os.waitpid(process, 0 if end is None else os.WNOHANG)
    if done:
      _KEEPERS.pop(process).wait()
      return os.waitstatus_to_exitcode(status)
    if end is not None and time.monotonic() > end:
      return None
    time.sleep(0.005)


def result(
  home: pathlib.Path, folder: pathlib.Path, step: int | None = None
) -> dict[str, str]:
  """Reads the results of a run.

  Args:
    home: as for `start`.
    folder: of the run.
    step: of the state; None for the last and the best, the metrics, the
      summary and the ledger as well.

  Returns:
    A checksum by name.
  """
  target = pathlib.Path(f"{folder}.result")

  def work() -> int:
    import jax
    from etils import epath

    from zofo_jax import report
    from zofo_jax.builders import run as run_lib
    from zofo_jax.checkpoints import state_store

    run = run_lib.make_run(run_lib.read_config(epath.Path(folder)))
    values: dict[str, str] = {}
    with state_store.open_store(run, epath.Path(folder)) as states:
      last = states.checkpoints.latest_step()
      steps = [last, states.checkpoints.best_step()] if step is None else [step]
      for number in steps:
        state, _ = states.restore(number)
        state = state._replace(key=jax.random.key_data(state.key))
        for path, leaf in jax.tree.leaves_with_path(state):
          name = f"{number}{jax.tree_util.keystr(path)}"
          values[name] = _digest(np.ascontiguousarray(leaf).tobytes())
          if not np.isfinite(np.asarray(leaf, np.float64)).all():
            values[name] = "not finite"
    if step is None:
      rows = report.read_jsonl(folder / "metrics.jsonl")
      rows.append(json.loads((folder / "summary.json").read_text()))
      for number, row in enumerate(rows):
        kept = {k: v for k, v in row.items() if k not in SCRATCH}
        values[f"metrics {number}"] = json.dumps(kept, sort_keys=True)
      values["ledger"] = _digest((folder / state_store.LEDGER).read_bytes())
    target.write_text(json.dumps(values))
    return 0

  code = wait(fork(home, work, pathlib.Path(f"{folder}.result.log")))
  return json.loads(target.read_text()) if code == 0 else {"unreadable": "yes"}


def _digest(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()


def _break_batches(train, first: int) -> None:
  import jax

  make = train.iteration_batch

  def broken(config, examples, shape, pad, step):
    batch = make(config, examples, shape, pad, step)
    if step < first:
      return batch
    return jax.tree.map(
      lambda x: np.full_like(x, np.nan) if x.dtype == np.float32 else x, batch
    )

  train.iteration_batch = broken


def fork(home: pathlib.Path, work, log: pathlib.Path) -> int:
  """Runs work() in a copy of this process, whose imports it spares."""
  # Through a pipe: what a process may write to files is sometimes limited.
  with log.open("ab") as file:
    keeper = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file)
  assert keeper.stdin is not None
  process = os.fork()
  if process:
    keeper.stdin.close()
    _KEEPERS[process] = keeper
    return process
  code = 70
  with contextlib.suppress(BaseException):
    os.dup2(keeper.stdin.fileno(), 1)
    os.dup2(keeper.stdin.fileno(), 2)
    keeper.stdin.close()
    try:
      import jax

      jax.config.update("jax_platforms", "cpu")
      for name, value in (
        ("jax_compilation_cache_dir", str(home / "cache")),
        ("jax_persistent_cache_min_compile_time_secs", 0.0),
        ("jax_persistent_cache_min_entry_size_bytes", -1),
      ):
        jax.config.update(name, value)
      code = work()
    except BaseException:
      traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
  os._exit(code)
