"""Every task by name, and the means to declare one's own."""

from zofo_jax import errors
from zofo_jax.tasks import answers, choices, claims, pairs, sentiment, superglue
from zofo_jax.tasks.own import custom as custom
from zofo_jax.tasks.task import Task as Task
from zofo_jax.tasks.task import Template as Template
from zofo_jax.tasks.task import Version as Version

ALL: dict[str, Task] = {
  entry.name: entry
  for entry in (
    *superglue.TASKS,
    *sentiment.TASKS,
    *choices.TASKS,
    *answers.TASKS,
    *pairs.TASKS,
    *claims.TASKS,
  )
}


def get(name: str) -> Task:
  """Returns the task of that name.

  Raises:
    UserError: there is none; the sentence suggests the nearest.
  """
  if name not in ALL:
    raise errors.UserError(
      f"Unknown task '{name}'.{errors.nearest(name, ALL)} "
      "`python -m zofo_jax.tasks` lists them all."
    )
  return ALL[name]
