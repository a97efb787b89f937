"""Head tuning: training rows of the output head on a frozen backbone.

The backbone is fixed, so its hidden states are computed once; the head's rows
are then trained on them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from zofo_jax.core import losses
from zofo_jax.data import batching, encode_options
from zofo_jax.models import apply, decoder
from zofo_jax.report import progress as progress_lib

# (log p of every target, batch) -> loss, float32 [].
ReduceFn = Callable[[jax.Array, losses.Batch], jax.Array]


def label_tokens(examples: Sequence[encode_options.Example]) -> np.ndarray:
  """Returns the distinct tokens of all options, int32 [K], sorted."""
  tokens = {
    token
    for example in examples
    for row in example.rows
    for _, token, _ in row.targets
  }
  return np.array(sorted(tokens), np.int32)


def make_head_step(
  reduce_fn: ReduceFn,
  tx: optax.GradientTransformation,
  tokens: np.ndarray | None,
  output: decoder.Output = decoder.PLAIN_OUTPUT,
) -> Callable[..., tuple[Any, Any, jax.Array]]:
  """Returns a pure first-order step on rows of the head, to be jitted.

  Args:
    reduce_fn: loss of log p of every target and the batch:
      `losses.likelihood` or `losses.classification`.
    tx: optimizer of the rows.
    tokens: int32 [K], the rows to train; None for all.
    output: what follows the product with the head.

  Returns:
    step(rows, opt_state, table, hidden, batch) -> (rows, opt_state, loss) for
    rows [K, D], the whole table [V, D] and hidden states [B, R, P, D].
  """

  def step(rows, opt_state, table, hidden, batch):
    def loss(rows):
      whole = rows if tokens is None else table.at[tokens].set(rows)
      log_probs = decoder.target_log_probs(
        apply.merge_rows(hidden),
        whole,
        apply.merge_rows(batch.target_slot),
        apply.merge_rows(batch.target_token),
        output,
      )
      return reduce_fn(log_probs.reshape(*hidden.shape[:2], -1), batch)

    value, grads = jax.value_and_grad(loss)(rows)
    updates, opt_state = tx.update(grads, opt_state, rows)
    return optax.apply_updates(rows, updates), opt_state, value

  return step


def with_head_rows(
  table: jax.Array, tokens: np.ndarray | None, rows: jax.Array
) -> jax.Array:
  """Returns a head's table with its rows replaced, in the table's dtype."""
  rows = rows.astype(table.dtype)
  return rows if tokens is None else table.at[jnp.asarray(tokens)].set(rows)


def train_rows(
  table: jax.Array,
  tokens: np.ndarray | None,
  examples: Sequence[encode_options.Example],
  hidden: np.ndarray,
  *,
  reduce_fn: ReduceFn,
  tx: optax.GradientTransformation,
  num_steps: int,
  batch_size: int,
  seed: int,
  pad: int,
  output: decoder.Output = decoder.PLAIN_OUTPUT,
) -> jax.Array:
  """Trains rows of the head.

  Args:
    table: the head, [V, D].
    tokens: int32 [K], the rows to train; None for all.
    examples: encoded rows to train on, N of them.
    hidden: their hidden states, float32 [N, R, P, D].
    reduce_fn: see `make_head_step`.
    tx: optimizer of the rows.
    num_steps: how many steps.
    batch_size: examples of a step.
    seed: chooses the batches.
    pad: token id that fills rows.
    output: what follows the product with the head.

  Returns:
    The trained rows, float32 [K, D].
  """
  table = jnp.asarray(table, jnp.float32)
  # Rows are donated while the table is read, so that they are two arrays.
  rows = jnp.array(table, copy=True) if tokens is None else table[tokens]
  opt_state = tx.init(rows)
  step_fn = jax.jit(
    make_head_step(reduce_fn, tx, tokens, output), donate_argnums=(0, 1)
  )
  shape = batching.shape_of(examples)
  with progress_lib.Progress(num_steps, "head") as progress:
    for step in range(num_steps):
      chosen = batching.batch_indices(seed, len(examples), batch_size, step)
      batch = batching.collate([examples[i] for i in chosen], shape, pad=pad)
      rows, opt_state, loss = step_fn(
        rows, opt_state, table, hidden[chosen], batch
      )
      if (step + 1) % 20 == 0 or step + 1 == num_steps:
        progress.update(step + 1, loss=float(loss))
  return rows
