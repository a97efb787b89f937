"""Constructors for tasks with a single text and fixed label words."""

from collections.abc import Sequence
from typing import Any

from zofo_jax.tasks.base import MASK, Fields, Task, Template


def masked_pair(
  first: str, second: str, words: Sequence[str], mark: str = "?"
) -> tuple[Template, ...]:
  """Returns MeZO's template of two texts for masked language models.

  The mask is between them; the first loses its last punctuation mark, and the
  second begins in lower case.

  Args:
    first: column of the first text.
    second: column of the second.
    words: the options.
    mark: what follows the first text.
  """

  def prompt(fields: Fields) -> str:
    before, after = fields[first].rstrip(), fields[second]
    if mark:
      before = before[:-1] if before[-1:] in ".!?" else before
    after = after[:1].lower() + after[1:]
    return f"{before}{mark}{MASK}, {after}"

  return (Template(prompt, words),)


def text_task(
  name: str, hub: str, words: Sequence[str], pattern: str, **more: Any
) -> Task:
  """Returns a task whose only text column is `text`."""
  more.setdefault("example", {"text": "We won again today!", "label": 0})
  return Task(
    name=name,
    hub=(hub, more.pop("hub_config", None)),
    text=("text",),
    templates=(Template(pattern, words),),
    **more,
  )


def tweets_task(
  name: str, words: Sequence[str], pattern: str, **more: Any
) -> Task:
  """Returns a task of TweetEval."""
  return text_task(
    f"tweet_eval_{name}",
    "cardiffnlp/tweet_eval",
    words,
    pattern,
    hub_config=name,
    **more,
  )
