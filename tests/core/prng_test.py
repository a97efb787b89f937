"""Random bits against published answers, draws against their distributions."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import random as jax_random
from scipy import special, stats

from zofo_jax.core import prng

KEY = jnp.array([0x1234ABCD, 42], jnp.uint32)
DRAWS = [prng.gaussian, prng.rademacher]


def _rows(count):
  return jnp.arange(count, dtype=jnp.uint32)


@pytest.mark.parametrize(
  "counter, key, answer",
  [  # kat_vectors of Random123, "threefry2x32 20"
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((2**32 - 1,) * 2, (2**32 - 1,) * 2, (0x1CB996FC, 0xBB002BE7)),
    (
      (0x243F6A88, 0x85A308D3),
      (0x13198A2E, 0x03707344),
      (0xC4923A9C, 0x483DF7A0),
    ),
  ],
)
def test_known_answers(counter, key, answer):
  high, low = np.array(counter, np.uint32)
  bits = prng.threefry2x32(jnp.array(key, jnp.uint32), high, low)
  np.testing.assert_array_equal(np.array(bits), np.array(answer, np.uint32))


def test_same_bits_as_jax():
  counter = np.random.default_rng(0).integers(2**32, size=(2, 1000))
  counter = counter.astype(np.uint32)
  actual = prng.threefry2x32(KEY, jnp.array(counter[0]), jnp.array(counter[1]))
  expected = jax_random.threefry_2x32(KEY, jnp.array(counter.reshape(-1)))
  np.testing.assert_array_equal(np.concatenate(actual), expected)


def test_looped_cipher_gives_the_same_bits():
  high, low = _rows(40)[:, None], _rows(7)[None, :]
  fused = jax.jit(lambda: prng.threefry2x32(KEY, high, low))()
  looped = prng.threefry2x32_materialized(KEY, high, low)
  jax.tree.map(np.testing.assert_array_equal, fused, looped)
  keys = jnp.stack([KEY, KEY + np.uint32(1)])  # a key of its own for each
  batched = jax.jit(lambda: prng.threefry2x32(keys, high[0], low[0, :2]))()
  alone = prng.threefry2x32_materialized(keys[1], high[0], low[0, 1:2])
  np.testing.assert_array_equal([e[1] for e in batched], np.ravel(alone))


@pytest.mark.parametrize(
  "platform, loops", [("cpu", True), ("tpu", True), ("cuda", False)]
)
def test_loops_only_where_they_cost_no_launches(platform, loops):
  draw = jax.jit(lambda key: prng.rademacher(key, prng.RowRange(0, 128), 8))
  text = draw.trace(KEY).lower(lowering_platforms=(platform,)).as_text()
  assert ("stablehlo.while" in text) == loops
  assert ("optimization_barrier" in text) != loops


def test_fold_in_gives_distinct_keys():
  count = jnp.arange(200, dtype=jnp.uint32)
  keys = prng.fold_in(KEY, count[:, None], count[None, :])
  assert keys.shape == (200, 200, 2) and keys.dtype == jnp.uint32
  assert len(np.unique(np.array(keys).reshape(-1, 2), axis=0)) == 200 * 200
  np.testing.assert_array_equal(
    keys[3, 5], prng.fold_in(KEY, np.uint32(3), np.uint32(5))
  )


def test_normal_quantile_everywhere():
  # Every value that a uniform number can take, in float64 by scipy.
  x = (np.arange(2**23, dtype=np.float64) * 2 + 1) * 2.0**-24 * 2 - 1
  z = np.asarray(jax.jit(prng.normal_quantile)(x.astype(np.float32)))
  np.testing.assert_allclose(z, special.ndtri((1 + x) / 2), rtol=5e-6)
  assert np.abs(z).max() <= prng.GAUSSIAN_MAX
  np.testing.assert_array_equal(z, -z[::-1])


def test_gaussian_moments():
  draw = jax.jit(lambda: prng.gaussian(KEY, _rows(500), 2000))
  z = np.array(draw(), np.float64)
  assert z.shape == (500, 2000)
  n = z.size
  moments = np.arange(1, 7)
  expected = np.array([0, 1, 0, 3, 0, 15])
  # Var(z^k) = E z^2k - (E z^k)^2, with E z^2k = (2k - 1)!!.
  even = np.array([math.prod(range(1, 2 * k, 2)) for k in moments])
  error = np.array([np.mean(z**k) for k in moments]) - expected
  assert np.all(np.abs(error) < 4.5 * np.sqrt((even - expected**2) / n))
  assert stats.kstest(z.reshape(-1)[:200_000], "norm").pvalue > 1e-3
  assert np.abs(z).max() <= 5.42


@pytest.mark.parametrize("draw", DRAWS)
def test_neighbours_are_uncorrelated(draw):
  z = np.array(jax.jit(lambda: draw(KEY, _rows(500), 1000))())
  for shift in ((0, 1), (1, 0), (0, 500), (32, 0), (64, 0), (63, 1), (250, 0)):
    product = z * np.roll(z, shift, axis=(0, 1))
    assert abs(product.mean()) < 4.5 / math.sqrt(z.size), shift


@pytest.mark.parametrize("columns", [1, 65, 200])
def test_rademacher_is_balanced(columns):
  z = np.array(jax.jit(lambda: prng.rademacher(KEY, _rows(4000), columns))())
  assert z.shape == (4000, columns) and z.dtype == np.float32
  assert set(np.unique(z)) == {-1.0, 1.0}
  assert abs(z.mean()) < 4.5 / math.sqrt(z.size)
  # Every bit position by itself, the largest of up to 200 of them.
  assert np.abs(z.mean(axis=0)).max() < 5.0 / math.sqrt(4000)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("columns", [1, 64, 130])
def test_rows_by_number(draw, columns):
  draw = jax.jit(functools.partial(draw, columns=columns))
  full = np.array(draw(KEY, _rows(50)))
  wanted = np.array([[3, 49, 0], [7, 3, 3]], np.uint32)
  some = draw(KEY, jnp.array(wanted))
  np.testing.assert_array_equal(some, full[wanted])


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("start, size", [(0, 1), (0, 130), (64, 64), (128, 9)])
def test_a_block_equals_its_rows(draw, start, size):
  rows = _rows(size) + np.uint32(start)
  by_number = draw(KEY, rows, 33)
  block = jax.jit(lambda start: draw(KEY, prng.RowRange(start, size), 33))
  np.testing.assert_array_equal(block(start), by_number)
  assert draw(KEY, prng.RowRange(start, size), 33).shape == (size, 33)


def test_uniform():
  u = np.array(jax.jit(lambda: prng.uniform(KEY, _rows(500), 400))())
  assert u.dtype == np.float32 and 0 < u.min() and u.max() < 1
  assert stats.kstest(u.reshape(-1), "uniform").pvalue > 1e-3
  odd = u.astype(np.float64) * 2**24
  assert np.all(odd == np.round(odd)) and np.all(odd % 2 == 1)


@pytest.mark.parametrize("draw", DRAWS)
def test_keys_give_other_numbers(draw):
  keys = jax.random.split(jax.random.key(0), 30)
  draws = jax.jit(jax.vmap(lambda key: draw(key, _rows(20), 50)))
  z = np.array(draws(jax.random.key_data(keys))).reshape(30, -1)
  correlation = np.corrcoef(z)[~np.eye(30, dtype=bool)]
  assert np.abs(correlation).max() < 5.0 / math.sqrt(1000)


@pytest.mark.parametrize("draw", DRAWS)
def test_same_bits_in_every_transformation(draw):
  columns = 70
  rows = _rows(12)
  eager = np.array(draw(KEY, rows, columns))

  @jax.jit
  def compiled(keys, rows):
    _, scanned = jax.lax.scan(
      lambda carry, row: (carry, draw(KEY, row[None], columns)[0]), 0, rows
    )
    by_row = jax.vmap(lambda row: draw(KEY, row[None], columns)[0])(rows)
    batched = jax.vmap(lambda key: draw(key, rows, columns))(keys)
    mapped = jax.lax.map(lambda key: draw(key, rows, columns), keys)
    return draw(keys[1], rows, columns), scanned, by_row, batched[1], mapped[1]

  keys = jnp.stack([KEY + np.uint32(1), KEY])
  for other in compiled(keys, rows):
    np.testing.assert_array_equal(other, eager)
