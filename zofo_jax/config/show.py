"""A config as arguments of a command line: read from one, written as one."""

import inspect
import re
import shlex
from typing import Any

import ml_collections

from zofo_jax import errors
from zofo_jax.config import defaults as defaults_lib


def file_of(argv: list[str]) -> str:
  """Finds the file that the command line's --config names."""
  for i, argument in enumerate(argv):
    if argument in ("--config", "-config"):
      return "".join(argv[i + 1 : i + 2]).partition(":")[0]
    if argument.startswith(("--config=", "-config=")):
      return argument.partition("=")[2].partition(":")[0]
  return ""


def unknown_field(argv: list[str]) -> str:
  """Says which --config.* argument names no field, if any, and the nearest."""
  known = defaults_lib.flat(defaults_lib.base_config())
  for argument in argv:
    name = argument.lstrip("-").partition("=")[0]
    if name.startswith("config.") and name[7:] not in known:
      near = errors.nearest(name, [f"config.{other}" for other in known])
      return f"--{name}: there is no such field.{near}"
  return ""


def described() -> dict[str, str]:
  """Returns what the comments of `base_config` say of its fields."""
  found: dict[str, str] = {}
  for line in inspect.getsource(defaults_lib).splitlines():
    match = re.match(r"  config\.([\w.]+) = (.*?)(?:  # (.*))?$", line)
    if match:
      found.setdefault(match[1], match[3] or "")  # not a preset's line
  return found


def shown(config: ml_collections.ConfigDict) -> str:
  """Writes every field as an argument, with what it is and what is changed.

  Returns:
    Lines such as `--config.zo.eps=0.01  # [default 0.001]`.
  """
  defaults, notes = defaults_lib.flat(defaults_lib.base_config()), described()
  lines: list[str] = []
  section = ""
  fields = defaults_lib.flat(config)
  for name in filter(fields.__contains__, notes):  # in the order of the source
    value = fields[name]
    first = name.partition(".")[0] if "." in name else ""
    if first != section:
      section = first
      about = f": {notes[first]}" if notes.get(first) else ""
      lines += ["", f"# {first}{about}"]
    about = notes.get(name, "")
    if value != defaults[name]:
      about = f"[default {defaults[name]!r}] {about}".strip()
    text = f"--config.{name}={_quoted(value)}"
    lines.append(f"{text:<44}  # {about}" if about else text)
  return "\n".join(lines).strip()


def _quoted(value: Any) -> str:
  """Writes a value as a shell takes it."""
  text = "" if value is None else str(value)
  # Line breaks as bash and zsh write them.
  return f"${text!r}" if "\n" in text else shlex.quote(text)
