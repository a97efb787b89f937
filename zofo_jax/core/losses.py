"""Losses of label words and answers, from log-probabilities of targets.

A batch names the positions whose next token is supervised. A model returns
log p of each target, and everything below is arithmetic on these.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Batch(NamedTuple):
  """Rows of text with their supervised positions.

  B examples, R rows an example, L tokens, P positions read, K targets,
  O options. One row serves every option of a single token; an option of
  several tokens has a row of its own.

  Attributes:
    tokens: int32 [B, R, L].
    mask: bool [B, R, L], True at real tokens; or int32, where rows hold several
      documents: the number of each token's, from 1, and 0 for padding.
    positions: int32 [B, R, P], positions whose hidden states are read; each
      predicts the next token.
    target_slot: int32 [B, R, K], index of the position (0 to P - 1) that
      predicts a target.
    target_token: int32 [B, R, K], the token to predict.
    target_option: int32 [B, R, K], the option that a target belongs to.
    target_weight: float32 [B, R, K], 1 for a target, 0 for padding.
    label: int32 [B], the right option.
    option_mask: bool [B, O], True at real options.
    example_weight: float32 [B], 0 for an example that only pads the batch.
  """

  tokens: jax.Array
  mask: jax.Array
  positions: jax.Array
  target_slot: jax.Array
  target_token: jax.Array
  target_option: jax.Array
  target_weight: jax.Array
  label: jax.Array
  option_mask: jax.Array
  example_weight: jax.Array


# (base, adapter, batch, key) -> log p of every target, float32 [B, R, K].
LogProbsFn = Callable[[Any, Any, Batch, jax.Array | None], jax.Array]


def option_scores(log_probs: jax.Array, batch: Batch) -> jax.Array:
  """Returns the mean log-probability of each option's tokens.

  An option that is padding scores the least float32: finite, so that a row
  without options gives no NaN to a gradient.

  Args:
    log_probs: log p of every target, float32 [B, R, K].
    batch: the rows they belong to.

  Returns:
    float32 [B, O].
  """
  options = jnp.arange(batch.option_mask.shape[1])
  member = batch.target_option[..., None] == options[None, None, None]
  weight = member * batch.target_weight[..., None]
  total = jnp.einsum("brk,brko->bo", log_probs, weight)
  count = weight.sum(axis=(1, 2))
  scores = total / jnp.maximum(count, 1.0)
  return jnp.where(batch.option_mask, scores, jnp.finfo(jnp.float32).min)


def likelihood(log_probs: jax.Array, batch: Batch) -> jax.Array:
  """Returns the language-modelling loss of the right options.

  Minus the mean log p over the tokens of the right options of all examples.

  Args:
    log_probs: log p of every target, float32 [B, R, K].
    batch: the rows they belong to.

  Returns:
    float32, shape [].
  """
  right = batch.target_option == batch.label[:, None, None]
  weight = right * batch.target_weight * batch.example_weight[:, None, None]
  return -jnp.sum(weight * log_probs) / jnp.maximum(jnp.sum(weight), 1.0)


def classification(log_probs: jax.Array, batch: Batch) -> jax.Array:
  """Returns the cross-entropy over the options' mean log-probabilities.

  Args:
    log_probs: log p of every target, float32 [B, R, K].
    batch: the rows they belong to; examples may differ in their number of
      options.

  Returns:
    float32, shape [].
  """
  scores = option_scores(log_probs, batch)
  log_options = jax.nn.log_softmax(scores, axis=-1)
  right = jnp.take_along_axis(log_options, batch.label[:, None], axis=-1)[:, 0]
  return -jnp.sum(right * batch.example_weight) / jnp.maximum(
    jnp.sum(batch.example_weight), 1.0
  )


def option_errors(log_probs: jax.Array, batch: Batch) -> jax.Array:
  """Returns the share of examples whose best option is not the right one.

  Piecewise constant: for zeroth-order steps, not for gradients.

  Args:
    log_probs: log p of every target, float32 [B, R, K].
    batch: the rows they belong to, with all options of every example.

  Returns:
    float32, shape [].
  """
  best = jnp.argmax(option_scores(log_probs, batch), axis=-1)
  wrong = (best != batch.label).astype(jnp.float32)
  return jnp.sum(wrong * batch.example_weight) / jnp.maximum(
    jnp.sum(batch.example_weight), 1.0
  )


def macro_f1_error(log_probs: jax.Array, batch: Batch) -> jax.Array:
  """Returns 1 minus the mean F1 of the labels that occur, chosen or right.

  A figure of the whole batch, not a mean over its examples. Piecewise constant,
  as `option_errors` is.

  Args:
    log_probs: log p of every target, float32 [B, R, K].
    batch: the rows they belong to, with all options of every example; option o
      has the same meaning in all of them.

  Returns:
    float32, shape [].
  """
  scores = option_scores(log_probs, batch)
  best = jnp.argmax(scores, axis=-1)

  def marks(options):  # float32 [B, O], 0 for examples that pad the batch
    marked = jax.nn.one_hot(options, scores.shape[-1], dtype=jnp.float32)
    return marked * batch.example_weight[:, None]

  chosen, right = marks(best), marks(batch.label)
  both = jnp.sum(chosen * right, axis=0)
  count = jnp.sum(chosen + right, axis=0)
  f1 = 2 * both / jnp.where(count > 0, count, 1.0)
  return 1.0 - jnp.sum(f1) / jnp.maximum(jnp.sum(count > 0), 1)


def make_loss_fn(
  log_probs_fn: LogProbsFn,
  reduce_fn: Callable[[jax.Array, Batch], jax.Array],
) -> Callable[[Any, Any, Batch, jax.Array | None], jax.Array]:
  """Composes a model's log-probabilities with a loss over them.

  Args:
    log_probs_fn: log p of a batch's targets.
    reduce_fn: `likelihood`, `classification` or another function of
      (log_probs, batch).

  Returns:
    loss(base, adapter, batch, key) -> scalar.
  """

  def loss_fn(base, adapter, batch, key):
    return reduce_fn(log_probs_fn(base, adapter, batch, key), batch)

  return loss_fn
