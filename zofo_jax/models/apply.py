"""A decoder applied to a batch: log-probabilities, hidden states, best tokens.

Everything that evaluation and training ask of a model goes through here. A
batch has a leading axis of examples and one of rows an example, [B, R, ...];
a decoder has a single one.
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

# (base, batch) -> what the head reads at a batch's positions, [B, R, P, D].
HiddenFn = Callable[[Any, losses.Batch], Any]


def merge_rows(leaf: jax.Array) -> jax.Array:
  """Merges the axes of examples and rows: [B, R, ...] to [B * R, ...]."""
  return leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:])


def make_log_probs_fn(module: nn.Module) -> losses.LogProbsFn:
  """Makes log_probs(base, adapter, batch, key) of a model's targets.

  Args:
    module: a decoder of `zofo_jax.models`.

  Returns:
    A function to float32 [B, R, K], for `losses.make_loss_fn` and evaluation.
  """

  def log_probs_fn(base, adapter, batch, key):
    # Without dropout nothing reads the key.
    drops = key is not None and adapters.has_dropout(adapter)
    lead = batch.tokens.shape[:2]

    out: Any = module.apply(
      {"params": base, "adapter": adapter},
      merge_rows(batch.tokens),
      merge_rows(batch.mask),
      merge_rows(batch.positions),
      merge_rows(batch.target_slot),
      merge_rows(batch.target_token),
      rngs={"dropout": key} if drops else None,
    )
    return out.reshape(*lead, -1)

  return log_probs_fn


def make_hidden_fn(module: nn.Module) -> HiddenFn:
  """Makes the function that reads a decoder's hidden states; to be jitted."""

  def hidden_fn(base, batch):
    lead = batch.tokens.shape[:2]

    hidden: Any = module.apply(
      {"params": base, "adapter": {}},
      merge_rows(batch.tokens),
      merge_rows(batch.mask),
      method="hidden",
    )
    picked = decoder.gather_positions(hidden, merge_rows(batch.positions))
    return picked.reshape(*lead, *picked.shape[1:])

  return hidden_fn


def best_tokens(
  module: nn.Module, base: Any, adapter: Any, batch: losses.Batch
) -> jax.Array:
  """Returns the likeliest token at each target, the true ones before it given.

  Args:
    module: a decoder of `zofo_jax.models`.
    base: backbone parameters, perturbed or not.
    adapter: adapter parameters.
    batch: rows of text.

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
  table = head_table(module, base)
  best = jnp.argmax(perturbed.dot_transposed(hidden, table), axis=-1)
  best = jnp.take_along_axis(best, merge_rows(batch.target_slot), axis=1)
  return best.astype(jnp.int32).reshape(*lead, -1)


def head_table(module: nn.Module, base: Any) -> Any:
  """Returns the table [V, D] of a decoder's head, tied or its own."""
  config: Any = getattr(module, "config")  # noqa: B009  (no attribute of Module)
  return base["embed" if config.tied_head else "head"]["embedding"]


def untie(module: nn.Module, base: Any, table: jax.Array) -> tuple[Any, Any]:
  """Returns a decoder, and its weights, with a head table of its own.

  Args:
    module: a decoder of `zofo_jax.models`.
    base: its weights.
    table: the head's [V, D].
  """
  config: Any = getattr(module, "config")  # noqa: B009
  config = dataclasses.replace(config, tied_head=False)
  return module.clone(config=config), {**base, "head": {"embedding": table}}
