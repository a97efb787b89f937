"""SuperGLUE's classification tasks, as in MeZO and the paper's PyTorch code."""

from collections.abc import Callable

from zofo_jax.tasks.base import Fields, Task, Template
from zofo_jax.tasks.helpers import masked_pair

_NO_YES = ("No", "Yes")
_YES_NO = ("Yes", "No")


def _boolq(end: str) -> Callable[[Fields], str]:
  """Returns BoolQ's prompt; the question is capitalised and ends in "?"."""

  def prompt(fields: Fields) -> str:
    question = fields["question"]
    if not question.endswith("?"):
      question += "?"
    return f"{fields['passage']} {question[0].upper()}{question[1:]}{end}"

  return prompt


def _wsc(fields: Fields) -> str:
  return (
    f"{fields['text']}\nIn the previous sentence, does the pronoun "
    f'"{fields["span2_text"].lower()}" refer to {fields["span1_text"]}? '
    "Yes or No?\n"
  )


TASKS = (
  Task(
    name="rte",
    hub=("aps/super_glue", "rte"),
    text=("premise", "hypothesis"),
    templates=(
      Template(
        '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
        _YES_NO,
      ),
      Template('{premise}\n"{hypothesis}"\n', _YES_NO),
    ),
    masked=masked_pair("premise", "hypothesis", (" Yes", " No")),
    example={
      "premise": "The shop is shut on Sundays.",
      "hypothesis": "The shop is shut one day a week.",
      "label": 0,
    },
  ),
  Task(
    name="cb",
    hub=("aps/super_glue", "cb"),
    text=("premise", "hypothesis"),
    templates=(
      Template(
        'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or '
        "Maybe?\n",
        ("Yes", "No", "Maybe"),
      ),
    ),
    example={
      "premise": "I doubt that it rained.",
      "hypothesis": "it rained",
      "label": 2,
    },
  ),
  Task(
    name="boolq",
    hub=("aps/super_glue", "boolq"),
    text=("passage", "question"),
    templates=(
      Template(_boolq(""), (" No", " Yes")),
      # Two literal backslash-n, as published.
      Template(_boolq("\\n\\n"), _NO_YES),
      Template(_boolq("\n"), _NO_YES),  # MeZO's choice
    ),
    example={
      "passage": "Rye -- Rye is a grain. It is sown in autumn.",
      "question": "is rye a fruit",
      "label": 0,
    },
  ),
  Task(
    name="wsc",
    hub=("aps/super_glue", "wsc.fixed"),
    text=("text", "span1_text", "span2_text"),
    templates=(Template(_wsc, _NO_YES),),
    example={
      "text": "Ann thanked Bea because She had helped.",
      "span1_text": "Bea",
      "span2_text": "She",
      "label": 1,
    },
  ),
  Task(
    name="wic",
    hub=("aps/super_glue", "wic"),
    text=("word", "sentence1", "sentence2"),
    templates=(
      Template(
        'Does the word "{word}" have the same meaning in these two sentences? '
        "Yes, No?\n{sentence1}\n{sentence2}\n",
        _NO_YES,
      ),
    ),
    example={
      "word": "bank",
      "sentence1": "We sat on the bank.",
      "sentence2": "The bank lent us money.",
      "label": 0,
    },
  ),
  Task(
    name="multirc",
    hub=("aps/super_glue", "multirc"),
    text=("paragraph", "question", "answer"),
    templates=(
      Template(
        "{paragraph}\nQuestion: {question}\n"
        'I found this answer "{answer}". Is that correct? Yes or No?\n',
        _NO_YES,
      ),
    ),
    example={
      "paragraph": "Tom baked bread and sold it.",
      "question": "What did Tom sell?",
      "answer": "bread",
      "label": 1,
    },
  ),
)
