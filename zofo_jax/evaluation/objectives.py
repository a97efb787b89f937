"""Non-differentiable objectives for the zeroth-order step on theta.

The fraction of wrong options, their macro F1, the token F1 of the predicted
tokens, or a user's Python function: a zeroth-order step needs no derivative.
Each objective is an error, 1 minus a score.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zofo_jax.core import losses
from zofo_jax.core.types import LossFn
from zofo_jax.evaluation import user_function
from zofo_jax.models import apply

# (predicted text, correct answer) -> score, the higher the better.
Score = Callable[[str, str], float]
# By the names of `zo.objective`, those that compare all options.
OF_OPTIONS = {
  "accuracy": losses.option_errors,
  "macro_f1": losses.macro_f1_error,
}


def _right_targets(batch: losses.Batch) -> jax.Array:
  """Marks the targets of the correct option, float32 [B, R, K]."""
  right = batch.target_option == batch.label[:, None, None]
  return right * batch.target_weight


def _mean(scores: jax.Array, batch: losses.Batch) -> jax.Array:
  weight = batch.example_weight
  return jnp.sum(scores * weight) / jnp.maximum(jnp.sum(weight), 1.0)


def token_f1(predicted: jax.Array, batch: losses.Batch) -> jax.Array:
  """Computes the F1 of the predicted tokens and those of the correct option.

  Both are bags of equal size, so that precision, recall and F1 are equal.

  Args:
    predicted: int32 [B, R, K].
    batch: rows of text.

  Returns:
    float32 [B].
  """
  size = batch.label.shape[0]
  truth = batch.target_token.reshape(size, -1)
  guess = predicted.reshape(size, -1)
  is_target = _right_targets(batch).reshape(size, -1) > 0
  earlier = jnp.tril(jnp.ones((truth.shape[1],) * 2, bool), -1)
  same = truth[:, :, None] == truth[:, None, :]
  before = jnp.sum(same & is_target[:, None, :] & earlier[None], axis=-1)
  count = jnp.sum(
    (truth[:, :, None] == guess[:, None, :]) & is_target[:, None, :], axis=-1
  )
  # The n-th of equal tokens is matched if the guess has n of them.
  matched = jnp.sum(is_target & (count > before), axis=-1)
  return matched / jnp.maximum(jnp.sum(is_target, axis=-1), 1)


def python_score(
  score: Score, tokenizer: Any, predicted: jax.Array, batch: losses.Batch
) -> jax.Array:
  """Scores each example with a Python function of two texts, on the host.

  Args:
    score: of (predicted text, correct answer).
    tokenizer: decodes both.
    predicted: int32 [B, R, K].
    batch: rows of text.

  Returns:
    float32 [B].
  """

  def on_host(predicted, truth, is_target):
    """Accepts any leading axes, since `vmap` adds some."""
    shape = predicted.shape[:-2]
    width = int(np.prod(predicted.shape[-2:]))
    lines = [np.asarray(x).reshape(-1, width) for x in (predicted, truth)]
    marks = np.asarray(is_target).reshape(-1, width) > 0
    values = [
      float(score(tokenizer.decode(guess[mark]), tokenizer.decode(true[mark])))
      for guess, true, mark in zip(*lines, marks, strict=True)
    ]
    return np.asarray(values, np.float32).reshape(shape)

  return jax.pure_callback(
    on_host,
    jax.ShapeDtypeStruct(batch.label.shape, jnp.float32),
    predicted,
    batch.target_token,
    _right_targets(batch),
    vmap_method="broadcast_all",
  )


def make_probe_loss_fn(
  name: str, module: nn.Module, tokenizer: Any
) -> LossFn | None:
  """Returns the objective that `config.zo.objective` names.

  Args:
    name: "loss", "accuracy", "macro_f1", "token_f1" or "MODULE:SCORE", a
      function of (predicted text, correct answer); or "reward", which is
      computed outside of the step.
    module: a decoder of `zofo_jax.models`.
    tokenizer: decodes texts for a SCORE.

  Returns:
    (base, adapter, batch, key) -> float32 []; None for the loss
    and for rewards.

  Raises:
    UserError: the function does not exist.
  """
  if name in ("loss", "reward"):
    return None
  if name in OF_OPTIONS:
    return losses.make_loss_fn(
      apply.make_log_probs_fn(module), OF_OPTIONS[name]
    )
  score = (
    token_f1
    if name == "token_f1"
    else functools.partial(
      python_score,
      user_function.load(name, "config.zo.objective"),
      tokenizer,
    )
  )

  def probe_loss_fn(base, adapter, batch, key):
    del key
    predicted = apply.best_tokens(module, base, adapter, batch)
    return 1.0 - _mean(score(predicted, batch), batch)

  return probe_loss_fn
