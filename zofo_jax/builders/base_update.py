"""How a run moves theta: directions, estimate, update, and what it follows."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from zofo_jax import adapters, errors
from zofo_jax.builders import optimizers
from zofo_jax.core import (
  directions,
  estimators,
  guided,
  outer,
  sampler,
  zeroth_order,
)
from zofo_jax.core import tree as tree_lib
from zofo_jax.models.decoder import STACKED

ESTIMATORS = {
  "central": estimators.central,
  "forward": estimators.forward,
  "exact": estimators.exact,
}


def make_sampler(
  direction: str,
  *,
  rank: int,
  threshold: float,
  select: str = "",
  layers: Sequence[int] = (),
) -> sampler.Sampler:
  """Makes a lazy sampler of directions.

  Args:
    direction: one of `zo.direction`'s choices.
    rank: of "low_rank".
    threshold: of "sparse".
    select: regular expression for the paths of the weights to update.
    layers: indices of the layers to update; () for all.
  """
  kinds: dict[str, directions.Direction] = {
    "gaussian": directions.Gaussian(),
    "rademacher": directions.Rademacher(),
    "low_rank": directions.LowRank(rank),
    "per_example": directions.PerExample(),
    "sparse": directions.Sparse(threshold=threshold),
  }
  return sampler.Sampler(
    kinds[direction],
    select=lambda path: bool(re.search(select, path)),
    layers=tuple(layers) or None,
    stacked=STACKED,
    lazy=True,
  )


def check_selected(
  select: str, layer_numbers: Sequence[int], base: Any
) -> None:
  """Raises if `zo.select` or `zo.layers` name weights that do not exist.

  Args:
    select: regular expression on paths of weights.
    layer_numbers: layers that are perturbed; () for all.
    base: the backbone's weights, or their shapes.

  Raises:
    UserError: lists the valid paths or numbers.
  """
  shapes = {
    name: leaf.shape
    for name, leaf in tree_lib.named_leaves(base).items()
    if jnp.issubdtype(leaf.dtype, jnp.floating)  # integers never move
  }
  if not any(re.search(select, path) for path in shapes):
    raise errors.UserError(
      f"config.zo.select: '{select}' matches no weight; the weights are "
      f"{', '.join(shapes)}."
    )
  depth = next(
    shape[0] for path, shape in shapes.items() if re.search(STACKED, path)
  )
  invalid = any(i not in range(depth) for i in layer_numbers)
  if invalid or len(set(layer_numbers)) < len(layer_numbers):
    raise errors.UserError(
      f"config.zo.layers: expected different numbers from 0 to {depth - 1}; "
      f"found {tuple(layer_numbers)}."
    )


def make_base_tx(
  optimizer: str,
  learning_rate: float,
  *,
  scaling: str = "none",
  clip: float = 0.0,
  weight_decay: float = 0.0,
) -> outer.OuterTransform:
  """Makes the update of theta.

  Args:
    optimizer: one of `zo.optimizer`'s choices.
    learning_rate: of the update.
    scaling: of the coefficients: "none", "sign", "std" or "running_rms".
    clip: largest coefficient; 0 for no limit.
    weight_decay: of "sgd".
  """
  scalings = [outer.clip(clip)] if clip else []
  if scaling != "none":
    scale = {
      "sign": outer.sign,
      "std": outer.scale_by_std,
      "running_rms": outer.scale_by_running_rms,
    }[scaling]
    scalings.append(scale())
  if optimizer == "conservative":
    return outer.conservative(learning_rate)
  if optimizer == "sgd":
    return outer.sgd(learning_rate, *scalings, weight_decay=weight_decay)
  return outer.from_optax(
    optimizers.make_optimizer(optimizer, learning_rate), *scalings
  )


def make_guide(
  lengths: str,
  zo: zeroth_order.ZerothOrder,
  *,
  per_matrix: bool,
  per_task: bool,
  num_updates: int,
  learning_rate: float,
  radius: float,
  largest: float,
  penalty: bool,
  reset: bool,
  history: int,
  random: str,
) -> guided.Guide:
  """Makes the step of theta along what s has learned, for LoRA.

  Args:
    lengths: one of `guided.lengths`' choices.
    zo: estimator and number of directions of "descend".
    per_matrix: whether every matrix has its own length; "descend" only.
    per_task: whether every task has; "descend" only.
    num_updates: of "descend".
    learning_rate: of "descend".
    radius: of "descend".
    largest: length that is not exceeded.
    penalty: whether lengths are chosen by L(p; D_p) as well.
    reset: whether the moments of s are set to 0.
    history: displacements of s along which theta moves; "descend" only.
    random: kind of the directions along which theta moves as well, or "".
  """
  rules = {
    "all": guided.constant,
    "parabola": lambda: guided.parabola(largest=largest),
    "descend": lambda: guided.descend(
      zeroth_order.ZerothOrder(
        directions.Rademacher(),
        estimator=zo.estimator,
        num_directions=zo.num_directions,
      ),
      num_updates=num_updates,
      learning_rate=learning_rate,
      radius=radius,
      largest=largest,
    ),
  }
  return guided.Guide(
    adapters.fold_lora,
    rules[lengths](),
    per_matrix=per_matrix and lengths == "descend",
    per_task=per_task and lengths == "descend",
    stacked=STACKED,
    penalty=penalty,
    random=bool(random),
    reset=reset,
    history=history,
  )


class BaseUpdate(NamedTuple):
  """How theta's gradient is estimated, and theta updated.

  Attributes:
    zo: the estimate; never one direction per example.
    tx: the update.
    guide: how theta follows s; None if it does not.
  """

  zo: zeroth_order.ZerothOrder
  tx: outer.OuterTransform
  guide: guided.Guide | None = None


def make_base_update(
  config: ml_collections.ConfigDict,
  map_fn: zeroth_order.MapFn = jax.lax.map,
) -> BaseUpdate:
  """Makes the zeroth-order update of `config.zo` and `config.guided`.

  Args:
    config: the run's config.
    map_fn: evaluates the directions; see `ZerothOrder`.
  """
  zo_config, follows = config.zo, config.zo.direction == "guided"
  kind = zo_config.direction
  if follows:
    kind = config.guided.random or "rademacher"
  tx = make_base_tx(
    zo_config.optimizer,
    zo_config.learning_rate,
    scaling=zo_config.scaling,
    clip=zo_config.clip,
    weight_decay=zo_config.weight_decay,
  )
  if zo_config.write_every > 1:
    tx = outer.write_every(zo_config.write_every, tx, zo_config.num_directions)
  update = BaseUpdate(
    zeroth_order.ZerothOrder(
      make_sampler(
        kind,
        rank=zo_config.rank,
        threshold=zo_config.threshold,
        select=zo_config.select,
        layers=zo_config.layers,
      ),
      estimator=ESTIMATORS[zo_config.estimator],
      num_directions=zo_config.num_directions,
      subspace_steps=zo_config.frame_steps,
      map_fn=map_fn,
    ),
    tx,
  )
  if follows:
    options = config.guided
    guide = make_guide(
      options.lengths,
      update.zo,
      per_matrix=options.per_matrix,
      per_task=options.per_task,
      num_updates=options.num_updates,
      learning_rate=options.learning_rate,
      radius=options.radius,
      largest=options.largest,
      penalty=options.penalty,
      reset=options.reset,
      history=options.history,
      random=options.random,
    )
    update = update._replace(guide=guide)
  return update


def of_adapter(zo: zeroth_order.ZerothOrder) -> zeroth_order.ZerothOrder:
  """Returns the estimate along the same directions of an adapter.

  Adapters are small, and their code reads plain arrays.

  Args:
    zo: the estimate of theta.
  """
  adapter_sampler = sampler.Sampler(
    zo.sampler.direction, stacked=STACKED, lazy=False
  )
  return dataclasses.replace(zo, sampler=adapter_sampler)
