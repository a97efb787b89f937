"""Single texts: sentiment, emotion, topic, stance, hateful language.

Patterns and label words follow MeZO and the PyTorch code of Bilevel-ZOFO,
LM-BFF (SST-5, CR, MPQA, Subj) and Zhao et al. 2021 (TREC, AG News).
"""

from zofo_jax.tasks import task

_POLARITY = (" terrible", " great")
_REVIEW = {"text": "a slow but charming film", "label": 1}


def _it_was(column: str) -> tuple[task.Template, ...]:
  """The pattern of movie reviews; version 1 leaves " It was" out."""
  return (
    task.Template("{" + column + "} It was", _POLARITY),
    task.Template("{" + column + "}", _POLARITY),
  )


TASKS = (
  task.Task(
    name="sst2",
    hub=("nyu-mll/glue", "sst2"),
    text=("sentence",),
    templates=_it_was("sentence"),
    example={"sentence": "a slow but charming film", "label": 1},
  ),
  task.Task(
    name="rotten_tomatoes",
    hub=("cornell-movie-review-data/rotten_tomatoes", None),
    text=("text",),
    templates=_it_was("text"),
    example=_REVIEW,
  ),
)
