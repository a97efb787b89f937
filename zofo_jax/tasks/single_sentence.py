"""Single texts: sentiment, emotion, topic, grammatical acceptability.

Patterns and label words are those of MeZO and of Bilevel-ZOFO's PyTorch code,
with its inverted or missing label words corrected; LM-BFF's for SST-5, CR and
MPQA; after Zhao et al. (2021) for TREC and AG News. CoLA, which none of them
has, asks its question as they do. Those with a mask are MeZO's for RoBERTa,
which are LM-BFF's.
"""

from collections.abc import Sequence

from zofo_jax.tasks import helpers
from zofo_jax.tasks.base import MASK, Fields, Task, Template

_POLARITY = (" terrible", " great")
_FIVE = (" terrible", " bad", " okay", " good", " great")


def _it_was(column: str, words: Sequence[str]) -> tuple[Template, ...]:
  """Returns the templates of reviews; version 1 is the text alone."""
  text = "{" + column + "}"
  return (Template(f"{text} It was", words), Template(text, words))


def _it_was_masked(column: str, words: Sequence[str]) -> tuple[Template, ...]:
  """Returns the template of reviews of masked language models."""
  return (Template(f"{{{column}}} It was{MASK}.", words),)


def _joined_turns(fields: Fields) -> Fields:
  """Returns the text of a conversation whose turns are columns."""
  turns = [fields[f"turn{i}"] for i in (1, 2, 3)]
  return {**fields, "text": " ".join(turn for turn in turns if turn)}


_REVIEWS = (
  Task(
    name="sst2",
    hub=("nyu-mll/glue", "sst2"),
    text=("sentence",),
    templates=_it_was("sentence", _POLARITY),
    masked=_it_was_masked("sentence", _POLARITY),
    example={"sentence": "a slow but charming film", "label": 1},
  ),
  *(
    Task(
      name=name,
      hub=hub,
      text=("text",),
      templates=_it_was("text", _POLARITY),
      masked=_it_was_masked("text", _POLARITY),
      example={"text": "Two hours that I will never get back.", "label": 0},
    )
    for name, hub in (
      ("rotten_tomatoes", ("cornell-movie-review-data/rotten_tomatoes", None)),
      ("imdb", ("stanfordnlp/imdb", None)),
      ("cr", ("SetFit/CR", None)),
      ("mpqa", None),
    )
  ),
  Task(
    name="sst5",
    hub=("SetFit/sst5", None),
    text=("text",),
    templates=_it_was("text", _FIVE),
    masked=_it_was_masked("text", _FIVE),
    example={"text": "neither dull nor exciting", "label": 2},
  ),
  Task(
    name="tweet_eval_sentiment",
    hub=("cardiffnlp/tweet_eval", "sentiment"),
    text=("text",),
    templates=_it_was("text", (" terrible", " neutral", " great")),
    # In that code, the word for positive tweets is "neutral" as well, so they
    # are never predicted.
    reference=Template(
      "{text} It was", (" terrible", " neutral", " neutral"), may_repeat=True
    ),
    metric="macro_f1",
    example={"text": "The new bridge opens on Monday.", "label": 1},
  ),
  Task(
    name="amazon_polarity",
    hub=("fancyzhx/amazon_polarity", None),
    text=("content",),
    templates=(
      Template("{content} The sentiment was", (" negative", " positive")),
    ),
    example={"content": "The lid broke on day one.", "label": 0},
  ),
  helpers.text_task(
    "yelp_polarity",
    "fancyzhx/yelp_polarity",
    (" negative", " positive"),
    "{text} The sentiment was",
    example={"text": "Cold soup, warm beer.", "label": 0},
  ),
  Task(
    name="poem_sentiment",
    hub=("google-research-datasets/poem_sentiment", None),
    text=("verse_text",),
    templates=(
      Template(
        "{verse_text} The sentiment was",
        (" negative", " positive", " neutral", " mixed"),
      ),
    ),
    metric="macro_f1",
    example={"verse_text": "and morning sang to every stone", "label": 1},
  ),
  Task(
    name="financial_phrasebank",
    hub=("ghbacct/financial-phrasebank-all-agree-classification", None),
    mirror_fields=lambda fields: {**fields, "sentence": fields["text"]},
    text=("sentence",),
    templates=(
      Template(
        "{sentence} The sentiment was", (" negative", " neutral", " positive")
      ),
    ),
    # In that code, the words are not in the order of the labels.
    reference=Template(
      "{sentence} The sentiment was", (" positive", " negative", " neutral")
    ),
    metric="macro_f1",
    example={"sentence": "Orders doubled in the last quarter .", "label": 2},
  ),
)

_TOPICS = (
  helpers.text_task(
    "subj",
    "SetFit/subj",
    (" objective", " subjective"),
    "{text} This is",
    masked=(
      Template(f"{{text}} This is{MASK}.", (" objective", " subjective")),
    ),
    example={"text": "he walks to the station .", "label": 0},
  ),
  Task(
    name="trec",
    hub=("CogComp/trec", None),
    hub_script=True,
    text=("text",),
    label="coarse_label",
    templates=(
      Template(
        "Question: {text}\nAnswer Type:",
        (
          " Abbreviation",
          " Entity",
          " Description",
          " Person",
          " Location",
          " Number",
        ),
      ),
    ),
    masked=(
      Template(
        f"{MASK}: {{text}}",
        (
          " Expression",
          " Entity",
          " Description",
          " Human",
          " Location",
          " Number",
        ),
      ),
    ),
    example={"text": "Where do storks spend winter ?", "coarse_label": 4},
  ),
  helpers.text_task(
    "ag_news",
    "fancyzhx/ag_news",
    (" World", " Sports", " Business", " Technology"),
    "Article: {text}\nAnswer:",
    example={"text": "Rowers win gold on the final day.", "label": 1},
  ),
)

_EMOTIONS = (
  helpers.text_task(
    "emotion",
    "dair-ai/emotion",
    (" sadness", " joy", " love", " anger", " fear", " surprise"),
    "{text} The emotion was",
    hub_config="split",
    metric="macro_f1",
    example={"text": "i feel like singing", "label": 1},
  ),
  helpers.tweets_task(
    "emotion",
    (" anger", " joy", " optimism", " sadness"),
    "{text} The emotion was",
    metric="macro_f1",
    example={"text": "Tomorrow will be better.", "label": 2},
  ),
  helpers.text_task(
    "emo",
    "oneonlee/cleansed_emocontext",
    (" others", " happy", " sad", " angry"),
    "{text} The emotion was",
    mirror_fields=_joined_turns,
    metric="macro_f1",
    example={"text": "hi how are you fine you", "label": 0},
  ),
  helpers.tweets_task(
    "irony",
    (" non-ironic", " ironic"),
    "{text} The text was",
    example={"text": "Another Monday. My favourite.", "label": 1},
  ),
)

_ACCEPTABILITY = (
  Task(
    name="cola",
    hub=("nyu-mll/glue", "cola"),
    text=("sentence",),
    templates=(
      Template(
        "{sentence}\nIs this sentence grammatical? Yes or No?\n", ("No", "Yes")
      ),
    ),
    metric="matthews",
    masked=(
      Template(f"{{sentence}} This is{MASK}.", (" incorrect", " correct")),
    ),
    example={"sentence": "Cat the sleeps.", "label": 0},
  ),
)

TASKS = (*_REVIEWS, *_TOPICS, *_EMOTIONS, *_ACCEPTABILITY)
