"""Applies a decoder to a batch: log-probabilities, hidden states, best tokens.

Training and evaluation use models only through this module. A batch has a
leading axis of examples and one of rows per example, [B, R, ...]; a decoder has
a single batch axis.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zofo_jax import adapters
from zofo_jax.core import losses, perturbed
from zofo_jax.models import decoder

# (base, batch) -> the head's inputs at the batch's positions, [B, R, P, D].
HiddenFn = Callable[[Any, losses.Batch], Any]


def merge_rows(leaf: jax.Array) -> jax.Array:
  """Merges the axes of examples and rows: [B, R, ...] to [B * R, ...]."""
  return leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:])


def make_log_probs_fn(module: nn.Module) -> losses.LogProbsFn:
  """Returns log_probs(base, adapter, batch, key) of a batch's targets.

  Args:
    module: a decoder of `zofo_jax.models`.

  Returns:
    A function that returns float32 [B, R, K], for `losses.make_loss_fn` and
    evaluation.
  """

  def log_probs_fn(base, adapter, batch, key):
    # Without dropout, the key is not used.
    use_dropout = key is not None and adapters.has_dropout(adapter)
    lead = batch.tokens.shape[:2]

    out: Any = module.apply(
      {"params": base, "adapter": adapter},
      merge_rows(batch.tokens),
      merge_rows(batch.mask),
      merge_rows(batch.positions),
      merge_rows(batch.target_slot),
      merge_rows(batch.target_token),
      rngs={"dropout": key} if use_dropout else None,
    )
    return out.reshape(*lead, -1)

  return log_probs_fn


def make_hidden_fn(module: nn.Module) -> HiddenFn:
  """Returns a function that computes the head's inputs; jit it yourself."""

  def hidden_fn(base, batch):
    lead = batch.tokens.shape[:2]

    hidden: Any = module.apply(
      {"params": base, "adapter": {}},
      merge_rows(batch.tokens),
      merge_rows(batch.mask),
      method="hidden",
    )
    hidden = decoder.gather_positions(hidden, merge_rows(batch.positions))
    return hidden.reshape(*lead, *hidden.shape[1:])

  return hidden_fn


def best_tokens(
  module: nn.Module, base: Any, adapter: Any, batch: losses.Batch
) -> jax.Array:
  """Returns the most likely token at each target, with teacher forcing.

  Args:
    module: a decoder of `zofo_jax.models`.
    base: backbone parameters, perturbed or not.
    adapter: adapter parameters.
    batch: a batch of sequences with targets.

  Returns:
    int32 [B, R, K].
  """
  lead = batch.tokens.shape[:2]

  hidden: Any = module.apply(
    {"params": base, "adapter": adapter},
    merge_rows(batch.tokens),
    merge_rows(batch.mask),
    method="hidden",
  )
  hidden = decoder.gather_positions(hidden, merge_rows(batch.positions))
  products = perturbed.dot_transposed(hidden, head_table(module, base))
  logits = head_output(module, base).logits(products)
  best = jnp.argmax(logits, axis=-1)
  best = jnp.take_along_axis(best, merge_rows(batch.target_slot), axis=1)
  return best.astype(jnp.int32).reshape(*lead, -1)


def head_table(module: nn.Module, base: Any) -> Any:
  """Returns a decoder's output embedding [V, D], tied or not."""
  config: Any = getattr(module, "config")  # noqa: B009  (no attribute of Module)
  return base["embed" if config.tied_head else "head"]["embedding"]


def head_output(module: nn.Module, base: Any) -> decoder.Output:
  """Returns what follows the product with a decoder's output embedding."""
  output: Any = module.apply({"params": base}, method="output")
  return output


def untie(module: nn.Module, base: Any, table: jax.Array) -> tuple[Any, Any]:
  """Returns a decoder and its weights with an untied output embedding.

  Args:
    module: a decoder of `zofo_jax.models`.
    base: weights of the decoder.
    table: the output embedding [V, D].
  """
  config: Any = getattr(module, "config")  # noqa: B009
  config = dataclasses.replace(config, tied_head=False)
  return module.clone(config=config), {**base, "head": {"embedding": table}}
