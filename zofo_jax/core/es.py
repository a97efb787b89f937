"""Evolution strategies: descent by the scores of a population.

A step evaluates a function at pairs of points theta + eps z_q and theta - eps
z_q, has their outputs scored outside of the program, and moves theta towards
the better ones; see `population`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from zofo_jax.core import checks, mezo, outer, population, types
from zofo_jax.core import keys as keys_lib
from zofo_jax.core.zeroth_order import ZerothOrder


class EsAlgorithm(NamedTuple):
  """Three pure functions; the scores are computed between the last two.

  Attributes:
    init: (key, params) -> MezoState.
    evaluate: (state, batch, hparams) -> outputs, leaves [Q, 2, ...].
    update: (state, scores [Q, 2], hparams) -> (MezoState, MezoInfo).
  """

  init: Callable[..., mezo.MezoState]
  evaluate: Callable[..., Any]
  update: Callable[..., tuple[mezo.MezoState, mezo.MezoInfo]]


def es_step(
  state: mezo.MezoState,
  scores: jax.Array,
  hparams: types.BilevelHParams = types.BilevelHParams(),
  *,
  tx: outer.OuterTransform | optax.GradientTransformation,
  zo: ZerothOrder = ZerothOrder(),
  shaping: population.Shaping = population.unshaped,
) -> tuple[mezo.MezoState, mezo.MezoInfo]:
  """Takes a step by the scores of a population; to be jitted by the caller.

  Donate `state` for the update to happen in place.

  Args:
    state: the one at which the population was evaluated.
    scores: of its members, the higher the better; float32, shape [Q, 2].
    hparams: reads `zo_eps`, the same as for the evaluation.
    tx: update of the parameters, which can be neither `outer.conservative` nor
      `outer.write_every`.
    zo: as for the evaluation.
    shaping: what takes the scores' place; see `population.estimate`.

  Returns:
    The new state and the metrics of the step; its loss is minus the mean score.
  """
  outer.check_writes(tx, "scores from outside of the program read")
  step_keys = keys_lib.step_keys(state.key, state.step, zo.subspace_steps)
  estimate = population.estimate(scores, step_keys, hparams.zo_eps, shaping)
  return mezo.apply_estimate(
    state, estimate, population.no_objective, step_keys, tx, zo
  )


def make_es_step(
  fn: Callable[[types.Params, types.PyTree, jax.Array], Any],
  tx: outer.OuterTransform | optax.GradientTransformation,
  zo: ZerothOrder = ZerothOrder(),
  *,
  shaping: population.Shaping = population.unshaped,
) -> EsAlgorithm:
  """Binds a function and an update into (init, evaluate, update).

  Args:
    fn: (params, batch, key) -> what is scored, any pytree of arrays; the key is
      the same for all members of a step.
    tx: update of the parameters: `outer.sgd` (in place), or any optax
      transformation.
    zo: sampler and number of directions; two members each.
    shaping: see `population.estimate`.

  Returns:
    The algorithm. `evaluate` and `update` are not jitted.

  Raises:
    ValueError: in `init`, the parameters are not arrays or do not fit the
      sampler.

  Examples:
    >>> import jax, jax.numpy as jnp, numpy as np
    >>> import zofo_jax as zofo
    >>> write = lambda params, batch, key: jnp.round(params["w"])
    >>> algorithm = zofo.make_es_step(
    ...   write, zofo.outer.sgd(0.3), zofo.ZerothOrder(num_directions=16))
    >>> state = algorithm.init(zofo.keys.seed_key(0), {"w": jnp.zeros(3)})
    >>> hparams = zofo.BilevelHParams(zo_eps=0.5)
    >>> evaluate = jax.jit(algorithm.evaluate)
    >>> update = jax.jit(algorithm.update, donate_argnums=0)
    >>> for _ in range(60):
    ...   written = np.asarray(evaluate(state, (), hparams))  # [16, 2, 3]
    ...   scores = -np.abs(written - 2.0).sum(axis=-1)
    ...   state, info = update(state, scores, hparams)
    >>> np.round(state.params["w"]).tolist()
    [2.0, 2.0, 2.0]
  """
  checks.check_arguments(fn, "fn", ("params", "batch", "key"))
  transform = outer.to_outer_transform(tx)

  def evaluate(state, batch, hparams=types.BilevelHParams()):
    return population.evaluate(
      lambda params, key: fn(params, batch, key),
      state.params,
      keys_lib.step_keys(state.key, state.step, zo.subspace_steps),
      hparams.zo_eps,
      zo,
    )

  def update(state, scores, hparams=types.BilevelHParams()):
    return es_step(state, scores, hparams, tx=transform, zo=zo, shaping=shaping)

  return EsAlgorithm(mezo.make_init(transform, zo), evaluate, update)
