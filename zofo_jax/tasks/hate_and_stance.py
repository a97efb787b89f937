"""Single texts: hate speech, stance, and claims to be checked.

Patterns and label words are those of Bilevel-ZOFO's PyTorch code, with the
inverted ones (HateXplain, TabFact) put right.
"""

from collections.abc import Sequence

from zofo_jax.tasks import helpers
from zofo_jax.tasks.base import Fields, Task, Template

_NO_YES = ("No", "Yes")


def _majority_hate(fields: Fields) -> tuple[int, ...]:
  """HateXplain: 1 if most annotators chose label 0, hate speech."""
  labels = list(fields["annotators"]["label"])
  return (int(2 * labels.count(0) > len(labels)),)


def _hatexplain(fields: Fields) -> str:
  text = " ".join(fields["post_tokens"])
  return f"{text}\nDoes the text contain hate speech? Yes or No?\n"


def _kilt_label(fields: Fields) -> tuple[int, ...]:
  """FEVER in KILT's format: 1 if the claim is supported."""
  answers = {o["answer"] for o in fields["output"] if o.get("answer")}
  return tuple(
    i for i, name in enumerate(("REFUTES", "SUPPORTS")) if name in answers
  )


def _climate_fever_evidence(fields: Fields) -> str:
  evidence = " ".join(e["evidence"] for e in fields["evidences"])
  return f"{fields['claim']}\nEvidence: {evidence}\n{_CLIMATE}"


def _which(words: Sequence[str]) -> str:
  listed = f"{', '.join(words[:-1])}, or {words[-1]}"
  return f"What is the label for this claim? {listed}?\n"


_LIAR = (
  "false",
  "half-true",
  "mostly-true",
  "true",
  "barely-true",
  "pants-fire",
)
_HEALTH = ("False", "Mixture", "True", "Unverified")
# A fourth word, since the hub set has disputed claims too.
_CLIMATE_WORDS = ("entailment", "contradiction", "neutral", "disputed")
_CLIMATE = _which(_CLIMATE_WORDS)

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
    "iamollas/ethos",
    _NO_YES,
    "{text}\nIs the text offensive? Yes or No?\n",
    hub_config="binary",
    metric="macro_f1",
  ),
  helpers.text_task(
    "hate_speech18",
    "odegiber/hate_speech18",
    ("No", "Yes", "skip", "depends"),
    "{text}\nIs the text hate speech? Yes, No, Skip, or Depends?\n",
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

_CLAIMS = (
  Task(
    name="fever",
    hub=("facebook/kilt_tasks", "fever"),
    text=("input",),
    other=("output",),
    label=_kilt_label,
    templates=(Template("{input}\nIs the claim true? Yes or No?\n", _NO_YES),),
    metric="macro_f1",
    example={
      "input": "The Danube flows through Vienna.",
      "output": [{"answer": "SUPPORTS"}],
    },
  ),
  Task(
    name="tab_fact",
    hub=("wenhu/tab_fact", "tab_fact"),
    text=("statement", "table_text"),
    templates=(
      Template(
        "{statement}\nEvidence: {table_text}\nIs the claim true? Yes or No?\n",
        _NO_YES,
      ),
    ),
    metric="macro_f1",
    example={
      "statement": "Ann scored more than Bo",
      "table_text": "name#score\nAnn#3\nBo#5",
      "label": 0,
    },
  ),
  Task(
    name="liar",
    hub=("ucsbnlp/liar", None),
    text=("statement",),
    templates=(
      Template("{statement}\n" + _which(_LIAR), _LIAR),
      Template(  # The column is LIAR-PLUS's.
        "{statement}\nJustification: {justification}\n" + _which(_LIAR), _LIAR
      ),
    ),
    metric="macro_f1",
    example={
      "statement": "The town has ten bridges.",
      "justification": "A count found nine.",
      "label": 2,
    },
  ),
  Task(
    name="health_fact",
    hub=("ImperialCollegeLondon/health_fact", None),
    text=("claim",),
    templates=(
      Template("{claim}\n" + _which(_HEALTH), _HEALTH),
      Template(
        "{claim}\nExplanation: {explanation}\n" + _which(_HEALTH), _HEALTH
      ),
    ),
    metric="macro_f1",
    example={
      "claim": "Carrots let people see in the dark.",
      "explanation": "No study shows it.",
      "label": 0,
    },
  ),
  Task(
    name="climate_fever",
    hub=("tdiggelm/climate_fever", None),
    text=("claim",),
    label="claim_label",
    templates=(
      Template("{claim}\n" + _CLIMATE, _CLIMATE_WORDS),
      Template(_climate_fever_evidence, _CLIMATE_WORDS),
    ),
    metric="macro_f1",
    example={
      "claim": "Ice floats on water.",
      "evidences": [{"evidence": "Ice is less dense than water."}],
      "claim_label": 0,
    },
  ),
)

TASKS = (*_HATE, *_STANCE, *_CLAIMS)
