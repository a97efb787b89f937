"""What the zeroth-order step on theta may measure in the loss's stead.

The share of wrong options, the F1 over tokens of what the model would write,
or a Python function of one's own: none of them has a derivative, and a
zeroth-order step needs none. Each is an error, 1 less a score.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zofo_jax import errors
from zofo_jax.core import losses
from zofo_jax.core.types import LossFn
from zofo_jax.models import apply

# (what the model would write, the right answer) -> score, the higher the
# better.
Score = Callable[[str, str], float]


def _right_targets(batch: losses.Batch) -> jax.Array:
  """Marks the targets of the right option, float32 [B, R, K]."""
  right = batch.target_option == batch.label[:, None, None]
  return right * batch.target_weight


def _mean(scores: jax.Array, batch: losses.Batch) -> jax.Array:
  weight = batch.example_weight
  return jnp.sum(scores * weight) / jnp.maximum(jnp.sum(weight), 1.0)


def token_f1(predicted: jax.Array, batch: losses.Batch) -> jax.Array:
  """F1 between the predicted tokens and those of the right option.

  Both are bags of as many tokens, so that precision and recall are one number.

  Args:
    predicted: int32 [B, R, K].
    batch: rows of text.

  Returns:
    float32 [B].
  """
  size = batch.label.shape[0]
  truth = batch.target_token.reshape(size, -1)
  guess = predicted.reshape(size, -1)
  there = _right_targets(batch).reshape(size, -1) > 0
  earlier = jnp.tril(jnp.ones((truth.shape[1],) * 2, bool), -1)
  same = truth[:, :, None] == truth[:, None, :]
  before = jnp.sum(same & there[:, None, :] & earlier[None], axis=-1)
  found = jnp.sum(
    (truth[:, :, None] == guess[:, None, :]) & there[:, None, :], axis=-1
  )
  # The n-th of equal tokens is matched if the guess has n of them.
  matched = jnp.sum(there & (found > before), axis=-1)
  return matched / jnp.maximum(jnp.sum(there, axis=-1), 1)


def python_score(
  score: Score, tokenizer: Any, predicted: jax.Array, batch: losses.Batch
) -> jax.Array:
  """Scores each example by a Python function of two texts, on the host.

  Args:
    score: of (what the model would write, the right answer).
    tokenizer: decodes both.
    predicted: int32 [B, R, K].
    batch: rows of text.

  Returns:
    float32 [B].
  """

  def on_host(predicted, truth, there):
    """Takes any leading axes, as `vmap` adds them."""
    shape = predicted.shape[:-2]
    width = int(np.prod(predicted.shape[-2:]))
    lines = [np.asarray(x).reshape(-1, width) for x in (predicted, truth)]
    marks = np.asarray(there).reshape(-1, width) > 0
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


def find_score(name: str) -> Score:
  """Imports the function that `MODULE:SCORE` names.

  Raises:
    UserError: there is none.
  """
  module_name, _, function_name = name.partition(":")
  try:
    found = importlib.import_module(module_name)
  except (ImportError, ValueError) as error:
    raise errors.UserError(
      f"config.zo.objective: cannot import the module of '{name}' "
      f"({errors.first_line(error)})."
    ) from error
  function = getattr(found, function_name, None)
  if not callable(function):
    raise errors.UserError(
      f"config.zo.objective: module '{module_name}' has no function "
      f"'{function_name}'.{errors.nearest(function_name, dir(found))}"
    )
  return function


def make_probe_loss_fn(
  name: str, module: nn.Module, tokenizer: Any
) -> LossFn | None:
  """Makes what `config.zo.objective` names.

  Args:
    name: "loss", "accuracy", "token_f1" or "MODULE:SCORE", a function of (what
      the model would write, the right answer).
    module: a decoder of `zofo_jax.models`.
    tokenizer: decodes texts for a SCORE.

  Returns:
    (base, adapter, batch, key) -> float32 []; None for the loss itself.

  Raises:
    UserError: there is no such function.
  """
  if name == "loss":
    return None
  if name == "accuracy":
    return losses.make_loss_fn(
      apply.make_log_probs_fn(module), losses.option_errors
    )
  score = (
    token_f1
    if name == "token_f1"
    else functools.partial(python_score, find_score(name), tokenizer)
  )

  def probe_loss_fn(base, adapter, batch, key):
    del key
    predicted = apply.best_tokens(module, base, adapter, batch)
    return 1.0 - _mean(score(predicted, batch), batch)

  return probe_loss_fn
