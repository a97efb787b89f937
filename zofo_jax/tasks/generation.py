"""Tasks answered by generated text: the options are the accepted answers.

Every answer ends with the line break at which generation stops, as in MeZO;
the first is the training target.
"""

from zofo_jax.tasks.base import Fields, Task, Template, texts


def _squad(fields: Fields) -> list[str]:
  answers = texts(fields["answers"]["text"], "answers")
  return [f" {answer}\n" for answer in dict.fromkeys(answers)]


def _drop(fields: Fields) -> list[str]:
  answers = texts(fields["answers_spans"]["spans"], "answers_spans")
  return [f" {answer}\n" for answer in dict.fromkeys(answers)]


TASKS = (
  Task(
    name="squad",
    kind="generation",
    hub=("rajpurkar/squad", None),
    text=("title", "context", "question"),
    other=("answers",),
    label=lambda fields: range(len(_squad(fields))),
    templates=(
      Template(
        "Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:",
        _squad,
      ),
    ),
    metric="token_f1",
    example={
      "title": "Salt",
      "context": "Salt was mined in Wieliczka.",
      "question": "Where was salt mined?",
      "answers": {"text": ["Wieliczka", "in Wieliczka"]},
    },
  ),
  Task(
    name="drop",
    kind="generation",
    hub=("ucinlp/drop", None),
    text=("passage", "question"),
    other=("answers_spans",),
    label=lambda fields: range(len(_drop(fields))),
    templates=(
      Template("Passage: {passage}\nQuestion: {question}\nAnswer:", _drop),
    ),
    metric="token_f1",
    example={
      "passage": "The Reds scored 3 and the Blues 5.",
      "question": "How many more did the Blues score?",
      "answers_spans": {"spans": ["2"]},
    },
  ),
)
