"""The passes of an iteration, and what it copies."""

import jax
import jax.numpy as jnp

from zofo_jax.builders import budget
from zofo_jax.config import defaults
from zofo_jax.core import offload


def test_passes_of_every_estimator():
  config = defaults.base_config()
  config.lower.num_steps = 5
  config.zo.num_directions = 3
  counted = {}
  for config.zo.estimator in defaults.FIELDS["zo.estimator"].check.choices:
    counted[config.zo.estimator] = budget.make_budget(config).passes()[:2]
  assert counted == {
    "central": (5 + 2 + 3 * 6, 7),
    "forward": (5 + 2 + 3 * 4, 7),
    "exact": (5 + 2 + 3 * 6, 7),
  }


def test_transfers_count_every_time_that_a_loop_copies():
  host = jax.sharding.NamedSharding(
    jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]),
    jax.sharding.PartitionSpec(),
    memory_kind=offload.MEMORY_KIND,
  )
  kernels = jax.ShapeDtypeStruct((5, 8, 8), jnp.bfloat16, sharding=host)
  x = jax.ShapeDtypeStruct((3, 8), jnp.bfloat16)

  @jax.checkpoint
  def layer(x, kernel):
    return jnp.tanh(x @ offload.fetch(kernel)), None

  def loss(x, kernels):
    return jax.lax.scan(layer, x, kernels)[0].sum()

  def step(x, kernels):
    def inner(x, _):
      return jax.grad(loss)(x, kernels), None

    x, _ = jax.lax.scan(inner, x, length=3)
    return x, offload.move_like(x, kernels)

  copied = budget.transfers(step, x, kernels)
  # Forward and backward passes of three steps, in two bytes.
  assert copied == (3 * 2 * 5 * 8 * 8 * 2, 3 * 8 * 2)
