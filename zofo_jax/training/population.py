"""Scores of what a population writes: the host's part of a training step."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from zofo_jax.core.types import BilevelState
from zofo_jax.data import batching, encode_prompts
from zofo_jax.evaluation import generation, rewards
from zofo_jax.sharding import multihost

_log = logging.getLogger("zofo_jax")
# Steps in a row without any difference in reward, before a warning.
_PATIENCE = 10

# (state, tokens [B, L], mask [B, L], numbers of the rows [B]) -> answers, with
# leaves [Q, 2, B, ...].
AnswerFn = Callable[..., generation.Generated]


class Scorer:
  """Has a population write answers, and scores them."""

  def __init__(
    self,
    functions: rewards.Rewards,
    answer_fn: AnswerFn,
    questions: Sequence[encode_prompts.Question],
    *,
    tokenizer: Any,
    pad: int,
    stop: Sequence[str],
    seed: int,
    batch_size: int,
    num_samples: int = 0,
    write_sample: Callable[[dict[str, Any]], None] = lambda row: None,
  ):
    """Initializes the scorer.

    Args:
      functions: score answers.
      answer_fn: jitted.
      questions: rows of D_f.
      tokenizer: turns tokens into text.
      pad: token id that fills rows.
      stop: strings that end an answer.
      seed: of the choice of rows.
      batch_size: B, prompts of a step.
      num_samples: prompts of a step whose best and worst answers are written.
      write_sample: gets them.
    """
    self._functions, self._answer_fn = functions, answer_fn
    self._questions, self._tokenizer = questions, tokenizer
    self._pad, self._stop, self._seed = pad, stop, seed
    self._batch_size, self._num_samples = batch_size, num_samples
    self._write_sample = write_sample
    # One shape, so that the program is compiled once.
    longest = max(len(question.tokens) for question in questions)
    self._length = -(-longest // 8) * 8
    self._scores: dict[int, np.ndarray] = {}
    self._metrics: dict[int, dict[str, float]] = {}
    self._equal_in_a_row = 0

  def scores(self, state: BilevelState, step: int) -> np.ndarray:
    """Returns the mean reward of each member of a step's population.

    The program around it asks twice for the first step, once to be compiled.

    Args:
      state: before the step.
      step: how many steps are done.

    Returns:
      float32, shape [Q, 2].

    Raises:
      UserError: a reward function failed.
    """
    if step not in self._scores:
      self._scores = {step: self._score(state, step)}
    return self._scores[step]

  def metrics(self, step: int) -> dict[str, float]:
    """Returns the metrics of the rewards after `step` steps; only once."""
    return self._metrics.pop(step)

  def _score(self, state, step) -> np.ndarray:
    chosen = batching.batch_indices(
      self._seed, len(self._questions), self._batch_size, step
    )
    questions = [self._questions[i] for i in chosen]
    rows = batching.collate_prompts(
      [question.tokens for question in questions], self._length, pad=self._pad
    )
    numbers = np.arange(len(chosen), dtype=np.uint32)
    answers = jax.device_get(self._answer_fn(state, *rows, numbers))
    with multihost.raise_on_all_processes():
      texts, scores = self._score_own_rows(answers, questions)
    # [functions, Q, 2, B], each process its own rows and zeros elsewhere.
    scores = multihost.sum_over_processes(scores)
    total = self._functions.total(scores)
    members = total.mean(axis=-1).astype(np.float32)
    self._note(step, scores, total, members, answers.lengths)
    self._write_samples(step, questions, texts, total)
    return members

  def _score_own_rows(self, answers, questions):
    """Returns the texts {(q, side, row): text} and scores of this process."""
    lead = answers.lengths.shape
    share = multihost.own_share(lead[-1])
    places = [(*member, b) for member in np.ndindex(*lead[:-1]) for b in share]
    texts = {
      place: generation.to_text(
        self._tokenizer,
        answers.tokens[place][: answers.lengths[place]],
        self._stop,
      ).strip()
      for place in places
    }
    own_scores = self._functions.score(
      list(texts.values()), [questions[b] for *_, b in places]
    )
    # What processes exchange, of the precision of the result.
    scores = np.zeros((len(self._functions.names), *lead), np.float32)
    for place, score in zip(places, own_scores.T, strict=True):
      scores[:, *place] = score
    return texts, scores

  def _note(self, step, scores, total, members, lengths) -> None:
    """Computes the metrics of a step."""
    tied = members[:, 0] == members[:, 1]  # they move nothing
    spread = np.ptp(total, axis=(0, 1))  # of each prompt, over members
    row = {
      "reward": float(total.mean()),
      "reward_best": float(members.max()),
      "reward_std": float(members.std()),
      "tied_directions": int(tied.sum()),
      "zero_spread": float(np.mean(spread == 0)),
      "answer_tokens": float(lengths.mean()),
    }
    if len(self._functions.names) > 1:
      names = self._functions.names
      row |= {f"reward_{n}": float(s.mean()) for n, s in zip(names, scores)}
    self._metrics[step] = row
    self._equal_in_a_row = self._equal_in_a_row + 1 if tied.all() else 0
    if self._equal_in_a_row == _PATIENCE:
      _log.warning(
        "No direction has changed the reward for %d steps, so nothing has "
        "moved; expected a larger zo.eps, more zo.num_directions or "
        "upper.batch_size, a reward.temperature above 0, or a reward with "
        "more levels.",
        _PATIENCE,
      )

  def _write_samples(self, step, questions, texts, total) -> None:
    """Writes the best and the worst answer of a few prompts."""
    samples = multihost.own_share(total.shape[-1])[: self._num_samples]
    for b in samples:
      best, worst = (
        np.unravel_index(place, total.shape[:-1])
        for place in (total[..., b].argmax(), total[..., b].argmin())
      )
      self._write_sample(
        {
          "step": step + 1,
          "where": questions[b].source,
          "best": texts[(*best, b)],
          "best_reward": float(total[(*best, b)]),
          "worst": texts[(*worst, b)],
          "worst_reward": float(total[(*worst, b)]),
        }
      )
