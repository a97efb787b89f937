"""Lists the tasks: metric, columns, and every prompt of an example.

The right options of the examples have a star. With --check, looks up on the
Hugging Face hub which of their data sets can be loaded; reads no rows.
"""

from collections.abc import Sequence

from zofo_jax import errors, tasks
from zofo_jax.commands import arguments as arguments_lib
from zofo_jax.data import hub


def describe(task: tasks.Task) -> str:
  """Returns a task's facts and, for each version, prompt and options."""
  row = tasks.Row(task.example, f"{task.name} example")
  hub = "/".join(filter(None, task.hub or ())) or "no hub set"
  lines = [f"{task.name}  ({task.kind}, {task.metric}; {hub})"]
  lines.append(f"  columns: {', '.join(task.columns)}")
  versions: list[tasks.Version] = list(range(len(task.templates)))
  if task.reference:
    versions.append("reference")
  variants = [(str(version), task, version) for version in versions]
  if task.masked:
    masked = task.with_mask()
    versions = list(range(len(masked.templates)))
    variants += [(f"masked {v}", masked, v) for v in versions]
  for name, variant, version in variants:
    right = set(variant.right(row))
    options = [
      repr(option) + ("*" if i in right else "")
      for i, option in enumerate(variant.options(row, version))
    ]
    lines.append(f"  {name}: {variant.prompt(row, version)!r}")
    lines.append(f"     -> {', '.join(options)}")
  return "\n".join(lines)


def check(names: Sequence[str] = tuple(tasks.ALL)) -> list[str]:
  """Prints which of the tasks' data sets on the hub can be loaded.

  Args:
    names: of the tasks.

  Returns:
    The names of those that cannot.

  Raises:
    UserError: there is no connection to the hub.
  """
  failed = []
  for task in map(tasks.get, names):
    if not task.hub:
      print(f"{task.name}: has no hub set")
      continue
    try:
      splits = ", ".join(hub.find_splits(task))
      print(f"{task.name}: {'/'.join(filter(None, task.hub))} has {splits}")
    except errors.UserError as error:
      if isinstance(error.__cause__, ConnectionError):
        raise
      print(f"{task.name}: FAILS. {error}")
      failed.append(task.name)
  return failed


def main(arguments: Sequence[str]) -> None:
  """Runs the command."""
  parser = arguments_lib.make_parser("tasks", __doc__)
  parser.add_argument(
    "--check",
    action="store_true",
    help="look up on the hub which data sets can be loaded",
  )
  options = parser.parse(arguments)
  if options.check:
    if failed := check():
      raise errors.UserError(
        f"{len(failed)} data sets cannot be loaded: {', '.join(failed)}."
      )
    return
  for task in tasks.ALL.values():
    print(describe(task), end="\n\n")
