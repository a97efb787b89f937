"""Types of the method: losses, and what a step takes and returns."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import optax

# A pytree of arrays.
PyTree: TypeAlias = Any
# A pytree of parameters, of the backbone or of an adapter.
Params: TypeAlias = Any
# (base, adapter, batch, key) -> scalar loss, or (loss, aux) where a function
# with `has_aux` takes it. A None key means no dropout.
LossFn: TypeAlias = Callable[[Params, Params, PyTree, jax.Array | None], Any]


class InPlaceUpdate(NamedTuple):
  """An in-place update theta <- (1 - decay) theta + sum_q weights[q] z_q.

  Attributes:
    weights: factors of the directions, float32, shape [Q]; jax or NumPy.
    decay: factor by which matrices shrink, float32, shape [].
    learning_rate: learning rate that the weights contain, float32, shape [].
  """

  weights: Any
  decay: Any
  learning_rate: Any


class BilevelState(NamedTuple):
  """Everything that determines the rest of a run.

  Attributes:
    step: number of outer iterations done, int32, shape [].
    base: backbone parameters theta.
    upper: adapter p, the result.
    lower: auxiliary adapter s.
    base_opt: state of the backbone's update.
    upper_opt: optimizer state of p.
    lower_opt: optimizer state of s.
    key: typed PRNG key, shape []; never advanced, folded with `step`.
    history: what s has changed by in the last iterations, if theta still moves
      along it, see `guided`; None without.
  """

  step: jax.Array
  base: Any
  upper: Any
  lower: Any
  base_opt: Any
  upper_opt: optax.OptState
  lower_opt: optax.OptState
  key: jax.Array
  history: Any = None


# Fields of a state that have a leading axis of tasks with `over_tasks`.
PER_TASK_FIELDS = ("upper", "lower", "upper_opt", "lower_opt")


class BilevelBatch(NamedTuple):
  """Batches of one outer iteration; over tasks, leaves are [M, ...].

  Attributes:
    lower: batches from D_p for the T inner steps; leaves [T, ...].
    penalty: one more batch from D_p, for the penalty terms.
    upper: one batch from D_f.
    weights: weights of the tasks in the mean of G, float32 [M]; None for equal
      ones.
    probe: batches from D_f for the updates of `guided` lengths; leaves
      [updates, ...], over tasks [M, updates, ...]. None: `upper` for all.
    scores: of the members of `population.evaluate`, the higher the better,
      float32 [Q, 2]; then the step on theta follows them alone. None: it
      follows the losses.
  """

  lower: Any
  penalty: Any
  upper: Any
  weights: jax.Array | None = None
  probe: Any = None
  scores: Any = None


class BilevelHParams(NamedTuple):
  """Hyper-parameters that are traced: changing them does not recompile.

  Attributes:
    zo_eps: smoothing radius eps of zeroth-order estimates, float32, shape [].
    penalty: weight lam of the penalty, float32, shape [].
  """

  zo_eps: jax.typing.ArrayLike = 1e-3
  penalty: jax.typing.ArrayLike = 1.0


class BilevelInfo(NamedTuple):
  """Metrics of one iteration; float32 unless noted.

  Over tasks, losses and the norm have a leading axis of tasks: [M, T] and [M].

  Attributes:
    lower_loss: L(theta, s) at each inner step, shape [T].
    upper_loss: L(theta, p; D_f), shape [].
    penalty_loss: L(theta, p; D_p), shape [].
    objective: mean of G over the probed points, shape [].
    coefficients: directional derivatives of G, shape [Q].
    num_nonfinite: number of directions dropped because G, or p's gradient, was
      not finite, int32 [].
    upper_grad_norm: norm of p's gradient, shape [].
    move: the in-place update of theta; None if `base_tx` does not update in
      place.
    aux: auxiliary output of L(theta, p; D_f), over tasks with a leading axis of
      tasks; None without `has_aux`.
    lengths: of the step along an adapter, see `guided`; None without.
    earlier: lengths along what the adapter had changed by in the iterations
      before, the latest first, shape [h - 1]; None without.
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
  lengths: Any = None
  earlier: Any = None


class BilevelAlgorithm(NamedTuple):
  """A pair of pure functions.

  Attributes:
    init: (key, base, upper, lower=None) -> BilevelState. s (`lower`) starts as
      a copy of p (`upper`) unless given.
    step: (state, batch, hparams) -> (BilevelState, BilevelInfo).
  """

  init: Callable[..., BilevelState]
  step: Callable[..., tuple[BilevelState, BilevelInfo]]
