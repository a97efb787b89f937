"""Lists the tasks: metric, columns, and every prompt of an example.

The right options of the examples have a star.
"""

from collections.abc import Sequence

from zofo_jax import tasks
from zofo_jax.commands import arguments as arguments_lib


def describe(task: tasks.Task) -> str:
  """Returns a task's facts and, for each version, prompt and options."""
  row = tasks.Row(task.example, f"{task.name} example")
  hub = "/".join(filter(None, task.hub or ())) or "no hub set"
  lines = [f"{task.name}  ({task.kind}, {task.metric}; {hub})"]
  lines.append(f"  columns: {', '.join(task.columns)}")
  versions: list[tasks.Version] = list(range(len(task.templates)))
  if task.reference:
    versions.append("reference")
  for version in versions:
    right = set(task.right(row))
    options = [
      repr(option) + ("*" if i in right else "")
      for i, option in enumerate(task.options(row, version))
    ]
    lines.append(f"  {version}: {task.prompt(row, version)!r}")
    lines.append(f"     -> {', '.join(options)}")
  return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
  """Runs the command."""
  arguments_lib.make_parser("tasks", __doc__).parse(arguments)
  for task in tasks.ALL.values():
    print(describe(task), end="\n\n")
