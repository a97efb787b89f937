"""Rebuilds theta from a run's ledger, and compares ledgers.

zofo ledger info --ledger RUN/ledger.txt
zofo ledger replay --ledger RUN/ledger.txt --to 500 --base HUB_OR_DIR --out DIR
zofo ledger verify --ledger RUN/ledger.txt --run RUN
zofo ledger diff --ledger RUN/ledger.txt OTHER/ledger.txt
"""

import argparse
import itertools
import json
import logging
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from zofo_jax import errors, report
from zofo_jax.builders import model as model_lib
from zofo_jax.builders import run as run_lib
from zofo_jax.checkpoints import manager
from zofo_jax.checkpoints.ledger import format as ledger_format
from zofo_jax.checkpoints.ledger import replay as replay_lib
from zofo_jax.commands import arguments as arguments_lib
from zofo_jax.config import methods, paths


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
  parser = arguments_lib.make_parser("ledger", __doc__)
  commands = parser.add_subparsers(dest="command", required=True)
  for name, text in (
    ("info", "print what a ledger holds"),
    ("replay", "rebuild theta at a step"),
    ("verify", "compare theta with a run's checkpoint, bit for bit"),
    ("diff", "find where two ledgers start to differ"),
  ):
    command = commands.add_parser(name, help=text)
    command.add_argument(
      "--ledger", required=True, type=paths.expand, help="the file"
    )
    if name == "diff":
      command.add_argument(
        "other", type=paths.expand, help="the file to compare with"
      )
    if name in ("replay", "verify"):
      command.add_argument(
        "--base",
        type=paths.expand,
        help="hub id or folder of the initial theta",
      )
      command.add_argument(
        "--to", type=int, help="step; else the last, or the checkpoint's"
      )
    if name == "replay":
      command.add_argument(
        "--out", type=paths.expand, help="folder to write the model to"
      )
    if name == "verify":
      command.add_argument(
        "--run", required=True, type=paths.expand, help="folder of the run"
      )
  return parser.parse(arguments)


def info(path: str) -> None:
  """Prints what a ledger holds."""
  ledger = ledger_format.read(path)
  for name, value in ledger.header.items():
    print(f"{name}: {json.dumps(value)}")
  print(
    f"steps: {len(ledger.lines)}{', and a truncated line' * ledger.truncated}"
  )
  for line in ledger.lines[-1:]:
    rate = "none" if line.move is None else f"{line.move.learning_rate:g}"
    print(
      f"last: step {line.step}, learning rate {rate}, coefficients "
      f"{', '.join(f'{c:g}' for c in line.coefficients)}"
    )


def rebuild(path: str, base: str | None, to: int | None) -> tuple[Any, Any]:
  """Rebuilds theta.

  Args:
    path: the ledger.
    base: hub id or folder of the initial theta; None for that of the ledger.
    to: step; None for the last.

  Returns:
    (theta, (its step, the config, the model)).

  Raises:
    UserError: the ledger ends before the step, its updates cannot be replayed,
      or `base` is not the theta that it started from.
  """
  ledger = ledger_format.read(path)
  last = len(ledger.lines)
  to = last if to is None else to
  if not 0 <= to <= last:
    raise errors.UserError(f"--to: '{path}' has steps 1 to {last}; found {to}.")
  config = replay_lib.config_of(ledger.header, path)
  replay_lib.check_replayable(config.zo.optimizer, config.zo.direction)
  if base:
    config.model.name, config.model.revision = base, None
  now = replay_lib.versions()
  if now != ledger.header.get("versions"):
    logging.getLogger("zofo_jax").warning(
      "the ledger was written with %s; this is %s, and the last bits may "
      "differ.",
      ledger.header.get("versions"),
      now,
    )
  model = model_lib.load_model(**config.model)
  theta = model_lib.load_base(model)
  replay_lib.check_base(theta, ledger.header, str(model.folder))
  theta = replay_lib.advance(theta, ledger.header, ledger.lines[:to], path)
  return theta, (to, model)


def replay(
  path: str, base: str | None, to: int | None, out: str | None
) -> None:
  """Rebuilds theta, and writes it as a checkpoint folder if `out` is given."""
  if out:
    report.make_folder(epath.Path(out), "--out")
  theta, (step, model) = rebuild(path, base, to)
  print(f"theta at step {step}: SHA-256 {replay_lib.fingerprint(theta)}")
  if out:
    model_lib.save_base(out, model, theta)
    print(f"In {out}: config.json, tokenizer, safetensors.")


def verify(path: str, base: str | None, to: int | None, folder: str) -> None:
  """Compares the rebuilt theta with that of a run's checkpoint.

  Raises:
    UserError: they differ, or the checkpoint holds no theta.
  """
  run = run_lib.make_run(run_lib.read_config(epath.Path(folder)))
  if not methods.METHODS[run.config.method].updates_base:
    raise errors.UserError(
      f"--run: expected a run that moves theta; '{folder}' is of method "
      f"'{run.config.method}', whose checkpoints do not hold it."
    )
  rare = bool(run.config.ckpt.base_every_steps)
  abstract: Any = run.abstract_state()
  place = epath.Path(folder) / ("bases" if rare else "checkpoints")
  with manager.Checkpoints(place) as states:
    step = states.latest_step() if to is None else to
    wanted = {"base": abstract.base} if rare else abstract
    state, _ = states.restore(wanted, step)
  stored = jax.device_get(state["base"] if rare else state.base)
  del state
  theta, _ = rebuild(path, base, step)
  for (key, actual), expected in zip(
    jax.tree.leaves_with_path(theta),
    jax.tree.leaves(stored),
    strict=True,
  ):
    a, b = (np.asarray(leaf).view(np.uint8) for leaf in (actual, expected))
    if not np.array_equal(a, b):
      raise errors.UserError(
        f"'{path}' and '{place / str(step)}' differ in "
        f"{jax.tree_util.keystr(key)}: {np.mean(a != b):.2%} of its "
        "bytes."
      )
  print(f"The ledger gives the theta of '{place / str(step)}', bit for bit.")


def diff(path: str, other: str) -> int:
  """Prints where two ledgers start to differ; returns 1 if they do."""
  first, second = ledger_format.read(path), ledger_format.read(other)
  different = 0
  for name in sorted(first.header.keys() | second.header.keys()):
    values = [json.dumps(x.header.get(name)) for x in (first, second)]
    if values[0] != values[1]:
      different = 1
      print(f"{name}: {values[0]} and {values[1]}")
  for a, b in itertools.zip_longest(first.lines, second.lines):
    if a is None or b is None:
      print(f"steps: {len(first.lines)} and {len(second.lines)}")
      return 1
    if a.serialize() != b.serialize():
      print(
        f"step {a.step}: {a.serialize().strip()} and {b.serialize().strip()}"
      )
      return 1
  if not different:
    print("The ledgers are the same.")
  return different


def main(arguments: Sequence[str]) -> int:
  """Runs the command; returns 1 if compared ledgers differ."""
  options = _parse(arguments)
  if options.command == "info":
    info(options.ledger)
  elif options.command == "diff":
    return diff(options.ledger, options.other)
  elif options.command == "verify":
    verify(options.ledger, options.base, options.to, options.run)
  else:
    replay(options.ledger, options.base, options.to, options.out)
  return 0
