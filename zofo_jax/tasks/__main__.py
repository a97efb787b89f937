"""Lists every task with an example prompt: `python -m zofo_jax.tasks`."""

from zofo_jax import tasks


def describe(task: tasks.Task) -> str:
  """Describes a task: metric, columns, and prompt and options by version."""
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


def main() -> None:
  """Prints all tasks; correct options are marked with a star."""
  for task in tasks.ALL.values():
    print(describe(task), end="\n\n")


if __name__ == "__main__":
  main()
