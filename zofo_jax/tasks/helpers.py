"""Constructors for tasks with a single text and fixed label words."""

from collections.abc import Sequence
from typing import Any

from zofo_jax.tasks.base import Task, Template


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
