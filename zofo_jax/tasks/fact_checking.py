"""Claims to be checked, with or without evidence.

Patterns and label words are those of Bilevel-ZOFO's PyTorch code, with
TabFact's inverted labels corrected.
"""

from collections.abc import Sequence

from zofo_jax.tasks.base import Fields, Task, Template

_NO_YES = ("No", "Yes")


def _kilt_label(fields: Fields) -> tuple[int, ...]:
  """Returns (1,) if a claim of FEVER, in KILT's format, is supported."""
  answers = {o["answer"] for o in fields["output"] if o.get("answer")}
  return tuple(
    i for i, name in enumerate(("REFUTES", "SUPPORTS")) if name in answers
  )


def _climate_fever_evidence(fields: Fields) -> str:
  evidence = " ".join(e["evidence"] for e in fields["evidences"])
  return f"{fields['claim']}\nEvidence: {evidence}\n{_CLIMATE}"


def _label_question(words: Sequence[str]) -> str:
  alternatives = f"{', '.join(words[:-1])}, or {words[-1]}"
  return f"What is the label for this claim? {alternatives}?\n"


_LIAR = (
  "false",
  "half-true",
  "mostly-true",
  "true",
  "barely-true",
  "pants-fire",
)
_HEALTH = ("False", "Mixture", "True", "Unverified")
# Four words: the data set on the hub has disputed claims, too.
_CLIMATE_WORDS = ("entailment", "contradiction", "neutral", "disputed")
_CLIMATE = _label_question(_CLIMATE_WORDS)

TASKS = (
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
    hub_script=True,
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
    hub=("ucsbai/liar", None),
    hub_script=True,
    text=("statement",),
    templates=(
      Template("{statement}\n" + _label_question(_LIAR), _LIAR),
      Template(  # The column is LIAR-PLUS's.
        "{statement}\nJustification: {justification}\n"
        + _label_question(_LIAR),
        _LIAR,
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
    hub_script=True,
    text=("claim",),
    templates=(
      Template("{claim}\n" + _label_question(_HEALTH), _HEALTH),
      Template(
        "{claim}\nExplanation: {explanation}\n" + _label_question(_HEALTH),
        _HEALTH,
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
    hub_splits={"train": "test", "test": ""},
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
