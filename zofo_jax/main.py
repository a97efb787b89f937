"""The command line: `zofo COMMAND ...`, or `python -m zofo_jax.main COMMAND`.

Exit code 2: a mistake in the command, its config or its files, in one sentence;
143 or 130: a signal ended the run; its state is saved and the same command
resumes it.
"""

import importlib
import logging
import signal
import sys
from collections.abc import Sequence

from zofo_jax import errors
from zofo_jax.commands import arguments as arguments_lib
from zofo_jax.config import jax_flags

# Modules of `zofo_jax.commands`; their main(arguments) may return an exit code.
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
  "models": "list the models, or describe one",
  "tasks": "list the tasks with their prompts",
  "assets": "make the model and the rows of the demo",
}

USAGE = """\
usage: zofo [COMMAND] --config=CONFIG --workdir=DIR [--config.FIELD=X]
       zofo COMMAND --help

commands; without one, what the config says:
""" + "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())


def _run(arguments: list[str]) -> int | None:
  if arguments[:1] in (["-h"], ["--help"]):
    print(USAGE)
  elif not arguments or arguments[0].startswith("-"):
    arguments_lib.run_config(arguments)
  elif arguments[0] in COMMANDS:
    module = importlib.import_module(f"zofo_jax.commands.{arguments[0]}")
    return module.main(arguments[1:])
  else:
    raise errors.UserError(
      f"expected one command of {', '.join(COMMANDS)}; found '{arguments[0]}'."
      f"{errors.nearest(arguments[0], COMMANDS)}"
    )
  return None


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs a command, of `sys.argv` if None, and returns the exit code."""
  handler = logging.StreamHandler()  # standard error
  handler.setFormatter(logging.Formatter("zofo_jax: %(message)s"))
  logger = logging.getLogger("zofo_jax")
  # Not to the root logger, to which absl adds a handler.
  logger.handlers, logger.propagate = [handler], False
  try:
    with jax_flags.fixed():
      return _run(list(sys.argv[1:] if arguments is None else arguments)) or 0
  except (errors.UserError, errors.InterruptedRun) as error:
    print(f"zofo_jax: {error}", file=sys.stderr)
    return getattr(error, "code", 2)
  except KeyboardInterrupt:  # before or after the steps of a run
    print("zofo_jax: stopped by SIGINT.", file=sys.stderr)
    return 128 + signal.SIGINT
  except BrokenPipeError:  # such as of `--print_config | head`
    sys.stdout = None
    return 0
  finally:
    logger.handlers, logger.propagate = [], True


if __name__ == "__main__":
  sys.exit(main())
