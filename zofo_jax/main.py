"""The command line: `zofo COMMAND ...`, or `python -m zofo_jax.main COMMAND`.

Exit code 2 means a mistake in the command, its config or its files, explained
in one sentence; 143 or 130 that a signal ended the run: its state is saved, and
the same command resumes it.
"""

import importlib
import logging
import sys
from collections.abc import Sequence

from zofo_jax import errors
from zofo_jax.commands import arguments as arguments_lib

# Each is the module of that name in `zofo_jax.commands`, with a function
# `main(arguments)` that may return an exit code.
COMMANDS = {
  "train": "train a run, or resume it",
  "evaluate": "score a trained run on its test rows",
  "predict": "answer new rows with a trained run",
  "icl": "compare: in-context learning, or zero-shot",
  "probe": "compare: a linear probe of hidden states",
  "head": "compare: the head trained alone",
  "metatrain": "train one backbone on many tasks",
  "adapt": "tune adapters for new tasks from a few rows",
  "plan": "whether a run fits on devices, and at what cost",
  "export": "write a run for transformers or peft",
  "ledger": "rebuild theta at any step of a run",
  "report": "compare runs on one HTML page",
  "sweep": "run a config many times with other fields",
  "tasks": "list the tasks with their prompts",
  "assets": "make the model and the rows of the demo",
}


def _help() -> str:
  lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
  return (
    "usage: zofo [COMMAND] --config=CONFIG --workdir=DIR [--config.FIELD=X]\n"
    "       zofo COMMAND --help\n\n"
    "commands; without one, what the config says:\n"
  ) + "\n".join(lines)


def _run(arguments: list[str]) -> int | None:
  if arguments[:1] in (["-h"], ["--help"]):
    print(_help())
    return 0
  if not arguments or arguments[0].startswith("-"):
    arguments_lib.run_config(arguments)
    return 0
  command = arguments[0]
  if command not in COMMANDS:
    raise errors.UserError(
      f"expected one command of {', '.join(COMMANDS)}; found '{command}'."
      f"{errors.nearest(command, COMMANDS)}"
    )
  module = importlib.import_module(f"zofo_jax.commands.{command}")
  return module.main(arguments[1:])


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs a command, of `sys.argv` if None, and returns the exit code."""
  handler = logging.StreamHandler()  # standard error
  handler.setFormatter(logging.Formatter("zofo_jax: %(message)s"))
  logger = logging.getLogger("zofo_jax")
  # Not by the root logger as well, to which absl adds a handler.
  logger.handlers, logger.propagate = [handler], False
  try:
    return _run(list(sys.argv[1:] if arguments is None else arguments)) or 0
  except (errors.UserError, errors.InterruptedRun) as error:
    print(f"zofo_jax: {error}", file=sys.stderr)
    return getattr(error, "code", 2)
  except BrokenPipeError:  # such as of `--print_config | head`
    sys.stdout = None
    return 0
  finally:
    logger.handlers, logger.propagate = [], True


if __name__ == "__main__":
  sys.exit(main())
