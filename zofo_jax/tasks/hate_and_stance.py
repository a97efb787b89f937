"""Single texts: hate speech, offensive language and stance.

Patterns and label words are those of Bilevel-ZOFO's PyTorch code, with
HateXplain's inverted labels corrected.
"""

from zofo_jax.tasks import helpers
from zofo_jax.tasks.base import Fields, Task, Template

_NO_YES = ("No", "Yes")


def _majority_hate(fields: Fields) -> tuple[int, ...]:
  """Returns (1,) if most of HateXplain's annotators chose label 0, hate."""
  labels = list(fields["annotators"]["label"])
  return (int(2 * labels.count(0) > len(labels)),)


def _hatexplain(fields: Fields) -> str:
  text = " ".join(fields["post_tokens"])
  return f"{text}\nDoes the text contain hate speech? Yes or No?\n"


_HATE = (
  helpers.tweets_task(
    "offensive",
    _NO_YES,
    "{text}\nIs the text offensive? Yes or No?\n",
    metric="macro_f1",
  ),
  helpers.tweets_task(
    "hate",
    _NO_YES,
    "{text}\nIs the text hate speech? Yes or No?\n",
    metric="macro_f1",
  ),
  helpers.text_task(
    "ethos",
    "SetFit/ethos_binary",
    _NO_YES,
    "{text}\nIs the text offensive? Yes or No?\n",
    metric="macro_f1",
  ),
  helpers.text_task(
    "hate_speech18",
    "odegiber/hate_speech18",
    ("No", "Yes", "skip", "depends"),
    "{text}\nIs the text hate speech? Yes, No, Skip, or Depends?\n",
    hub_script=True,
    metric="macro_f1",
  ),
  Task(
    name="hate_speech_offensive",
    hub=("tdavidson/hate_speech_offensive", None),
    text=("tweet",),
    label="class",
    templates=(
      Template(
        "{tweet}\nIs the text hate speech, offensive, or neither?\n",
        ("hate speech", "offensive", "neither"),
      ),
    ),
    metric="macro_f1",
    example={"tweet": "Lunch was lovely.", "class": 2},
  ),
  Task(
    name="hatexplain",
    hub=("Hate-speech-CNERG/hatexplain", None),
    hub_script=True,
    text=(),
    other=("post_tokens", "annotators"),
    label=_majority_hate,
    templates=(Template(_hatexplain, _NO_YES),),
    metric="macro_f1",
    example={
      "post_tokens": ["what", "a", "goal"],
      "annotators": {"label": [1, 1, 2]},
    },
  ),
)

_STANCE = tuple(
  helpers.tweets_task(
    f"stance_{name}",
    ("neutral", "against", "favor"),
    f"{{text}}\nWhat is the stance of the tweet towards {target}? neutral, "
    "against, or favor?\n",
    metric="macro_f1",
    example={"text": "I have no view on this.", "label": 0},
  )
  for name, target in (
    ("feminist", "feminism"),
    ("atheism", "atheism"),
    ("abortion", "abortion"),
    ("climate", "climate change"),
    ("hillary", "Hillary Clinton"),
  )
)

TASKS = (*_HATE, *_STANCE)
