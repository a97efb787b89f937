"""Kinds of directions: same bits everywhere, unit covariance, products."""

import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from zofo_jax.core import directions, prng
from zofo_jax.core import keys as keys_lib

GAUSSIAN = directions.Gaussian()
RADEMACHER = directions.Rademacher()
LOW_RANK = directions.LowRank(2)
PER_EXAMPLE = directions.PerExample()
SPARSE = directions.Sparse()
KINDS = [GAUSSIAN, RADEMACHER, LOW_RANK, PER_EXAMPLE, SPARSE]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda k: type(k).__name__)


def test_every_kind_is_here():
  """What a kind must fulfil is tested for each; none is left out."""
  defined = {
    kind
    for kind in directions.Direction.__subclasses__()
    if kind.__module__ == directions.__name__
  }
  assert defined == {type(kind) for kind in KINDS}


def _keys(count, seed=0, num_subspaces=None):
  """Keys of `count` directions, of as many subspaces or of one."""
  words = np.random.default_rng(seed).integers(2**32, size=(2, count, 2))
  direction_key, subspace_key = jnp.asarray(words.astype(np.uint32))
  return keys_lib.LeafKey(
    direction_key, subspace_key if num_subspaces is None else subspace_key[:1]
  )


def _at(keys, q):
  return keys_lib.LeafKey(
    keys.direction[q], keys.subspace[q % len(keys.subspace)]
  )


@functools.partial(jax.jit, static_argnums=(0, 2))
def _draw(kind, key, shape, rows=None):
  return kind.sample(key, shape, rows)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _draws(kind, keys, shape):
  """Draws a z of every key, [Q, *shape]."""
  subspace_axis = 0 if len(keys.subspace) == len(keys.direction) else None
  subspace_key = keys.subspace if subspace_axis == 0 else keys.subspace[0]
  draw = lambda direction_key, subspace_key: kind.sample(
    keys_lib.LeafKey(direction_key, subspace_key), shape
  )
  return jax.vmap(draw, (0, subspace_axis))(keys.direction, subspace_key)


@kinds
def test_same_bits_in_every_transformation(kind):
  shape = (3, 70)
  keys = _keys(2)
  eager = kind.sample(_at(keys, 1), shape)
  assert eager.shape == shape and eager.dtype == jnp.float32
  draw = lambda key: kind.sample(key, shape)

  @jax.jit
  def compiled(keys):
    _, scanned = jax.lax.scan(lambda carry, key: (carry, draw(key)), 0, keys)
    return draw(_at(keys, 1)), jax.vmap(draw)(keys)[1], scanned[1]

  for other in compiled(keys):
    np.testing.assert_array_equal(other, eager)


@pytest.mark.many_devices
@pytest.mark.parametrize(
  "kind, shape, spec",
  [
    (LOW_RANK, (8,), P("data")),
    (RADEMACHER, (8,), P("data")),
    *((kind, (2, 2, 2), P(("data", "model"), "fsdp")) for kind in KINDS),
  ],
)
def test_same_bits_on_every_mesh(kind, shape, spec):
  names = ("data", "fsdp", "model")[: len(shape)]
  mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))
  key = _at(_keys(1), 0)
  whole = _draw(kind, key, (16, 136))  # 136: no multiple of 64
  placed = NamedSharding(mesh, spec)
  z = jax.jit(lambda key: kind.sample(key, (16, 136)), out_shardings=placed)(
    key
  )
  assert z.sharding.spec == spec
  np.testing.assert_array_equal(z, whole)


@pytest.mark.parametrize(
  "kind, shape",
  # These two treat vectors in another way.
  [*((kind, (130, 3)) for kind in KINDS)]
  + [(LOW_RANK, (130,)), (PER_EXAMPLE, (130,))],
)
def test_rows_are_rows_of_the_whole(kind, shape):
  key = _at(_keys(1), 0)
  whole = np.array(_draw(kind, key, shape))
  some = np.array([[3, 129, 64], [64, 3, 3]])
  rows = _draw(kind, key, shape, jnp.asarray(some))
  np.testing.assert_array_equal(rows, whole[some])
  block = jax.jit(
    lambda start: kind.sample(key, shape, prng.RowRange(start, 66))
  )(64)
  np.testing.assert_array_equal(block, whole[64:])


@pytest.mark.parametrize(
  "kind, num_subspaces, shape",
  # Unmasked, as here, sparse ones are Rademacher's.
  [(kind, None, shape) for kind in KINDS[:4] for shape in ((), (5,))]
  + [(kind, None, (3, 2)) for kind in KINDS]
  + [
    (PER_EXAMPLE, 1, (3, 2)),  # also among directions of one subspace
    (directions.PerExample(GAUSSIAN), None, (3, 2)),
    (directions.PerExample(LOW_RANK), None, (3, 2)),
    (directions.Sparse(LOW_RANK), None, (3, 2)),
  ],
)
def test_covariance_is_the_identity(kind, num_subspaces, shape):
  count = 6000
  z = np.array(
    _draws(kind, _keys(count, num_subspaces=num_subspaces), shape), np.float64
  )
  z = z.reshape(count, -1)
  for product, expected in (
    (z[:, :, None] * z[:, None, :], np.eye(z.shape[1])),
    (z, np.zeros(z.shape[1])),
  ):
    error = np.abs(product.mean(axis=0) - expected)
    bound = 4.5 * product.std(axis=0) / math.sqrt(count)
    assert np.all(error <= bound + 1e-7)  # z^2 = 1 has no spread at all


@kinds
def test_keys_give_other_directions(kind):
  z = np.array(_draws(kind, _keys(30), (20, 50))).reshape(30, -1)
  # Products of low-rank ones have the same spread and heavier tails.
  correlation = np.corrcoef(z)[~np.eye(30, dtype=bool)]
  spreads = 12 if kind is LOW_RANK else 5
  assert np.abs(correlation).max() < spreads / math.sqrt(1000)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
  "kind", [LOW_RANK, PER_EXAMPLE, directions.PerExample(GAUSSIAN)]
)
def test_product_needs_no_z(kind, transposed):
  keys = _keys(3, num_subspaces=1)
  shape = (6, 9)
  x = np.random.default_rng(0).normal(size=(3, 2, shape[transposed]))
  x = x.astype(np.float32)

  @jax.jit
  def products(x, direction_key):
    key = keys_lib.LeafKey(direction_key, keys.subspace[0])
    return kind.matmul(x, key, shape, transposed=transposed)

  z = np.array(_draws(kind, keys, shape))
  z = np.swapaxes(z, 1, 2) if transposed else z
  got = jax.vmap(products)(x, keys.direction)
  np.testing.assert_allclose(got, x @ z, rtol=1e-5, atol=1e-5)
  # In the dtype of x, whose products a model adds.
  half = products(jnp.asarray(x[0], jnp.bfloat16), keys.direction[0])
  assert half.dtype == jnp.bfloat16
  np.testing.assert_allclose(half, x[0] @ z[0], atol=0.15)


@pytest.mark.parametrize("rank", [4, 40])
def test_low_rank_product_where_it_is_smaller_than_z(rank):
  kind = directions.LowRank(rank)
  key = _at(_keys(1), 0)
  x = np.random.default_rng(0).normal(size=(20, 60)).astype(np.float32)
  z = np.array(kind.sample(key, (60, 50)))
  np.testing.assert_allclose(kind.matmul(x, key, (60, 50)), x @ z, atol=1e-4)
  assert kind.matmul(np.tile(x, (2, 1)), key, (60, 50)) is None


@pytest.mark.parametrize("kind", [GAUSSIAN, RADEMACHER, SPARSE])
def test_dense_kinds_have_no_shortcut(kind):
  keys = _keys(2)
  assert kind.matmul(jnp.ones((1, 3)), _at(keys, 0), (3, 4)) is None
  assert kind.weighted_sum(keys, jnp.ones(2), (3, 4)) is None


@pytest.mark.parametrize("shape", [(), (5,), (6, 9), (2, 3, 4)])
@pytest.mark.parametrize("kind", [LOW_RANK, PER_EXAMPLE])
def test_combine_is_the_weighted_sum(kind, shape):
  keys = _keys(4, num_subspaces=1)
  keys = keys._replace(subspace=jnp.tile(keys.subspace, (4, 1)))
  weights = jnp.array([0.5, -2.0, 1e-3, 0.0])
  got = jax.jit(kind.weighted_sum, static_argnums=2)(keys, weights, shape)
  if kind is LOW_RANK and len(shape) != 2:
    assert got is None
    return
  z = np.array(_draws(kind, keys, shape))
  np.testing.assert_allclose(
    got, np.tensordot(weights, z, 1), rtol=1e-5, atol=1e-5
  )


def test_low_rank_directions_of_a_frame_share_v_alone():
  def ranks(keys):
    first, second = np.array(_draws(directions.LowRank(3), keys, (20, 30)))
    rank = np.linalg.matrix_rank(first)
    rows = np.linalg.matrix_rank(np.vstack([first, second]))
    columns = np.linalg.matrix_rank(np.hstack([first, second]))
    return rank, rows, columns

  assert ranks(_keys(2, num_subspaces=1)) == (3, 3, 6)
  assert ranks(_keys(2)) == (3, 6, 6)
  # And the other way round: one U in two subspaces.
  keys = _keys(2)
  keys = keys._replace(direction=keys.direction[jnp.array([0, 0])])
  assert ranks(keys) == (3, 6, 3)


def test_per_example_directions_differ_by_signs_of_rows_and_columns():
  first, second = np.array(
    _draws(PER_EXAMPLE, _keys(2, num_subspaces=1), (20, 30))
  )
  ratio = first * second
  assert np.linalg.matrix_rank(ratio) == 1
  # Square: the signs of rows are not those of columns.
  first, second = np.array(
    _draws(PER_EXAMPLE, _keys(2, num_subspaces=1), (64, 64))
  )
  ratio = first * second
  assert abs(np.mean(ratio[:, 0] * ratio[0])) < 5 / 8
  other, another = np.array(_draws(PER_EXAMPLE, _keys(2), (20, 30)))
  assert np.linalg.matrix_rank(other * another) > 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("threshold", [0.67, 0.2])
def test_sparse_moves_the_small_weights_of_each_row(dtype, threshold):
  rng = np.random.default_rng(1)
  # Rows of very different sizes: each has its own measure.
  weight = rng.normal(size=(40, 500)) * np.exp(rng.normal(size=(40, 1)) * 3)
  weight = jnp.asarray(weight, dtype)
  kind = directions.Sparse(threshold=threshold)
  key = _at(_keys(1), 0)
  z = _draw(RADEMACHER, key, weight.shape)
  np.testing.assert_array_equal(_draw(kind, key, weight.shape), z)
  masked = np.array(jax.jit(kind.mask)(z, weight))
  exact = np.array(weight, np.float64)
  limit = threshold * np.sqrt(np.mean(exact**2, axis=1, keepdims=True))
  np.testing.assert_array_equal(masked, np.where(np.abs(exact) <= limit, z, 0))
  share = math.erf(threshold / math.sqrt(2))  # of a Gaussian
  assert np.all(np.abs(np.mean(masked != 0, axis=1) - share) < 0.1)
  # Vectors, whose few elements are all of one kind, move whole.
  np.testing.assert_array_equal(kind.mask(z[0], weight[0]), z[0])


# Every shape is compiled: a few are drawn from, each with several seeds. Their
# rows and their bits are also those of the tests above.
@pytest.mark.slow
@pytest.mark.parametrize(
  "kind, shape",
  [
    (RADEMACHER, (65, 3)),
    (RADEMACHER, (2, 33, 1)),
    (LOW_RANK, (1, 64)),
    (LOW_RANK, (70,)),
    (PER_EXAMPLE, (66, 5)),
    (PER_EXAMPLE, ()),
    (PER_EXAMPLE, (2, 3, 4)),
    (SPARSE, (1,)),
  ],
)
@hypothesis.settings(max_examples=4, deadline=None, derandomize=True)
@hypothesis.given(seed=strategies.integers(0, 2**31))
def test_any_shape(kind, shape, seed):
  keys = _keys(3, seed)
  z = np.array(_draws(kind, keys, shape))
  assert z.shape == (3, *shape) and z.dtype == np.float32
  assert np.all(np.isfinite(z)) and np.all(z != 0)
  np.testing.assert_array_equal(z[2], _draw(kind, _at(keys, 2), shape))
  if shape:
    last = np.array([shape[0] - 1])
    rows = _draw(kind, _at(keys, 2), shape, jnp.asarray(last))
    np.testing.assert_array_equal(rows, z[2][last])


@pytest.mark.parametrize("rank", [1, 4, 16, 64])
def test_low_rank_sums_are_exact_in_any_order(rank):
  kind = directions.LowRank(rank)
  key = keys_lib.LeafKey(*jnp.arange(4, dtype=jnp.uint32).reshape(2, 2))
  shape = (40, 24)
  (u, v), z = jax.jit(
    lambda key: (kind._factors(key, shape), kind.sample(key, shape))
  )(key)
  u, v, z = np.array(u, np.float64), np.array(v, np.float64), np.array(z)
  # NumPy's float64 sum is exact; so must be float32's, before the scale.
  exact = (u @ v.T).astype(np.float32)
  np.testing.assert_array_equal(exact.astype(np.float64), u @ v.T)
  np.testing.assert_array_equal(z, exact * np.float32(rank**-0.5))
