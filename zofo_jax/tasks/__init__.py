"""The built-in tasks by name, and `custom` to define others."""

from zofo_jax import errors
from zofo_jax.tasks import (
  fact_checking,
  generation,
  hate_and_stance,
  multiple_choice,
  sentence_pairs,
  single_sentence,
  superglue,
)
from zofo_jax.tasks.base import MASK as MASK
from zofo_jax.tasks.base import Chat as Chat
from zofo_jax.tasks.base import Plain as Plain
from zofo_jax.tasks.base import Row as Row
from zofo_jax.tasks.base import Task as Task
from zofo_jax.tasks.base import Template as Template
from zofo_jax.tasks.base import Version as Version
from zofo_jax.tasks.custom import custom as custom
from zofo_jax.tasks.formats import FORMATS as FORMATS
from zofo_jax.tasks.formats import formatted as formatted
from zofo_jax.tasks.formats import recognise as recognise

ALL: dict[str, Task] = {
  entry.name: entry
  for entry in (
    *superglue.TASKS,
    *single_sentence.TASKS,
    *multiple_choice.TASKS,
    *generation.TASKS,
    *sentence_pairs.TASKS,
    *hate_and_stance.TASKS,
    *fact_checking.TASKS,
  )
}


def get(name: str) -> Task:
  """Returns the task with the given name.

  Raises:
    UserError: there is no such task; the message suggests the nearest name.
  """
  if name not in ALL:
    raise errors.UserError(
      f"Unknown task '{name}'.{errors.nearest(name, ALL)} "
      "`python -m zofo_jax.tasks` lists them all."
    )
  return ALL[name]
