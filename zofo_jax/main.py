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

Any field of the config can be set: --config.zo.eps=1e-2. Exit code 2 means a
mistake in the command, its config or its files, told in one sentence.

Small on purpose: everything worth testing lives in importable modules.
"""

import sys

from absl import flags
from ml_collections import config_flags

from zofo_jax import checks, errors
from zofo_jax import config as config_lib

OF_A_CONFIG = checks.COMMANDS
COMMANDS = ("train", "evaluate", "predict", *OF_A_CONFIG[1:])

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "A file of configs/, as FILE.py or FILE.py:name=value,..."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run: checkpoints, metrics, summary."
)
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
    raise errors.UserError(f"{error}.") from error
  except AttributeError as error:
    raise errors.UserError(
      config_lib.unknown_field(argv)
      or f"--config: {config_lib.file_of(argv)} is broken: {error}."
    ) from error
  except OSError as error:
    raise errors.UserError(
      f"--config: no such file as '{config_lib.file_of(argv)}'; there are "
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
    for flag in (_CONFIG, _WORKDIR, _INPUT, _OUTPUT)
  ]
  return usage.strip() + "\n\n" + "\n".join(described)


def _run(argv: list[str]) -> None:
  if {"--help", "-help", "-h"} & set(argv[1:]):
    print(_help())
    return
  command = _parse(argv)
  if not _WORKDIR.value:
    raise errors.UserError("--workdir: expected a folder; found nothing.")
  # Heavy: imported only once the command line is right.
  from zofo_jax import adapt, metatrain, modes, saved, train

  if command in OF_A_CONFIG:
    if _CONFIG.value is None:
      raise errors.UserError(
        "--config: expected a file such as configs/demo.py; found nothing."
      )
    start = {
      "train": train.train,
      "icl": modes.icl,
      "probe": modes.linear_probe,
      "head": modes.head,
      "metatrain": metatrain.metatrain,
      "adapt": adapt.adapt,
    }
    _CONFIG.value.command = command
    start[command](_CONFIG.value, _WORKDIR.value)
  elif command == "evaluate":
    saved.evaluate_run(_WORKDIR.value)
  else:
    saved.predict(_WORKDIR.value, _INPUT.value, _OUTPUT.value)


def main() -> int:
  """Runs the command line and returns the exit code."""
  try:
    _run(sys.argv)
  except errors.UserError as error:
    print(f"zofo_jax: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
