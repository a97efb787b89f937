"""Multiple choice: every row has its own options.

COPA, ReCoRD and WinoGrande follow MeZO and Bilevel-ZOFO's PyTorch code; the
common-sense tasks follow lm-evaluation-harness; `meta_icl` reads MetaICL's
JSONL files as MetaICL's code does.
"""

import re

from zofo_jax.tasks.base import Fields, Task, Template, texts

_CONJUNCTIONS = {"effect": " so", "cause": " because"}


def _premise(fields: Fields) -> str:
  return fields["premise"].rstrip().removesuffix(".")


def _copa(fields: Fields) -> str:
  if fields["question"] not in _CONJUNCTIONS:
    raise ValueError(
      f"column 'question' holds {fields['question']!r}; expected 'cause' or "
      "'effect'."
    )
  return _premise(fields) + _CONJUNCTIONS[fields["question"]]


def _copa_options(fields: Fields) -> list[str]:
  """Returns the choices with a lower-case first word, unless it is "I"."""
  options = []
  for choice in (fields["choice1"], fields["choice2"]):
    first, *others = choice.split(" ")
    options.append(
      " " + " ".join([first if first == "I" else first.lower(), *others])
    )
  return options


def _record(fields: Fields) -> str:
  return fields["passage"].replace("@highlight\n", "- ") + "\n-"


def _entities(fields: Fields) -> list[str]:
  return list(dict.fromkeys(texts(fields["entities"], "entities")))


def _record_options(fields: Fields) -> list[str]:
  """Returns the query with the placeholder replaced by each entity."""
  return [
    " " + fields["query"].replace("@placeholder", entity)
    for entity in _entities(fields)
  ]


def _record_right(fields: Fields) -> list[int]:
  return [i for i, e in enumerate(_entities(fields)) if e in fields["answers"]]


def _blank(fields: Fields) -> tuple[str, str]:
  """Splits WinoGrande's sentence into the texts before and after the blank."""
  parts = fields["sentence"].split("_")
  if len(parts) != 2:
    raise ValueError(
      f"column 'sentence' has {len(parts) - 1} blanks '_'; expected one."
    )
  return parts[0], parts[1]


def _winogrande(fields: Fields) -> str:
  return _blank(fields)[0].rstrip(" ")


def _winogrande_options(fields: Fields) -> list[str]:
  before, after = _blank(fields)
  space = before[len(before.rstrip(" ")) :]
  return [space + fields[o] + after for o in ("option1", "option2")]


def _listed(fields: Fields) -> list[str]:
  """Returns the options of `choices` = {"label": [...], "text": [...]}."""
  return [f" {text}" for text in texts(fields["choices"]["text"], "choices")]


def _keyed(fields: Fields) -> list[int]:
  names = list(fields["choices"]["label"])
  return [i for i, n in enumerate(names) if n == fields["answerKey"]]


def _clean(text: str) -> str:
  """Removes WikiHow's bracketed markup, as lm-evaluation-harness does."""
  text = re.sub(r"\[.*?\]", "", text.replace(" [title]", ". "))
  return " ".join(text.split())


def _hellaswag(fields: Fields) -> str:
  start, end = fields["ctx_a"], fields["ctx_b"]
  return _clean(
    f"{fields['activity_label']}: {start} {end[:1].upper()}{end[1:]}"
  )


def _endings(fields: Fields) -> list[str]:
  return [f" {_clean(text)}" for text in texts(fields["endings"], "endings")]


def _meta_icl(fields: Fields) -> str:
  listed = ", ".join(fields["options"])
  return f"{fields['input']}\n{listed}\n" if listed else f"{fields['input']}\n"


def _outputs(fields: Fields) -> list[str]:
  """Returns MetaICL's options, or only the answer if there are none."""
  return texts(fields["options"], "options") or [fields["output"]]


def _output(fields: Fields) -> list[int]:
  return [i for i, o in enumerate(_outputs(fields)) if o == fields["output"]]


def _question(
  name: str, hub: tuple[str, str | None], column: str, pattern: str
) -> Task:
  """Returns a task with the columns `choices` and `answerKey`."""
  return Task(
    name=name,
    kind="multiple choice",
    hub=hub,
    text=(column,),
    other=("choices", "answerKey"),
    label=_keyed,
    templates=(Template(pattern, _listed),),
    example={
      column: "Where would you keep milk?",
      "choices": {"label": ["A", "B"], "text": ["oven", "fridge"]},
      "answerKey": "B",
    },
  )


TASKS = (
  Task(
    name="copa",
    kind="multiple choice",
    hub=("aps/super_glue", "copa"),
    text=("premise", "choice1", "choice2", "question"),
    templates=(
      Template(_copa, _copa_options),
      Template(_premise, _copa_options),
    ),
    example={
      "premise": "The rope snapped.",
      "choice1": "The boat drifted away.",
      "choice2": "I tied a knot.",
      "question": "effect",
      "label": 0,
    },
  ),
  Task(
    name="record",
    kind="multiple choice",
    hub=("aps/super_glue", "record"),
    text=("passage", "query"),
    other=("entities", "answers"),
    label=_record_right,
    templates=(Template(_record, _record_options),),
    example={
      "passage": "Oslo and Bergen compete.\n@highlight\nTrams return",
      "query": "@placeholder bought new trams",
      "entities": ["Oslo", "Bergen"],
      "answers": ["Bergen"],
    },
  ),
  Task(
    name="winogrande",
    kind="multiple choice",
    hub=("allenai/winogrande", "winogrande_m"),
    text=("sentence", "option1", "option2"),
    label="answer",
    labels=("1", "2"),
    templates=(Template(_winogrande, _winogrande_options),),
    example={
      "sentence": "The cup did not fit the box because the _ was too small.",
      "option1": "cup",
      "option2": "box",
      "answer": "2",
    },
  ),
  _question(
    "commonsense_qa",
    ("tau/commonsense_qa", None),
    "question",
    "Question: {question}\nAnswer:",
  ),
  _question(
    "openbookqa",
    ("allenai/openbookqa", "main"),
    "question_stem",
    "Question: {question_stem}\nAnswer:",
  ),
  _question(
    "arc_easy",
    ("allenai/ai2_arc", "ARC-Easy"),
    "question",
    "Question: {question}\nAnswer:",
  ),
  _question(
    "arc_challenge",
    ("allenai/ai2_arc", "ARC-Challenge"),
    "question",
    "Question: {question}\nAnswer:",
  ),
  Task(
    name="piqa",
    kind="multiple choice",
    hub=("baber/piqa", None),
    text=("goal", "sol1", "sol2"),
    templates=(Template("Question: {goal}\nAnswer:", (" {sol1}", " {sol2}")),),
    example={
      "goal": "Cool a hot soup",
      "sol1": "Stir it in a wide bowl",
      "sol2": "Cover it with a lid",
      "label": 0,
    },
  ),
  Task(
    name="hellaswag",
    kind="multiple choice",
    hub=("Rowan/hellaswag", None),
    text=("activity_label", "ctx_a"),
    other=("ctx_b", "endings"),
    templates=(Template(_hellaswag, _endings),),
    example={
      "activity_label": "Skating",
      "ctx_a": "[header] A girl ties her skates.",
      "ctx_b": "she",
      "endings": ["eats the ice.", "glides onto the rink."],
      "label": "1",
    },
  ),
  Task(
    name="meta_icl",
    kind="multiple choice",
    text=("input",),
    other=("output", "options"),
    label=_output,
    templates=(
      Template(_meta_icl, _outputs),  # direct
      Template("{input}\n", _outputs),  # channel
    ),
    metric="macro_f1",
    example={
      "input": "A hen lays",
      "output": "eggs",
      "options": ["milk", "eggs"],
    },
  ),
)
