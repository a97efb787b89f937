"""Answers of a population on a grid of devices."""

import jax
import numpy as np
import pytest

from zofo_jax.builders import model as model_lib
from zofo_jax.builders import reward as reward_lib
from zofo_jax.core import directions, sampler, zeroth_order
from zofo_jax.core import keys as keys_lib
from zofo_jax.data import batching
from zofo_jax.models.decoder import STACKED
from zofo_jax.sharding import mesh as mesh_lib

ONE = {"pert": 1, "data": 1, "fsdp": 1, "model": 1}


def answers(folder, sizes):
  """Writes after four prompts by four directions."""
  mesh = mesh_lib.make(sizes)
  model = model_lib.load_model(str(folder), mesh=mesh)
  zo = zeroth_order.ZerothOrder(
    sampler.Sampler(directions.LowRank(1), stacked=STACKED, lazy=True),
    num_directions=4,
  )
  reward = reward_lib.make_reward(
    model,
    zo,
    mesh,
    train_base=True,
    alone=True,
    max_new_tokens=4,
    stop=(),
    functions=("length",),
    weights=(),
    directions_at_once=0,
    pattern="",
    keys=(),
    max_words=1,
    num_samples=0,
    temperature=1.0,
  )
  prompts = [[5, 6, 7], [8] * 7, [9, 10], [11]]
  tokens, mask = batching.collate_prompts(prompts, 8, pad=model.pad)
  return reward.answer_fn(
    model_lib.load_base(model, mesh),
    {},
    keys_lib.seed_key(0),
    np.int32(3),
    0.1,
    tokens,
    mask,
    np.arange(4, dtype=np.uint32),
  )


@pytest.mark.slow
@pytest.mark.many_devices
def test_a_population_writes_the_same_on_a_mesh(tiny_model):
  """Members are divided, as are prompts and weights."""
  expected = answers(tiny_model, ONE)
  actual = answers(tiny_model, ONE | {"pert": 2, "data": 2, "model": 2})
  assert actual.tokens.shape == (4, 2, 4, 4)
  assert len(np.unique(expected.tokens.reshape(8, -1), axis=0)) > 1
  jax.tree.map(np.testing.assert_array_equal, actual, expected)
