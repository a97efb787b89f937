"""The config as arguments of a command line, and as a page of documentation."""

import itertools
import shlex
from typing import Any

import ml_collections

from zofo_jax.config import defaults, paths, validate


def _section(name: str) -> str:
  return name.rpartition(".")[0]


def as_arguments(config: ml_collections.ConfigDict) -> str:
  """Writes every field as an argument, with its help and what is changed.

  Returns:
    Lines such as `--config.zo.eps=0.01  # [default 0.001] radius ...`.
  """
  initial, values = defaults.flat(defaults.base_config()), defaults.flat(config)
  lines: list[str] = []
  for section, names in itertools.groupby(defaults.FIELDS, _section):
    lines += ["", f"# {section}: {defaults.SECTIONS[section]}"] * bool(section)
    for name in names:
      help_ = defaults.FIELDS[name].help
      if values[name] != initial[name]:
        help_ = f"[default {initial[name]!r}] {help_}"
      argument = f"--config.{name}={_quoted(name, values[name])}"
      lines.append(f"{argument:<44}  # {help_}")
  return "\n".join(lines)


def print_config(config: ml_collections.ConfigDict) -> None:
  """Prints every field of a config, and then checks them."""
  print(as_arguments(config))
  validate.check(config)


def _quoted(name: str, value: Any) -> str:
  """Returns a field's value as a shell and `arguments.set_fields` read it."""
  text = "" if value is None else str(value)
  if isinstance(value, str) and defaults.FIELDS[name].check.is_text:
    text = paths.escape(text)
  return shlex.quote(text)


def as_markdown() -> str:
  """Returns the fields as Markdown: a table for each section."""
  initial = defaults.flat(defaults.base_config())
  lines: list[str] = []
  for section, names in itertools.groupby(defaults.FIELDS, _section):
    lines += [f"## {section or 'Top level'}", ""]
    lines += [_sentence(defaults.SECTIONS[section]), ""]
    lines += ["| field | default | values | |", "| --- | --- | --- | --- |"]
    for name in names:
      field = defaults.FIELDS[name]
      default = "" if initial[name] is None else f"`{initial[name]!r}`"
      valid = field.check.expected.removeprefix("one of ")
      lines.append(f"| `{name}` | {default} | {valid} | {field.help} |")
    lines.append("")
  return "\n".join(lines)


def _sentence(phrase: str) -> str:
  return phrase[0].upper() + phrase[1:] + "."
