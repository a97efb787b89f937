"""What the step of Bilevel-ZOFO takes and gives."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import optax

# Any pytree of arrays.
PyTree: TypeAlias = Any
# Pytrees of parameters: of the backbone or of an adapter.
Params: TypeAlias = Any
# (base, adapter, batch, key) -> scalar loss, or (loss, aux) where a function
# with `has_aux` takes it. A None key means no dropout.
LossFn: TypeAlias = Callable[[Params, Params, PyTree, jax.Array | None], Any]


class InPlaceUpdate(NamedTuple):
  """A step on theta, to be written in place.

  Attributes:
    weights: factors of the directions, float32, shape [Q]; NumPy's as well.
    decay: share taken off every matrix, float32, shape [].
    learning_rate: what the weights were made with, float32, shape [].
  """

  weights: Any
  decay: Any
  learning_rate: Any


class BilevelState(NamedTuple):
  """Everything that decides the rest of a run.

  Attributes:
    step: outer iterations done, int32, shape [].
    base: backbone parameters theta.
    upper: adapter p, the one that is kept.
    lower: auxiliary adapter s.
    base_opt: state of the backbone's update.
    upper_opt: optimizer state of p.
    lower_opt: optimizer state of s.
    key: typed PRNG key, shape []; never advanced, folded with `step`.
  """

  step: jax.Array
  base: Any
  upper: Any
  lower: Any
  base_opt: Any
  upper_opt: optax.OptState
  lower_opt: optax.OptState
  key: jax.Array


# Fields of a state that have an axis of tasks where there are several.
PER_TASK_FIELDS = ("upper", "lower", "upper_opt", "lower_opt")


class BilevelBatch(NamedTuple):
  """Rows of one outer iteration.

  Attributes:
    lower: batches from D_p for the T inner steps; leaves [T, ...].
    penalty: one fresh batch from D_p for the penalty terms.
    upper: one batch from D_f.
    weights: of the tasks in the mean of G, float32 [M]; None for equal ones.
  """

  lower: Any
  penalty: Any
  upper: Any
  weights: jax.Array | None = None


class BilevelHParams(NamedTuple):
  """Numbers that may change without a new compilation; float32, shape []."""

  zo_eps: jax.typing.ArrayLike = 1e-3
  penalty: jax.typing.ArrayLike = 1.0


class BilevelInfo(NamedTuple):
  """What an iteration tells a logger; float32 unless said.

  Over tasks, losses and the norm have their axis in front: [M, T] and [M].

  Attributes:
    lower_loss: L(theta, s) at each inner step, shape [T].
    upper_loss: L(theta, p; D_f), shape [].
    penalty_loss: L(theta, p; D_p), shape [].
    objective: mean of G over the probed points, shape [].
    coefficients: directional derivatives of G, shape [Q].
    num_nonfinite: directions dropped because G, or p's gradient, was not
      finite, int32 [].
    upper_grad_norm: norm of p's gradient, shape [].
    move: what was added to theta; None if it was not added in place.
    aux: auxiliary output of L(theta, p; D_f), with an axis of tasks in front
      where there are tasks; None without `has_aux`.
  """

  lower_loss: jax.Array
  upper_loss: jax.Array
  penalty_loss: jax.Array
  objective: jax.Array
  coefficients: jax.Array
  num_nonfinite: jax.Array
  upper_grad_norm: jax.Array
  move: InPlaceUpdate | None = None
  aux: Any = None


class BilevelAlgorithm(NamedTuple):
  """A pair of pure functions.

  Attributes:
    init: (key, base, upper, lower=None) -> BilevelState. s (`lower`) starts as
      a copy of p (`upper`) unless given.
    step: (state, batch, hparams) -> (BilevelState, BilevelInfo).
  """

  init: Callable[..., BilevelState]
  step: Callable[..., tuple[BilevelState, BilevelInfo]]
