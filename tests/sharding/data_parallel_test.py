"""What the devices of a data-parallel step tell each other: scalars."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import zofo_jax as zofo
from zofo_jax.core import directions, outer, perturbed, sampler, zo
from zofo_jax.models.decoder import STACKED
from zofo_jax.plan import hlo
from zofo_jax.sharding import dispatch, rules
from zofo_jax.sharding import mesh as mesh_lib

pytestmark = pytest.mark.many_devices

BATCH, EPS = 16, 0.05


def _exchanged(compiled):
  """Numbers of four bytes that each collective returns."""
  return [size // 4 for _, size, _ in hlo.collectives(compiled.as_text())]


def _base():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return {
    "embed": draw(64, 32),
    "layers": {"kernel": draw(2, 32, 32) / 6},
  }


def _batch():
  rng = np.random.default_rng(1)
  return {
    "ids": jnp.asarray(rng.integers(64, size=(BATCH, 5))),
    "label": jnp.asarray(rng.integers(64, size=BATCH)),
    "weight": jnp.asarray(rng.integers(1, 3, size=BATCH), jnp.float32),
  }


def _losses(base, batch):
  hidden = perturbed.take(base["embed"], batch["ids"]).mean(axis=-2)

  def layer(hidden, weights):
    return jnp.tanh(perturbed.dot(hidden, weights["kernel"])), None

  hidden, _ = jax.lax.scan(layer, hidden, base["layers"])
  rows = perturbed.take(base["embed"], batch["label"])
  picked = jnp.sum(hidden * rows, axis=-1)
  return perturbed.log_normalizer(hidden, base["embed"]) - picked


def _loss(base, batch):
  losses = _losses(base, batch)
  return jnp.sum(losses * batch["weight"]) / jnp.sum(batch["weight"])


def _step(kind, estimator, per_example, num_directions=2, **options):
  lazy = sampler.Sampler(kind, stacked=STACKED, lazy=True)
  tx = outer.sgd(1e-2, outer.scale_by_std(), weight_decay=0.1)

  def step(base, batch, key):
    if per_example:
      estimate = zo.estimate_per_example(
        lambda base, example: _losses(base, example),
        base,
        batch,
        key,
        EPS,
        zofo.ZerothOrder(lazy, estimator),
      )
    else:
      estimate = zo.estimate(
        lambda base: _loss(base, batch),
        base,
        key,
        EPS,
        zofo.ZerothOrder(
          lazy, estimator, num_directions=num_directions, **options
        ),
      )
    base, _ = tx.update(base, tx.init(base), estimate, lazy, None, key)
    return base, estimate.coefficients

  return step


def _assert_as_on_one_device(results, step):
  """Compares (weights, coefficients) with what a step gives on one device."""
  moved, coefficients = results
  one, expected = jax.jit(step)(_base(), _batch(), jax.random.key(0))
  # A few ulps of a loss, in another order, over eps.
  atol = 16 * 2.0**-23 * 6 / EPS
  np.testing.assert_allclose(coefficients, expected, rtol=1e-4, atol=atol)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4),
    moved,
    one,
  )


@pytest.mark.parametrize(
  "kind, estimator, per_example",
  [
    pytest.param(directions.PerExample(), zo.central, True, id="per_example"),
    # Each part of these is in the first, or in the test of groups.
    pytest.param(
      *(directions.Sparse(), zo.forward, False),
      id="sparse",
      marks=pytest.mark.slow,
    ),
    pytest.param(
      *(directions.Rademacher(), zo.central, False),
      id="rademacher",
      marks=pytest.mark.slow,
    ),
    pytest.param(
      *(directions.LowRank(2), zo.central, False),
      id="low_rank",
      marks=pytest.mark.slow,
    ),
    pytest.param(
      *(directions.Rademacher(), zo.exact, False),
      id="exact",
      marks=pytest.mark.slow,
    ),
  ],
)
def test_devices_exchange_scalars_alone(kind, estimator, per_example):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  everywhere, split = (NamedSharding(mesh, spec) for spec in (P(), P("data")))
  step = _step(kind, estimator, per_example)
  base, key = jax.device_put((_base(), jax.random.key(0)), everywhere)
  batch = jax.device_put(_batch(), split)
  run = jax.jit(step, donate_argnums=0, out_shardings=everywhere)
  compiled = run.lower(base, batch, key).compile()
  sizes = _exchanged(compiled)
  # Losses at two points and a total weight; or the losses of the examples.
  assert sizes and max(sizes) <= (2 * BATCH if per_example else 3)
  assert sum(sizes) <= (4 * BATCH if per_example else 8)

  _assert_as_on_one_device(compiled(base, batch, key), step)


def test_groups_of_directions_exchange_scalars_alone():
  mesh = mesh_lib.make({"pert": 4, "data": 2, "fsdp": 1, "model": 1})
  everywhere = rules.replicated(mesh)
  rademacher = directions.Rademacher()
  plain = _step(rademacher, zo.central, False, 8)
  step = _step(
    *(rademacher, zo.central, False, 8), map_fn=dispatch.map_directions(mesh)
  )
  base, key = jax.device_put((_base(), jax.random.key(0)), everywhere)
  batch = dispatch.shard_batch(mesh, _batch())
  run = jax.jit(step, donate_argnums=0, out_shardings=everywhere)
  compiled = run.lower(base, batch, key).compile()
  sizes = _exchanged(compiled)
  # Losses at two points, a total weight; then 8 coefficients, 16 values, keys.
  assert sizes and max(sizes) <= 16
  assert sum(sizes) <= 128
  # The groups work at once, each on two of the directions.
  assert max(times for _, _, times in hlo.collectives(compiled.as_text())) == 2

  _assert_as_on_one_device(compiled(base, batch, key), plain)
