"""What the hidden states before the head know: linear probes and new heads.

The backbone stands still, so its hidden states are computed once; a
classifier or a head is then trained on them.
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


def hidden_states(
  hidden_fn: apply.HiddenFn,
  base: Any,
  examples: Sequence[encode_options.Example],
  *,
  batch_size: int,
  pad: int,
) -> np.ndarray:
  """Reads the hidden states of a set of examples.

  Args:
    hidden_fn: jitted function of `make_hidden_fn`.
    base: backbone parameters.
    examples: encoded rows.
    batch_size: examples at a time.
    pad: token id that fills rows.

  Returns:
    float32 [N, R, P, D], R and P as in `batches.shape_of(examples)`.
  """
  outputs, indices, done = [], [], 0
  with progress_lib.Progress(len(examples), "read", unit="rows") as progress:
    for batch, index in batching.eval_batches(examples, batch_size, pad=pad):
      outputs.append(np.asarray(hidden_fn(base, batch), np.float32))
      indices.append(index)
      done += int((index >= 0).sum())
      progress.update(done)
  return batching.restore(outputs, indices)


def fit_logistic(
  features: np.ndarray, labels: Sequence[int], *, c: float, num_options: int
) -> Callable[[np.ndarray], np.ndarray]:
  """Fits scikit-learn's logistic regression.

  Args:
    features: [N, D].
    labels: the right option of each, int [N].
    c: the regularisation is 1 / c.
    num_options: how many options there are, whether or not all occur.

  Returns:
    A function of features [M, D] to log-probabilities, float32 [M, O].
  """
  from sklearn import linear_model  # Slow to import, and needed here alone.

  model = linear_model.LogisticRegression(C=c, max_iter=5000)
  model.fit(features, labels)

  def score(features):
    scores = np.full((len(features), num_options), -np.inf)
    scores[:, model.classes_] = model.predict_log_proba(features)
    return np.maximum(scores, np.finfo(np.float32).min).astype(np.float32)

  return score


def label_tokens(examples: Sequence[encode_options.Example]) -> np.ndarray:
  """Returns the tokens of all options, int32, each once."""
  found = {
    token
    for example in examples
    for row in example.rows
    for _, token, _ in row.targets
  }
  return np.array(sorted(found), np.int32)


def make_head_step(
  loss_fn: Callable[[jax.Array, losses.Batch], jax.Array],
  tx: optax.GradientTransformation,
  tokens: np.ndarray | None,
) -> Callable[..., tuple[Any, Any, jax.Array]]:
  """Makes a first-order step on a head's rows; a pure function, to be jitted.

  Args:
    loss_fn: of log p of every target and the batch: `losses.likelihood`,
      `losses.classification`.
    tx: optax transformation of the rows.
    tokens: int32 [K], the rows that are trained; None for all.

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
      )
      return loss_fn(log_probs.reshape(*hidden.shape[:2], -1), batch)

    value, grads = jax.value_and_grad(loss)(rows)
    updates, opt_state = tx.update(grads, opt_state, rows)
    return optax.apply_updates(rows, updates), opt_state, value

  return step


def with_head_rows(
  table: jax.Array, tokens: np.ndarray | None, rows: jax.Array
) -> jax.Array:
  """Returns a head's table with trained rows in it, in the table's dtype."""
  rows = rows.astype(table.dtype)
  return rows if tokens is None else table.at[jnp.asarray(tokens)].set(rows)
