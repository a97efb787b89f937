"""Every task by name, and the means to declare one's own."""

from zofo_jax import errors
from zofo_jax.tasks import (
  generation,
  hate_and_stance,
  multiple_choice,
  sentence_pairs,
  single_sentence,
  superglue,
)
from zofo_jax.tasks.base import Row as Row
from zofo_jax.tasks.base import Task as Task
from zofo_jax.tasks.base import Template as Template
from zofo_jax.tasks.base import Version as Version
from zofo_jax.tasks.custom import custom as custom

ALL: dict[str, Task] = {
  entry.name: entry
  for entry in (
    *superglue.TASKS,
    *single_sentence.TASKS,
    *multiple_choice.TASKS,
    *generation.TASKS,
    *sentence_pairs.TASKS,
    *hate_and_stance.TASKS,
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
