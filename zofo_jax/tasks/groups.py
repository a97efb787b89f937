"""Groups of tasks for meta-training: training tasks and held-out targets."""

from typing import NamedTuple


class Group(NamedTuple):
  """Names of training and target tasks.

  Attributes:
    train: tasks to train on.
    target: tasks to adapt to afterwards, disjoint from `train`.
  """

  train: tuple[str, ...]
  target: tuple[str, ...]


ALL: dict[str, Group] = {
  # The tasks defined in the paper's PyTorch code.
  "sentiment": Group(
    train=(
      "tweet_eval_sentiment",
      "imdb",
      "rotten_tomatoes",
      "emotion",
      "tweet_eval_emotion",
      "tweet_eval_irony",
    ),
    target=(
      "amazon_polarity",
      "poem_sentiment",
      "yelp_polarity",
      "financial_phrasebank",
      "emo",
    ),
  ),
  "nli": Group(
    train=("mnli", "qnli", "scitail", "sick", "anli_r1", "anli_r2"),
    target=("rte", "cb", "wnli", "anli_r3"),
  ),
  "paraphrase": Group(
    train=("qqp", "medical_questions_pairs", "sick", "wiki_qa"),
    target=("mrpc",),
  ),
  # Short texts, for small machines. SST-2 is not a target because its sentences
  # come from the reviews of rotten_tomatoes.
  "short": Group(
    train=("rotten_tomatoes", "subj", "emotion", "mpqa"),
    target=("cr", "tweet_eval_sentiment", "tweet_eval_emotion"),
  ),
}
