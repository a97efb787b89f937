"""What a run is trained by, if by rewards: functions, and answers to score."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from zofo_jax.builders import base_update
from zofo_jax.builders import model as model_lib
from zofo_jax.core import factors, population, zeroth_order
from zofo_jax.core import keys as keys_lib
from zofo_jax.core.types import BilevelState
from zofo_jax.evaluation import generation, rewards
from zofo_jax.sharding import dispatch
from zofo_jax.sharding import mesh as mesh_lib

SHAPINGS: dict[str, population.Shaping] = {
  "none": population.unshaped,
  "ranks": population.centered_ranks,
  "z_score": population.z_scores,
}
# (base, adapter, key of the run, step, eps, tokens [B, L], mask [B, L],
# numbers of the rows [B]) -> Generated, leaves [Q, 2, B, ...].
AnswerFn = Callable[..., generation.Generated]


class Reward(NamedTuple):
  """What a run is trained by.

  Attributes:
    functions: score answers.
    write_fn: writes the answers of a population; not jitted.
    answer_fn: the same, jitted for the mesh and host arrays of rows.
    members_at_once: how many members of the population write at the same time.
    num_samples: prompts of each step whose answers are written to a file.
    alone: whether it is trained by nothing else, such as the rows' answers.
  """

  functions: rewards.Rewards
  write_fn: AnswerFn
  answer_fn: AnswerFn
  members_at_once: int
  num_samples: int
  alone: bool

  def answer(
    self, state: BilevelState, eps: jax.typing.ArrayLike, *rows: Any
  ) -> generation.Generated:
    """Writes the answers of a state's population.

    Args:
      state: before the step.
      eps: distance of the members from it.
      *rows: tokens [B, L], mask [B, L] and numbers of the rows [B].

    Returns:
      Answers, leaves [Q, 2, B, ...].
    """
    return self.answer_fn(
      state.base, state.upper, state.key, state.step, eps, *rows
    )


def num_at_once(
  directions_at_once: int, zo: zeroth_order.ZerothOrder, train_base: bool
) -> int:
  """Returns how many directions' members write at the same time.

  Args:
    directions_at_once: this many; 0 for all of them, or one where members share
      no products with theta.
    zo: of steps on theta; its directions are those of the population.
    train_base: whether the backbone is perturbed; else the adapter.
  """
  shares_products = not train_base or factors.draws(zo.sampler.direction)
  return directions_at_once or (zo.num_directions if shares_products else 1)


def make_reward(
  model: model_lib.Model,
  zo: zeroth_order.ZerothOrder,
  mesh: mesh_lib.AnyMesh,
  *,
  train_base: bool,
  alone: bool,
  max_new_tokens: int,
  stop: Sequence[str],
  chat: bool = False,
  functions: Sequence[str],
  weights: Sequence[float],
  directions_at_once: int,
  pattern: str,
  json_keys: Sequence[str],
  max_words: int,
  num_samples: int,
  temperature: float,
) -> Reward:
  """Makes what `config.reward` describes.

  Args:
    model: writes the answers.
    zo: of steps on theta; its directions are those of the population.
    mesh: the mesh of devices.
    train_base: whether the backbone is perturbed; else the adapter.
    alone: see `Reward`.
    max_new_tokens: longest answer.
    stop: strings that end an answer.
    chat: as for `model.make_generate_fn`.
    functions: names of reward functions.
    weights: of the functions; () for 1.
    directions_at_once: see `num_at_once`.
    pattern: see `rewards.Options`.
    json_keys: see `rewards.Options`.
    max_words: see `rewards.Options`.
    num_samples: see `Reward`.
    temperature: of the answers.

  Raises:
    UserError: there is no such function.
  """
  generate_fn = model_lib.make_generate_fn(
    model,
    max_new_tokens=max_new_tokens,
    stop=stop,
    chat=chat,
    temperature=temperature,
  )
  if not train_base:
    zo = base_update.of_adapter(zo)
  at_once = num_at_once(directions_at_once, zo, train_base)
  zo = dataclasses.replace(zo, map_fn=dispatch.map_directions(mesh, at_once))

  def answer(base, adapter, key, step, eps, tokens, mask, numbers):
    def write(params, key):
      trees = (params, adapter) if train_base else (base, params)
      row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
      return generate_fn(*trees, tokens, mask, row_keys)

    step_keys = keys_lib.step_keys(key, step, zo.subspace_steps)
    params = base if train_base else adapter
    return population.evaluate(write, params, step_keys, eps, zo)

  options = rewards.Options(pattern, tuple(json_keys), max_words)
  return Reward(
    rewards.Rewards(functions, weights, options),
    answer,
    dispatch.jit_on_batches(answer, mesh, 5),
    2 * min(at_once, zo.num_directions),
    num_samples,
    alone,
  )
