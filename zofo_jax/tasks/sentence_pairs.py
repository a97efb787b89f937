"""Two texts and a question: entailment, paraphrase, question answering.

Patterns and label words are those of MeZO and of Bilevel-ZOFO's PyTorch code,
with inverted or swapped label words corrected (MRPC, QQP, MNLI, ANLI, WNLI,
WikiQA). That code lacks QNLI, whose pattern here follows the others.
"""

from zofo_jax.tasks.base import Task, Template
from zofo_jax.tasks.helpers import masked_pair

_NO_YES = ("No", "Yes")
_YES_NO = ("Yes", "No")
_ANSWERS = (" Yes", " Maybe", " No")
_ENTAILS = (
  "Premise: {premise}\nHypothesis: {hypothesis}\n"
  "Does the premise entail the hypothesis? Yes, No, or Maybe?\n"
)
_NLI = {
  "premise": "The shop is shut on Sundays.",
  "hypothesis": "The shop is shut one day a week.",
  "label": 0,
}


def _sentences(
  first: str, second: str, question: str, noun: str = "Sentence"
) -> str:
  """Returns the pattern of two numbered texts and a question about them."""
  return f"{noun} 1: {{{first}}}\n{noun} 2: {{{second}}}\n{question}\n"


_GLUE = (
  Task(
    name="glue_rte",
    hub=("nyu-mll/glue", "rte"),
    text=("sentence1", "sentence2"),
    templates=(
      Template(
        '{sentence1}\nDoes this mean that "{sentence2}" is true? Yes or No?\n',
        _YES_NO,
      ),
      Template('{sentence1}\n"{sentence2}"\n', _YES_NO),
    ),
    masked=masked_pair("sentence1", "sentence2", (" Yes", " No")),
    example={
      "sentence1": "Snow fell all night.",
      "sentence2": "It was warm.",
      "label": 1,
    },
  ),
  Task(
    name="mrpc",
    hub=("nyu-mll/glue", "mrpc"),
    text=("sentence1", "sentence2"),
    templates=(
      Template(
        _sentences(
          "sentence1",
          "sentence2",
          "Are these sentences paraphrases of each other? Yes or No?",
        ),
        _NO_YES,
      ),
    ),
    metric="macro_f1",
    masked=masked_pair("sentence1", "sentence2", (" No", " Yes"), ""),
    example={
      "sentence1": "Shares rose by a tenth .",
      "sentence2": "Stock went up 10 percent .",
      "label": 1,
    },
  ),
  Task(
    name="qqp",
    hub=("nyu-mll/glue", "qqp"),
    text=("question1", "question2"),
    templates=(
      Template(
        _sentences(
          "question1",
          "question2",
          "Are these questions duplicates of each other? Yes or No?",
          "Question",
        ),
        _NO_YES,
      ),
    ),
    metric="macro_f1",
    masked=masked_pair("question1", "question2", (" No", " Yes"), ""),
    example={
      "question1": "How do I boil an egg?",
      "question2": "Why is the sea salty?",
      "label": 0,
    },
  ),
  Task(
    name="mnli",
    hub=("nyu-mll/glue", "mnli"),
    hub_splits={"validation": "validation_matched", "test": "test_matched"},
    text=("premise", "hypothesis"),
    templates=(Template(_ENTAILS, ("Yes", "Maybe", "No")),),
    masked=masked_pair("premise", "hypothesis", _ANSWERS),
    example=_NLI,
  ),
  Task(
    name="snli",
    hub=("stanfordnlp/snli", None),
    text=("premise", "hypothesis"),
    templates=(Template(_ENTAILS, ("Yes", "Maybe", "No")),),
    masked=masked_pair("premise", "hypothesis", _ANSWERS),
    example=_NLI,
  ),
  Task(
    name="qnli",
    hub=("nyu-mll/glue", "qnli"),
    text=("question", "sentence"),
    templates=(
      Template(
        "Question: {question}\nSentence: {sentence}\n"
        "Does the sentence answer the question? Yes or No?\n",
        _YES_NO,
      ),
    ),
    masked=masked_pair("question", "sentence", (" Yes", " No")),
    example={
      "question": "How tall is the tower?",
      "sentence": "The tower is 40 metres tall.",
      "label": 0,
    },
  ),
  Task(
    name="wnli",
    hub=("nyu-mll/glue", "wnli"),
    text=("sentence1", "sentence2"),
    templates=(
      Template(
        _sentences(
          "sentence1",
          "sentence2",
          "Are these sentences entailed by each other? Yes or No?",
        ),
        _NO_YES,
      ),
    ),
    example={
      "sentence1": "The jug fell off the shelf and it broke.",
      "sentence2": "The jug broke.",
      "label": 1,
    },
  ),
)

_OTHERS = (
  Task(
    name="scitail",
    hub=("allenai/scitail", "tsv_format"),
    text=("premise", "hypothesis"),
    labels=("neutral", "entails"),
    templates=(Template(_ENTAILS, ("neutral", "entails")),),
    metric="macro_f1",
    example={**_NLI, "label": "entails"},
  ),
  *(
    Task(
      name=f"anli_r{i}",
      hub=("facebook/anli", None),
      hub_splits={
        "train": f"train_r{i}",
        "validation": f"dev_r{i}",
        "test": f"test_r{i}",
      },
      text=("premise", "hypothesis"),
      templates=(Template(_ENTAILS, ("Yes", "Maybe", "No")),),
      example=_NLI,
    )
    for i in (1, 2, 3)
  ),
  Task(
    name="sick",
    hub=("RobZamp/sick", None),
    hub_script=True,
    text=("sentence_A", "sentence_B"),
    templates=(
      Template(
        _sentences(
          "sentence_A",
          "sentence_B",
          "Are these sentences entailment, contradiction, or neutral?",
        ),
        ("entailment", "neutral", "contradiction"),
      ),
    ),
    metric="macro_f1",
    example={
      "sentence_A": "A boy is running",
      "sentence_B": "A boy is asleep",
      "label": 2,
    },
  ),
  Task(
    name="medical_questions_pairs",
    hub=("curaihealth/medical_questions_pairs", None),
    text=("question_1", "question_2"),
    templates=(
      Template(
        _sentences(
          "question_1",
          "question_2",
          "Are these questions similar to each other? Yes or No?",
          "Question",
        ),
        _NO_YES,
      ),
    ),
    example={
      "question_1": "Can I run with a cold?",
      "question_2": "Is jogging fine when I have a cold?",
      "label": 1,
    },
  ),
  Task(
    name="wiki_qa",
    hub=("microsoft/wiki_qa", None),
    text=("question", "answer"),
    templates=(
      Template(
        "Question: {question}\nAnswer: {answer}\n"
        "Is the answer correct? Yes or No?\n",
        _NO_YES,
      ),
    ),
    metric="macro_f1",
    example={
      "question": "who built the mill",
      "answer": "The mill was built by monks.",
      "label": 1,
    },
  ),
)

TASKS = (*_GLUE, *_OTHERS)
