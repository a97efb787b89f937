"""Beam search, with the rules of transformers.

A beam is a text in progress. Each row has M of them, ranked by the sum of their
tokens' log-probabilities. Finished texts are stored separately, ranked by that
sum over length ** penalty, and the search of a row ends when no beam can
improve on them.

Shapes: B rows, M beams, T new tokens, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from zofo_jax.models import kv_cache

# A finite score far below any sum of log-probabilities.
_NEVER = -1e9

# (tokens [B * M], cache) -> scores of the next token [B * M, V], cache.
DecodeFn = Callable[
  [jax.Array, kv_cache.Cache], tuple[jax.Array, kv_cache.Cache]
]


class _Search(NamedTuple):
  """A search at some step.

  Attributes:
    running: int32 [B, M, T], texts in progress.
    running_score: float32 [B, M], sums of log-probabilities.
    ended: int32 [B, M, T], the best finished texts.
    ended_score: float32 [B, M], their sums over length ** penalty.
    is_ended: bool [B, M], whether a slot holds a finished text.
    is_open: bool [B], rows that can still improve.
  """

  running: jax.Array
  running_score: jax.Array
  ended: jax.Array
  ended_score: jax.Array
  is_ended: jax.Array
  is_open: jax.Array


def _pick(x: jax.Array, index_BxM: jax.Array) -> jax.Array:
  """Gathers beams along axis 1 of [B, beams, ...]."""
  index = index_BxM.reshape(*index_BxM.shape, *(1,) * (x.ndim - 2))
  return jnp.take_along_axis(x, index, axis=1)


def _extend(
  state: _Search,
  logits_BxMxV: jax.Array,
  step: jax.Array,
  stops_V: jax.Array,
  length_penalty: float,
) -> tuple[_Search, jax.Array, jax.Array]:
  """Appends token number `step`; returns the beams, parents and tokens."""
  rows, beams, length = state.running.shape
  vocabulary = stops_V.shape[0]
  log_p = jax.nn.log_softmax(logits_BxMxV, axis=-1)
  total = log_p + state.running_score[..., None]

  def continuations(scores):
    best, index = jax.lax.top_k(scores.reshape(rows, -1), beams)
    parent, token = index // vocabulary, index % vocabulary
    texts = _pick(state.running, parent).at[:, :, step].set(token)
    return best, parent, token, texts

  # Of the best continuations, those that end; at the last step all do.
  score, _, token, texts = continuations(total)
  ends = stops_V[token] | (step == length - 1)
  size = (step + 1).astype(jnp.float32) ** length_penalty
  score = jnp.where(ends & state.is_open[:, None], score / size, _NEVER)
  merged = jnp.concatenate([state.ended_score, score], axis=1)
  ended_score, index = jax.lax.top_k(merged, beams)
  ended = _pick(jnp.concatenate([state.ended, texts], axis=1), index)
  is_ended = _pick(jnp.concatenate([state.is_ended, ends], axis=1), index)

  # The best continuations that do not end.
  unfinished = total + jnp.where(stops_V, _NEVER, 0.0)[None, None]
  running_score, parent, token, running = continuations(unfinished)
  possible = running_score[:, :1] / size
  worst = jnp.where(is_ended, ended_score.min(axis=1, keepdims=True), _NEVER)
  is_open = state.is_open & jnp.any(possible > worst, axis=1)
  after = _Search(running, running_score, ended, ended_score, is_ended, is_open)
  return after, parent, token


def search(
  decode_fn: DecodeFn,
  logits: jax.Array,
  cache: kv_cache.Cache,
  *,
  num_beams: int,
  max_new_tokens: int,
  stops: jax.Array,
  pad: int,
  length_penalty: float = 1.0,
) -> jax.Array:
  """Searches for the likeliest text after each prompt.

  Args:
    decode_fn: decodes one more token in every row of a cache.
    logits: scores of the first token, [B, V] float32.
    cache: of the prompts, with max_new_tokens - 1 slots left.
    num_beams: M.
    max_new_tokens: T.
    stops: bool [V], tokens that end a text.
    pad: token id after the end.
    length_penalty: a text's score is divided by its length to this power;
      above 0 favours long texts.

  Returns:
    The best finished text, int32 [B, T].
  """
  rows = logits.shape[0]
  texts = jnp.full((rows, num_beams, max_new_tokens), pad, jnp.int32)
  lowest = jnp.full((rows, num_beams), _NEVER, jnp.float32)
  # All beams start equal, so that only the first may be extended.
  state = _Search(
    running=texts,
    running_score=lowest.at[:, 0].set(0.0),
    ended=texts,
    ended_score=lowest,
    is_ended=jnp.zeros((rows, num_beams), bool),
    is_open=jnp.ones(rows, bool),
  )
  first_of_row_Bx1 = num_beams * jnp.arange(rows)[:, None]

  def extend(state, logits, cache, step):
    logits = logits.reshape(rows, num_beams, -1)
    state, parent, token = _extend(state, logits, step, stops, length_penalty)
    cache = kv_cache.gather_rows(cache, (first_of_row_Bx1 + parent).reshape(-1))
    return step + 1, state, token.reshape(-1), cache

  def is_unfinished(carry):
    step, state, _, _ = carry
    return (step < max_new_tokens) & jnp.any(state.is_open)

  def body(carry):
    step, state, token, cache = carry
    return extend(state, *decode_fn(token, cache), step)

  cache = kv_cache.gather_rows(cache, jnp.repeat(jnp.arange(rows), num_beams))
  logits = jnp.repeat(logits, num_beams, axis=0)
  carry = extend(state, logits, cache, jnp.int32(0))
  _, state, _, _ = jax.lax.while_loop(is_unfinished, body, carry)
  return state.ended[:, 0]
