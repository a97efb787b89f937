"""A config turned into an algorithm.

Everything that the config says becomes an explicit argument here.
"""

import dataclasses
import re
from typing import Any, Literal

import jax
import ml_collections
import optax

from zofo_jax import errors
from zofo_jax.core import (
  baselines,
  bilevel,
  directions,
  estimators,
  outer,
  sampler,
  zeroth_order,
)
from zofo_jax.core import tree as tree_lib
from zofo_jax.core.types import BilevelAlgorithm, BilevelHParams, LossFn
from zofo_jax.models.decoder import STACKED


def make_schedule(
  name: str, learning_rate: float, num_updates: int
) -> optax.ScalarOrSchedule:
  """Makes a learning rate: constant, or falling to 0 over the run's updates."""
  if name == "linear":
    return optax.linear_schedule(learning_rate, 0.0, num_updates)
  if name == "cosine":
    return optax.cosine_decay_schedule(learning_rate, num_updates)
  return learning_rate


def make_optimizer(
  name: str, learning_rate: optax.ScalarOrSchedule, clip_norm: float = 0.0
) -> optax.GradientTransformation:
  """Makes an optax transformation whose learning rate lives in its state.

  Args:
    name: one of `config.OPTIMIZERS`.
    learning_rate: a number, traced, so that it can change freely, or a
      schedule.
    clip_norm: largest global norm of the gradient; 0 for no limit.

  Returns:
    The transformation.
  """
  factory = {
    "sgd": optax.sgd,
    "momentum": lambda learning_rate: optax.sgd(learning_rate, momentum=0.9),
    "adam": optax.adam,
    "adamw": optax.adamw,
  }[name]
  tx = optax.inject_hyperparams(factory)(learning_rate=learning_rate)
  if clip_norm:
    tx = optax.chain(optax.clip_by_global_norm(clip_norm), tx)
  return tx


ESTIMATORS = {
  "central": estimators.central,
  "forward": estimators.forward,
  "exact": estimators.exact,
}


def make_sampler(zo_config: ml_collections.ConfigDict) -> sampler.Sampler:
  """Makes the directions that `config.zo` asks for."""
  kinds: dict[str, directions.Direction] = {
    "gaussian": directions.Gaussian(),
    "rademacher": directions.Rademacher(),
    "low_rank": directions.LowRank(zo_config.rank),
    "per_example": directions.PerExample(),
    "sparse": directions.Sparse(threshold=zo_config.threshold),
  }
  return sampler.Sampler(
    kinds[zo_config.direction],
    select=lambda path: bool(re.search(zo_config.select, path)),
    layers=tuple(zo_config.layers) or None,
    stacked=STACKED,
    lazy=True,
  )


def make_zeroth_order(
  zo_config: ml_collections.ConfigDict,
  *,
  per_example: bool = False,
  map_fn: zeroth_order.MapFn = jax.lax.map,
) -> zeroth_order.ZerothOrder:
  """Returns how `config.zo` estimates a gradient.

  Args:
    zo_config: `config.zo`.
    per_example: perturb every example along its own direction.
    map_fn: evaluates the directions; see `ZerothOrder`.
  """
  return zeroth_order.ZerothOrder(
    make_sampler(zo_config),
    estimator=ESTIMATORS[zo_config.estimator],
    num_directions=zo_config.num_directions,
    per_example=per_example,
    subspace_steps=zo_config.frame_steps,
    map_fn=map_fn,
  )


def check_sampler(zo_config: ml_collections.ConfigDict, base: Any) -> None:
  """Stops where `zo.select` or `zo.layers` name nothing that is there.

  Args:
    zo_config: `config.zo`.
    base: the backbone's weights, or their shapes.

  Raises:
    UserError: says what there is.
  """
  shapes = {
    name: leaf.shape for name, leaf in tree_lib.named_leaves(base).items()
  }
  if not any(re.search(zo_config.select, path) for path in shapes):
    raise errors.UserError(
      f"config.zo.select: '{zo_config.select}' matches no weight; the weights "
      f"are {', '.join(shapes)}."
    )
  stacked = [
    shape for path, shape in shapes.items() if re.search(STACKED, path)
  ]
  wrong = [i for i in zo_config.layers if i not in range(stacked[0][0])]
  if wrong or len(set(zo_config.layers)) < len(zo_config.layers):
    raise errors.UserError(
      "config.zo.layers: expected different numbers from 0 to "
      f"{stacked[0][0] - 1}; found {tuple(zo_config.layers)}."
    )


def make_base_tx(zo_config: ml_collections.ConfigDict) -> outer.OuterTransform:
  """Makes the update of theta that `config.zo` asks for."""
  scalings = [outer.clip(zo_config.clip)] if zo_config.clip else []
  if zo_config.scaling != "none":
    scale = {
      "sign": outer.sign,
      "std": outer.scale_by_std,
      "running_rms": outer.scale_by_running_rms,
    }[zo_config.scaling]
    scalings.append(scale())
  rate = zo_config.learning_rate
  if zo_config.optimizer == "conservative":
    return outer.conservative(rate)
  if zo_config.optimizer == "sgd":
    return outer.sgd(rate, *scalings, weight_decay=zo_config.weight_decay)
  return outer.from_optax(make_optimizer(zo_config.optimizer, rate), *scalings)


def make_level_tx(
  config: ml_collections.ConfigDict, name: Literal["lower", "upper"]
) -> optax.GradientTransformation:
  """Makes the optimizer of s ("lower") or p ("upper"), for a whole run."""
  level = config[name]
  updates = config.lower.num_steps if name == "lower" else 1
  rate = make_schedule(
    level.schedule, level.learning_rate, config.train.num_steps * updates
  )
  return make_optimizer(level.optimizer, rate, level.clip_norm)


def make_hparams(
  config: ml_collections.ConfigDict, number: int
) -> BilevelHParams:
  """Makes the numbers that are traced, of the iteration of this number.

  A linear lambda is penalty * (number + 1) / num_steps.
  """
  penalty = float(config.penalty)
  if config.penalty_schedule == "linear":
    penalty *= (number + 1) / config.train.num_steps
  return BilevelHParams(zo_eps=float(config.zo.eps), penalty=penalty)


def make_algorithm(
  config: ml_collections.ConfigDict,
  loss_fn: LossFn,
  probe_loss_fn: LossFn | None = None,
  *,
  over_tasks: bool = False,
  map_fn: zeroth_order.MapFn = jax.lax.map,
) -> BilevelAlgorithm:
  """Makes the (init, step) pair of `config.method`."""
  if config.method == "bilevel":
    return bilevel.make_bilevel_step(
      loss_fn,
      probe_loss_fn=probe_loss_fn,
      lower_tx=make_level_tx(config, "lower"),
      upper_tx=make_level_tx(config, "upper"),
      base_tx=make_base_tx(config.zo),
      zo=make_zeroth_order(
        config.zo,
        per_example=config.zo.direction == "per_example",
        map_fn=map_fn,
      ),
      over_tasks=over_tasks,
    )

  def peft(train_base: bool = False) -> BilevelAlgorithm:
    tx = make_level_tx(config, "lower")
    return baselines.make_first_order_step(
      loss_fn, tx, train_base=train_base, over_tasks=over_tasks
    )

  def mezo(train_base: bool = True) -> BilevelAlgorithm:
    zo = make_zeroth_order(config.zo, map_fn=map_fn)
    if not train_base:
      # Adapters are small, and their code reads plain arrays.
      adapter_sampler = sampler.Sampler(
        zo.sampler.direction, stacked=STACKED, lazy=False
      )
      zo = dataclasses.replace(zo, sampler=adapter_sampler)
    return baselines.make_zeroth_order_step(
      probe_loss_fn or loss_fn,
      make_base_tx(config.zo),
      zo,
      train_base=train_base,
      over_tasks=over_tasks,
    )

  num_first = config.train.num_first_steps
  make = {
    "peft": peft,
    "full": lambda: peft(train_base=True),
    "mezo": mezo,
    "mezo_peft": lambda: mezo(train_base=False),
    "peft_then_mezo": lambda: baselines.two_stage(peft(), mezo(), num_first),
    "mezo_then_peft": lambda: baselines.two_stage(mezo(), peft(), num_first),
  }
  return make[config.method]()
