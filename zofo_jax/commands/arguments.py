"""Arguments of the commands: parsers, configs, processes.

Every command has an `argparse` parser of its own flags. The fields of a config
are typed and set by `ml_collections`.
"""

import argparse
import ast
import contextlib
import importlib
import itertools
import re
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

import ml_collections
from absl import flags
from ml_collections import config_flags

from zofo_jax import errors
from zofo_jax.config import defaults, files, paths, show, validate
from zofo_jax.sharding import multihost

T = TypeVar("T")
NEEDED_CONFIG = (
  "--config",
  "a file such as configs/demo.py, or its name, demo",
)
# The functions of (config, workdir) that commands run.
_RUNNERS = {
  "train": "zofo_jax.training.train:train",
  "metatrain": "zofo_jax.training.meta.train:metatrain",
  "adapt": "zofo_jax.training.meta.adapt:adapt",
  "icl": "zofo_jax.commands.icl:icl",
  "probe": "zofo_jax.commands.probe:linear_probe",
  "head": "zofo_jax.commands.head:head",
}


class Parser(argparse.ArgumentParser):
  """A parser that raises `UserError` instead of exiting."""

  def error(self, message: str) -> NoReturn:
    """Raises a `UserError` with the message."""
    raise errors.UserError(f"{self.prog}: {message}.")

  def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
    """Parses arguments, all of which must be known."""
    options, unknown = self.parse_known_args(arguments)
    self.check_known(unknown)
    return options

  def check_known(self, unknown: Sequence[str]) -> None:
    """Raises a `UserError` that names the first unknown argument, if any."""
    for argument in unknown:
      name = argument.partition("=")[0]
      if not argument.startswith("-"):
        command = f"{self.prog} {argument}".removeprefix("zofo ").strip()
        raise errors.UserError(
          f"expected one command and its flags; found '{command}'."
        )
      valid = re.findall(r"--\w+", self.format_help())
      raise errors.UserError(
        f"{name}: `{self.prog}` has no such flag.{errors.nearest(name, valid)}"
      )


def make_parser(command: str, doc: str | None) -> Parser:
  """Returns the parser of a command, described by its module's docstring."""
  return Parser(
    f"zofo {command}".strip(),
    description=doc,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )


def add_config(parser: Parser) -> None:
  """Adds the flags that give a config."""
  parser.add_argument(
    "--config",
    metavar="FILE[:NAME=VALUE,...]",
    help="a Python file, or the name of a shipped config: "
    + ", ".join(files.names())
    + "; --config.zo.eps=1e-2 sets a field",
  )
  parser.add_argument(
    "--print_config",
    action="store_true",
    help="print every field of the config with its help, and exit",
  )


def add_run(parser: Parser) -> None:
  """Adds the flags for the folder of a run and for several processes."""
  parser.add_argument(
    "--workdir",
    metavar="DIR",
    type=paths.expand,
    help="folder of the run; local or gs://",
  )
  group = parser.add_argument_group(
    "several processes", "The same command is started in each of them."
  )
  group.add_argument(
    "--distributed",
    metavar="auto|HOST:PORT",
    help="auto (TPU pods, SLURM, ...), or the address of process 0",
  )
  group.add_argument(
    "--num_processes", type=int, help="with --distributed=HOST:PORT"
  )
  group.add_argument("--process_id", type=int, help="of this one, from 0")
  group.add_argument(
    "--timeout",
    type=int,
    default=300,
    help="seconds that processes wait for each other at the start",
  )


def add_may_change(parser: Parser) -> None:
  """Adds the flag for inputs that may differ from those a run began with."""
  parser.add_argument(
    "--may_change",
    metavar="NAME,...",
    type=_inputs,
    default=(),
    help=f"use other {', '.join(validate.INPUTS)} than the run began with",
  )


def _inputs(text: str) -> tuple[str, ...]:
  """Parses the names of inputs."""
  names = tuple(filter(None, text.split(",")))
  for name in names:
    if name not in validate.INPUTS:
      raise argparse.ArgumentTypeError(
        f"expected some of {', '.join(validate.INPUTS)}, joined by commas; "
        f"found '{name}'"
      )
  return names


def parse_config(
  parser: Parser, arguments: Sequence[str]
) -> tuple[argparse.Namespace, ml_collections.ConfigDict | None]:
  """Parses arguments and loads the config that they name.

  Args:
    parser: has the flags of `add_config`.
    arguments: of the command.

  Returns:
    Values of the flags, and the config with its changed fields; None without
    --config.

  Raises:
    errors.UserError: an argument, the config or a field is wrong.
  """
  options, others = parser.parse_known_args(arguments)
  _check_fields(others)
  if options.config is None:
    if others and others[0].startswith(("--config.", "--noconfig.")):
      require(None, *NEEDED_CONFIG)
    parser.check_known(others)
    return options, None
  config, unknown = set_fields(files.load(options.config), others)
  parser.check_known(unknown)
  return options, config


def require(value: T | None, flag: str, expected: str) -> T:
  """Returns the value of a flag, or raises a `UserError` if it is None."""
  if value is None:
    raise errors.UserError(f"{flag}: expected {expected}; found nothing.")
  return value


def _check_fields(arguments: Sequence[str]) -> None:
  """Raises a `UserError` that names the first field that does not exist."""
  valid = [f"config.{name}" for name in defaults.FIELDS]
  for argument in arguments:
    name = argument.lstrip("-").partition("=")[0].removeprefix("no")
    if name.startswith("config.") and name not in valid:
      raise errors.UserError(
        f"--{name}: there is no such field.{errors.nearest(name, valid)}"
      )


def set_fields(
  config: ml_collections.ConfigDict, arguments: Sequence[str]
) -> tuple[ml_collections.ConfigDict, list[str]]:
  """Sets fields of a config from arguments such as "--config.zo.eps=1e-2".

  Args:
    config: the config.
    arguments: flags, of fields and others.

  Returns:
    The config, locked, and the arguments that name no field.

  Raises:
    errors.UserError: a value is not of its field's type.
  """
  others = [a for a in arguments if re.match(r"-+(?!(no)?config\.)[a-z]", a)]
  given = [a for a in arguments if a not in others]
  argv = ["zofo", *_unescape_texts(given)]
  values = flags.FlagValues()
  try:
    config_flags.DEFINE_config_dict(
      "config", config, flag_values=values, sys_argv=argv
    )
    others += values(argv)[1:]
  except (AttributeError, LookupError, TypeError, ValueError) as error:
    # As ml_collections raises them.
    raise errors.UserError(f"--config: {errors.first_line(error)}.") from error
  except flags.Error as error:
    _check_values(given, str(error))
    raise errors.UserError(f"{errors.first_line(error)}.") from error
  defaults.replace_paths(values["config"].value, paths.expand)
  return values["config"].value, others


# What completes "expected ...", by the type of a field's default.
_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number"}


def _check_values(arguments: Sequence[str], problem: str) -> None:
  """Raises a `UserError` that names the value of a field with a problem.

  Args:
    arguments: of fields, as the shell gave them.
    problem: what absl says, with the value as it was read.
  """
  for argument, following in itertools.pairwise([*arguments, ""]):
    flag = re.match(r"-+config\.([\w.]+)(=?)", argument)
    field = defaults.FIELDS.get(flag[1]) if flag else None
    if flag is None or field is None:
      continue
    value = argument[flag.end() :] if flag[2] else following
    read = _unescape(field.name, value)
    if problem.startswith(f"flag --config.{field.name}={read}: "):
      expected = _EXPECTED.get(type(field.default), field.check.expected)
      raise errors.UserError(
        f"--config.{field.name}: expected {expected}; found '{value}'."
      )


def _unescape_texts(arguments: Sequence[str]) -> list[str]:
  r"""Interprets escapes such as \n, which a shell leaves in values of texts."""
  result, name = [], ""
  for argument in arguments:
    flag = re.match(r"-+config\.([\w.]+)=?", argument)
    start = 0
    if flag:
      name, start = flag[1], flag.end()
    result.append(argument[:start] + _unescape(name, argument[start:]))
  return result


def _unescape(name: str, text: str) -> str:
  """Interprets the escapes in a field's value, unless it is a literal."""
  field = defaults.FIELDS.get(name)
  if field is None or not field.check.is_text:
    return text
  if isinstance(field.default, tuple):
    with contextlib.suppress(SyntaxError, ValueError):
      ast.literal_eval(text)  # as in Python, with its own escapes
      return text
  return paths.unescape(text)


def start_processes(
  options: argparse.Namespace, command: str, fields: dict[str, Any]
) -> None:
  """Connects the processes, if there are several, and compares their inputs.

  Args:
    options: values of the flags of `add_run`.
    command: the command.
    fields: fields of the config.

  Raises:
    errors.UserError: a flag is missing, or processes were given other inputs.
  """
  if not options.distributed:
    for name in ("num_processes", "process_id"):
      if getattr(options, name) is not None:
        raise errors.UserError(
          f"--{name}: expected --distributed=HOST:PORT with it; found none."
        )
    return
  multihost.initialize(
    options.distributed,
    num_processes=options.num_processes,
    process_id=options.process_id,
    timeout=options.timeout,
  )
  inputs = {f"config.{name}": value for name, value in fields.items()}
  multihost.assert_same_inputs(
    {"the command": command, "--workdir": options.workdir, **inputs}
  )


def require_workdir(options: argparse.Namespace) -> str:
  """Returns --workdir, or raises a `UserError` if there is none."""
  if not options.workdir:
    raise errors.UserError("--workdir: expected a folder; found nothing.")
  return options.workdir


def default_workdir(config: str | None) -> str | None:
  """Returns the folder of a run of a config that is given by its name.

  Examples:
    >>> default_workdir("opt:size=125m,task=sst2")
    'runs/opt,size=125m,task=sst2'
    >>> default_workdir("configs/opt.py")
  """
  name = (config or "").partition(":")[0]
  if not name or "/" in name or name.endswith(".py"):
    return None
  return f"runs/{str(config).replace('/', '_').replace(':', ',')}"


def run_config(
  arguments: Sequence[str], command: str | None = None, doc: str | None = None
) -> None:
  """Runs a command that needs a config and a folder to write to.

  Args:
    arguments: of the command.
    command: train, icl, ...; None for the config's own.
    doc: the command's description.
  """
  parser = make_parser(command or "", doc)
  add_config(parser)
  add_run(parser)
  options, config = parse_config(parser, arguments)
  if options.print_config:
    show.print_config(require(config, *NEEDED_CONFIG))
    return
  command = command or ("train" if config is None else config.command)
  if command in ("train", "metatrain", "adapt"):
    options.workdir = options.workdir or default_workdir(options.config)
  workdir, config = require_workdir(options), require(config, *NEEDED_CONFIG)
  config.command = command
  defaults.FIELDS["command"].validate(command)
  start_processes(options, command, defaults.flat(config))
  # Imports that take seconds: only once the arguments are right.
  module, _, function = _RUNNERS[command].partition(":")
  getattr(importlib.import_module(module), function)(config, workdir)
