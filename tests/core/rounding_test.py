"""Writes to half precision: unbiased, and no signal lost."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zofo_jax.core import directions, rounding
from zofo_jax.core import keys as keys_lib
from zofo_jax.core import sampler as sampler_lib

STACKED = r"(^|/)layers/"

RADEMACHER = directions.Rademacher()
HALF = [jnp.bfloat16, jnp.float16]


def _keys(count, seed=0):
  direction_key, subspace_key = jax.random.split(jax.random.key(seed))
  return keys_lib.DirectionKey(
    jax.random.split(direction_key, count), subspace_key
  )


@functools.partial(jax.jit, static_argnums=0)
def _add(sampler, *arguments, **options):
  return sampler.apply_directions(*arguments, **options)


@pytest.mark.parametrize("dtype", HALF)
def test_stochastic_rounding_is_exact_on_average(dtype):
  values = np.array([0.3, -0.02, 1.0, 1.0 + 1e-4, -3e-6, 0.0, 5.5], np.float32)
  count = 20_000
  block = jnp.asarray(np.tile(values, (count, 1)))
  rounded = jax.jit(rounding.stochastic_round, static_argnums=1)(
    block, jnp.dtype(dtype), jax.random.key_data(jax.random.key(0))
  )
  assert rounded.dtype == dtype
  exact = np.array(rounded, np.float64)
  error = np.abs(exact.mean(axis=0) - values)
  assert np.all(error <= 4.5 * exact.std(axis=0) / math.sqrt(count) + 1e-12)
  # Only the two neighbours, and the number itself where there is none.
  nearest = np.array(jnp.asarray(values).astype(dtype), np.float64)
  exactly = nearest == values
  assert exactly.sum() >= 3  # 1.0, 0.0 and 5.5
  for column, value, same in zip(exact.T, values, exactly):
    assert len(np.unique(column)) == (1 if same else 2)
    assert column.min() <= value <= column.max()


@pytest.mark.parametrize("dtype", HALF)
def test_writes_round_each_weight_by_itself(dtype):
  # Steps of a quarter of the spacing at 1: a quarter of the weights move.
  spacing = float(jnp.finfo(dtype).eps)
  tree = {
    "a": jnp.ones((50, 40), dtype),
    "b": jnp.ones((50, 40), dtype),
    "layers": {"c": jnp.ones((3, 50, 40), dtype)},
  }
  sampler = sampler_lib.Sampler(RADEMACHER, stacked=STACKED)
  keys, weights = _keys(1), jnp.array([spacing / 4])
  to_nearest = _add(sampler, tree, keys, weights)
  z = jax.jit(sampler.weighted_sum)(tree, keys, jnp.ones(1))
  rows = []
  for seed in (1, 2):
    moved = _add(
      sampler, tree, keys, weights, rounding_key=jax.random.key(seed)
    )
    for new, sign in zip(*map(jax.tree.leaves, (moved, z))):
      up = np.array(new, np.float64) > 1
      assert not np.any(up & (np.array(sign) < 0))
      rows.extend(np.reshape(up - np.where(sign > 0, 0.25, 0), (-1, 2000)))
  rows = np.array(rows)
  assert len(rows) == 2 * 5
  np.testing.assert_allclose(rows.mean(axis=1), 0, atol=4.5 * 0.31 / 44.7)
  correlation = np.corrcoef(rows)[~np.eye(len(rows), dtype=bool)]
  assert np.abs(correlation).max() < 4.5 / math.sqrt(2000)
  # To nearest only what goes down moves: spacing is half of it below 1.
  assert np.all(np.array(to_nearest["a"])[np.array(z["a"]) > 0] == 1)


def _displacements(dtype, rate, drift):
  """Runs 1,000 updates in float32, rounded stochastically and to nearest.

  Coefficients have a spread of 30. With `drift` all directions agree, as where
  a gradient persists; otherwise each is new.
  """
  rng = np.random.default_rng(0)
  start = jnp.asarray(0.02 * rng.normal(size=(200, 100)), dtype)
  coefficients = 30.0 * rng.normal(size=1000).astype(np.float32)
  sampler = sampler_lib.Sampler(RADEMACHER, stacked=STACKED)

  def step(i, bases):
    direction_key = jax.random.fold_in(jax.random.key(1), 0 if drift else i)
    keys = keys_lib.DirectionKey(direction_key[None], jax.random.key(2))
    c = jnp.asarray(coefficients)[i]
    weights = -rate * (jnp.abs(c) if drift else c)[None]
    full, stochastic, nearest = bases
    key = jax.random.fold_in(jax.random.key(3), i)
    return (
      sampler.apply_directions(full, keys, weights),
      sampler.apply_directions(stochastic, keys, weights, rounding_key=key),
      sampler.apply_directions(nearest, keys, weights),
    )

  run = jax.jit(lambda bases: jax.lax.fori_loop(0, 1000, step, bases))
  after = run((start.astype(jnp.float32), start, start))
  begin = np.array(start, np.float64)
  return [(np.array(leaf, np.float64) - begin).ravel() for leaf in after]


def _cosine(a, b):
  return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def test_a_persistent_signal_survives_bfloat16():
  full, stochastic, nearest = _displacements(jnp.bfloat16, 1e-7, True)
  assert _cosine(stochastic, full) >= 0.95
  assert _cosine(nearest, full) < 0.35


@pytest.mark.parametrize("dtype, rate", [(HALF[0], 1e-6), (HALF[1], 1e-7)])
def test_no_signal_is_lost_among_new_directions(dtype, rate):
  # What is written has the float32 displacement in it once, whole, with noise
  # that the rounding adds; to nearest a part of it never arrives.
  full, stochastic, nearest = _displacements(dtype, rate, False)
  share = stochastic @ full / (full @ full)
  noise = np.std(stochastic - full) / np.linalg.norm(full)
  assert abs(share - 1) < 4.5 * noise < 0.1
  assert abs(nearest @ full / (full @ full) - 1) > 0.15
  assert abs(np.mean(stochastic - full)) < 4.5 * np.std(stochastic) / 141
