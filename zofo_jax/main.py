"""The command line: what there is to do with a config or a run.

  python -m zofo_jax.main [train] --config=configs/opt.py --workdir=DIR
  python -m zofo_jax.main evaluate --workdir=DIR
  python -m zofo_jax.main predict --workdir=DIR --input=ROWS.jsonl \
      --output=ANSWERS.jsonl

On the same config, to compare with: in-context learning (zero-shot with
--config.icl.num_shots=0), a linear probe, and the head trained alone.

  python -m zofo_jax.main icl --config=configs/opt.py --workdir=DIR
  python -m zofo_jax.main probe --config=configs/opt.py --workdir=DIR
  python -m zofo_jax.main head --config=configs/opt.py --workdir=DIR

Over many tasks, and then for a new one from a few of its rows:

  python -m zofo_jax.main --config=configs/metatrain.py --workdir=DIR
  python -m zofo_jax.main --config=configs/adapt.py:run=DIR --workdir=NEW

Without devices or weights, whether a run fits (also python -m zofo_jax.plan):

  python -m zofo_jax.main plan --config=configs/opt.py:size=13b \
      --topology=v5e:4x4 --json=PLAN.json

Any field of the config can be set: --config.zo.eps=1e-2; --print_config lists
them all, with what they mean and what a config changes. Exit code 2 means a
mistake in the command, its config or its files, told in one sentence; 143 or
130 that SIGTERM or SIGINT came: the state is saved, the same command goes on.

Small on purpose: everything worth testing lives in importable modules.
"""

import logging
import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from zofo_jax import errors
from zofo_jax.config import defaults, show, validate
from zofo_jax.sharding import multihost
from zofo_jax.training import guards

OF_A_CONFIG = (*validate.COMMANDS, "plan")
COMMANDS = ("train", "evaluate", "predict", *OF_A_CONFIG[1:])

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "A file of configs/, as FILE.py or FILE.py:name=value,..."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run: checkpoints, metrics, summary."
)
_PRINT_CONFIG = flags.DEFINE_bool(
  "print_config", False, "Print every field of the config, and do nothing."
)
_DISTRIBUTED = flags.DEFINE_string(
  "distributed",
  None,
  "Several processes, the same command in each: auto (TPU pods, SLURM, ...) or "
  "HOST:PORT of process 0.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "How many there are, with --distributed=HOST:PORT."
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Which of them this is, from 0."
)
_TIMEOUT = flags.DEFINE_integer(
  "timeout", 300, "Seconds that processes wait for each other at the start."
)
_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "plan: devices that need not be here, such as v5e:4x4."
)
_JSON = flags.DEFINE_string("json", None, "plan: file to write figures into.")
_INPUT = flags.DEFINE_string(
  "input", None, "predict: JSONL file of rows to answer, labels not needed."
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "predict: JSONL file to write; else WORKDIR/answers.jsonl."
)


def _parse(argv: list[str]) -> str:
  """Parses flags and returns the command, or raises UserError."""
  try:
    rest = flags.FLAGS(argv)[1:]
    # A file that is not there may be noticed only when its fields are read.
    hasattr(_CONFIG.value, "items")
  except flags.Error as error:
    # ml_collections wraps what a config file raises in its traceback.
    raise errors.first_cause(error) or errors.UserError(f"{error}.") from error
  except AttributeError as error:
    raise errors.UserError(
      show.unknown_field(argv)
      or f"--config: {show.file_of(argv)} is broken: {error}."
    ) from error
  except errors.UserError:  # raised by the config file itself
    raise
  except (ValueError, TypeError, LookupError, SyntaxError) as error:
    # Raised by ml_collections where a field's name or value is no Python.
    raise errors.UserError(
      show.unknown_field(argv) or f"--config: {errors.first_line(error)}."
    ) from error
  except OSError as error:
    raise errors.UserError(
      f"--config: no such file as '{show.file_of(argv)}'; there are "
      "configs/demo.py, configs/opt.py and configs/llama.py."
    ) from error
  if len(rest) > 1 or (rest and rest[0] not in COMMANDS):
    found = " ".join(rest)
    raise errors.UserError(
      f"expected one command of {', '.join(COMMANDS)}; found '{found}'."
      f"{errors.nearest(rest[0], COMMANDS)}"
    )
  if rest:
    return rest[0]
  return "train" if _CONFIG.value is None else _CONFIG.value.command


def _help() -> str:
  """Returns the commands and their flags."""
  usage = (__doc__ or "").partition("Small on purpose")[0]
  described = [
    f"  --{flag.name}: {flags.FLAGS[flag.name].help}"
    for flag in (
      *(_CONFIG, _PRINT_CONFIG, _WORKDIR, _INPUT, _OUTPUT),
      *(_TOPOLOGY, _JSON),
      *(_DISTRIBUTED, _NUM_PROCESSES, _PROCESS_ID, _TIMEOUT),
    )
  ]
  return usage.strip() + "\n\n" + "\n".join(described)


def _join(command: str) -> None:
  """Brings the processes together and compares what they were given."""
  if not _DISTRIBUTED.value:
    for flag in (_NUM_PROCESSES, _PROCESS_ID):
      if flag.value is not None:
        raise errors.UserError(
          f"--{flag.name}: expected --distributed=HOST:PORT with it; found "
          "none."
        )
    return
  multihost.initialize(
    _DISTRIBUTED.value,
    num_processes=_NUM_PROCESSES.value,
    process_id=_PROCESS_ID.value,
    timeout=_TIMEOUT.value,
  )
  config = _CONFIG.value or defaults.base_config()
  fields = {f"config.{k}": v for k, v in defaults.flat(config).items()}
  multihost.assert_same_inputs(
    {"the command": command, "--workdir": _WORKDIR.value, **fields}
  )


def _plan() -> None:
  """Asks a compiler, or arithmetic, what a run will need."""
  _need_config()
  if not _TOPOLOGY.value:
    raise errors.UserError(
      "--topology: expected devices such as v5e:4x4, cpu:8 or h100:8; found "
      "nothing."
    )
  from zofo_jax.plan import planner

  planner.plan(_CONFIG.value, _TOPOLOGY.value, _JSON.value)


def _need_config() -> None:
  if _CONFIG.value is None:
    raise errors.UserError(
      "--config: expected a file such as configs/demo.py; found nothing."
    )


def _run(argv: list[str]) -> None:
  if {"--help", "-help", "-h"} & set(argv[1:]):
    print(_help())
    return
  command = _parse(argv)
  if _PRINT_CONFIG.value:
    _need_config()
    print(show.shown(_CONFIG.value))
    validate.check(_CONFIG.value)
    return
  if command == "plan":
    _plan()
    return
  if not _WORKDIR.value:
    raise errors.UserError("--workdir: expected a folder; found nothing.")
  _join(command)
  # Heavy: imported only once the command line is right.
  from zofo_jax.commands import evaluate, icl
  from zofo_jax.training import train
  from zofo_jax.training.meta import adapt
  from zofo_jax.training.meta import train as train_lib

  if command in OF_A_CONFIG:
    _need_config()
    start = {
      "train": train.train,
      "icl": icl.icl,
      "probe": icl.linear_probe,
      "head": icl.head,
      "metatrain": train_lib.metatrain,
      "adapt": adapt.adapt,
    }
    _CONFIG.value.command = command
    start[command](_CONFIG.value, _WORKDIR.value)
  elif command == "evaluate":
    evaluate.evaluate_run(_WORKDIR.value)
  else:
    evaluate.predict(_WORKDIR.value, _INPUT.value, _OUTPUT.value)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command line, `sys.argv` if None, and returns the exit code."""
  handler = logging.StreamHandler()  # standard error
  handler.setFormatter(logging.Formatter("zofo_jax: %(message)s"))
  logging.getLogger("zofo_jax").handlers = [handler]
  try:
    _run(list(sys.argv if argv is None else argv))
  except errors.UserError as error:
    print(f"zofo_jax: {error}", file=sys.stderr)
    return 2
  except BrokenPipeError:  # such as of `--print_config | head`
    sys.stdout = None
  except guards.InterruptedRun as error:
    print(f"zofo_jax: {error}", file=sys.stderr)
    return error.code
  return 0


if __name__ == "__main__":
  sys.exit(main())
