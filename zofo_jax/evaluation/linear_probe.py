"""Linear probes of a frozen backbone's hidden states.

The backbone is fixed, so its hidden states are computed once; a classifier is
then fitted to them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from zofo_jax.data import encode_options
from zofo_jax.evaluation import scoring
from zofo_jax.models import apply


def hidden_states(
  hidden_fn: apply.HiddenFn,
  base: Any,
  examples: Sequence[encode_options.Example],
  *,
  batch_size: int,
  pad: int,
) -> np.ndarray:
  """Computes the hidden states of a set of examples.

  Args:
    hidden_fn: jitted result of `apply.make_hidden_fn`.
    base: backbone parameters.
    examples: encoded rows.
    batch_size: examples at a time.
    pad: token id that fills rows.

  Returns:
    float32 [N, R, P, D], R and P as in `batching.shape_of(examples)`.
  """
  return scoring.map_batches(
    lambda batch: np.asarray(hidden_fn(base, batch), np.float32),
    examples,
    batch_size=batch_size,
    pad=pad,
    label="read",
  )


def fit_logistic(
  features: np.ndarray, labels: Sequence[int], *, c: float, num_options: int
) -> Callable[[np.ndarray], np.ndarray]:
  """Fits scikit-learn's logistic regression.

  Args:
    features: [N, D].
    labels: the correct option of each row, int [N].
    c: inverse of the regularisation strength.
    num_options: O; options that no label names get the lowest score.

  Returns:
    A function from features [M, D] to log-probabilities, float32 [M, O].
  """
  from sklearn import linear_model  # imported lazily because it is slow

  model = linear_model.LogisticRegression(C=c, max_iter=5000)
  model.fit(features, labels)

  def score(features):
    scores = np.full((len(features), num_options), -np.inf)
    scores[:, model.classes_] = model.predict_log_proba(features)
    return np.maximum(scores, np.finfo(np.float32).min).astype(np.float32)

  return score
