"""The algorithm of a run: its (init, step) pair, with explicit arguments."""

import dataclasses
from collections.abc import Callable

import ml_collections

from zofo_jax.builders import base_update as base_update_lib
from zofo_jax.builders import optimizers
from zofo_jax.builders import reward as reward_lib
from zofo_jax.config import methods
from zofo_jax.core import baselines, bilevel
from zofo_jax.core.types import BilevelAlgorithm, BilevelHParams, LossFn


def make_hparams_fn(
  *, eps: float, penalty: float, penalty_schedule: str, num_steps: int
) -> Callable[[int], BilevelHParams]:
  """Makes the function from an iteration's number to its traced numbers.

  Args:
    eps: radius of the finite difference.
    penalty: lambda.
    penalty_schedule: "constant", or "linear": penalty * (number + 1) /
      num_steps.
    num_steps: outer iterations of the run.
  """

  def hparams(number):
    scale = (number + 1) / num_steps if penalty_schedule == "linear" else 1.0
    return BilevelHParams(zo_eps=float(eps), penalty=float(penalty) * scale)

  return hparams


def make_algorithm(
  config: ml_collections.ConfigDict,
  base_update: base_update_lib.BaseUpdate,
  loss_fn: LossFn,
  probe_loss_fn: LossFn | None = None,
  *,
  over_tasks: bool = False,
) -> BilevelAlgorithm:
  """Makes the (init, step) pair of `config.method`.

  Args:
    config: the run's config.
    base_update: how theta is updated.
    loss_fn: of the first-order steps, and of theta by default.
    probe_loss_fn: of the zeroth-order step; None for `loss_fn`.
    over_tasks: whether states and batches have a leading axis of tasks.
  """
  shaping = reward_lib.SHAPINGS[config.reward.shaping]
  num_steps = config.train.num_steps

  def level_tx(level, num_updates):
    rate = optimizers.make_schedule(
      level.schedule, level.learning_rate, num_updates
    )
    return optimizers.make_optimizer(level.optimizer, rate, level.clip_norm)

  lower_tx = level_tx(config.lower, num_steps * config.lower.num_steps)
  upper_tx = level_tx(config.upper, num_steps)
  if config.method == "bilevel":
    return bilevel.make_bilevel_step(
      loss_fn,
      probe_loss_fn=probe_loss_fn,
      lower_tx=lower_tx,
      upper_tx=upper_tx,
      base_tx=base_update.tx,
      zo=dataclasses.replace(
        base_update.zo,
        per_example="per_example"
        in (config.zo.direction, config.guided.random),
      ),
      guide=base_update.guide,
      shaping=shaping,
      over_tasks=over_tasks,
    )

  def peft(train_base: bool = False) -> BilevelAlgorithm:
    return baselines.make_first_order_step(
      loss_fn,
      lower_tx,
      train_base=train_base,
      over_tasks=over_tasks,
    )

  def mezo(train_base: bool = True) -> BilevelAlgorithm:
    by_reward = methods.METHODS[config.method].by_reward
    return baselines.make_zeroth_order_step(
      None if by_reward else probe_loss_fn or loss_fn,
      base_update.tx,
      base_update.zo
      if train_base
      else base_update_lib.of_adapter(base_update.zo),
      train_base=train_base,
      over_tasks=over_tasks,
      shaping=shaping,
    )

  num_first = config.train.num_first_steps
  make = {
    "peft": peft,
    "full": lambda: peft(train_base=True),
    "mezo": mezo,
    "mezo_peft": lambda: mezo(train_base=False),
    "es": mezo,
    "es_peft": lambda: mezo(train_base=False),
    "peft_then_mezo": lambda: baselines.two_stage(peft(), mezo(), num_first),
    "mezo_then_peft": lambda: baselines.two_stage(mezo(), peft(), num_first),
  }
  return make[config.method]()
