"""Quantized weights: their error, their size, and every way they are read."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zofo_jax.core import directions, factors, perturbed, quantized, sampler
from zofo_jax.core import keys as keys_lib

RNG = np.random.default_rng(0)
# Blocks of 64 and one more of the rows of a table; 128 weights of a column.
TABLE = RNG.normal(size=(5000, 128)).astype(np.float32)
KERNELS = RNG.normal(size=(2, 128, 24)).astype(np.float32)
X = jnp.asarray(RNG.normal(size=(3, 128)), jnp.float32)
# How far a weight may move, relative to the largest of its block.
BOUNDS = {"int8": 1 / 254, "int4": 1 / 14, "nf4": 0.152}
kinds = pytest.mark.parametrize("kind", quantized.KINDS)


def normal_quantiles():
  """Returns NormalFloat's levels as QLoRA's paper derives them."""
  tail = lambda count: [
    statistics.NormalDist().inv_cdf(p)
    for p in np.linspace(0.9677083, 0.5, count)[:-1]
  ]
  levels = np.array([0.0, *tail(9), *(-p for p in tail(8))])
  return np.sort(levels / levels.max())


def dequantized(weight, kind, axis):
  """Transcribes the definition with a loop over the blocks of an axis."""
  rows = np.moveaxis(np.asarray(weight), axis, -1)
  size = rows.shape[-1] if kind == "int8" else 64
  blocks = rows.reshape(-1, size)
  out = np.empty_like(blocks)
  for i, block in enumerate(blocks):
    scale = np.max(np.abs(block))
    if kind == "nf4":
      grid = scale * normal_quantiles()
    else:
      most = {"int8": 127, "int4": 7}[kind]
      grid = scale * np.arange(-most, most + 1) / most
    nearest = np.argmin(np.abs(block[:, None] - grid), axis=1)
    out[i] = grid[nearest]
  return np.moveaxis(out.reshape(rows.shape), -1, axis)


@kinds
@pytest.mark.parametrize(
  "weight, axis", [(TABLE[:200], -1), (KERNELS, -2)], ids=["table", "stack"]
)
def test_weights_move_to_the_nearest_level(kind, weight, axis):
  node = quantized.quantize(weight, kind, axis=axis)
  assert node.shape == weight.shape and node.dtype == np.float32
  actual = np.asarray(node)
  np.testing.assert_allclose(actual, dequantized(weight, kind, axis), atol=1e-5)
  largest = np.max(np.abs(weight), axis=axis, keepdims=True)
  assert np.all(np.abs(actual - weight) <= BOUNDS[kind] * largest + 1e-6)


def test_zeros_and_odd_sizes_are_kept():
  weight = np.zeros((3, 5), np.float32)
  for kind in quantized.KINDS:
    np.testing.assert_array_equal(quantized.quantize(weight, kind), weight)
  weight[:, 0] = 0.5
  np.testing.assert_array_equal(quantized.quantize(weight, "nf4"), weight)
  with pytest.raises(ValueError, match="kind is 'int2'; expected one of int8"):
    quantized.quantize(weight, "int2")


@kinds
def test_a_program_holds_the_integers_alone(kind):
  table = np.tile(TABLE, (3, 1))
  node = jax.tree.map(jnp.asarray, quantized.quantize(table, kind, axis=-1))
  read = jax.jit(lambda node, x: perturbed.log_normalizer(x, node))
  memory = read.lower(node, X).compile().memory_analysis()
  most = {"int8": 0.27}.get(kind, 0.15)
  assert memory.argument_size_in_bytes - X.nbytes < most * table.nbytes
  # 4096 of 15000 rows exist at a time.
  assert memory.temp_size_in_bytes < 0.7 * table.nbytes


def nodes_of(kind, direction):
  """Returns a table and a kernel read in some way, and as plain arrays."""
  tree = {
    "table": quantized.quantize(TABLE[:300], kind, axis=-1),
    "kernel": quantized.quantize(KERNELS[0], kind),
  }
  tree = jax.tree.map(jnp.asarray, tree)
  plain = {name: jnp.asarray(node) for name, node in tree.items()}
  if direction == "stored":
    return tree, plain
  if direction == "factors":
    change = {
      name: factors.Factors(
        0.1 * jnp.ones((node.shape[0], 1)), jnp.ones((1, node.shape[1]))
      )
      for name, node in tree.items()
    }
    return factors.displace(tree, change), {
      name: weight + 0.1 for name, weight in plain.items()
    }
  key = keys_lib.DirectionKey(*jax.random.split(jax.random.key(0)))
  of_kind = sampler.Sampler(direction, lazy=True)
  moved = of_kind.perturb(tree, key, 0.3)
  # The same z as of scales that are weights like any other.
  scales = {name: {"scales": node.scales} for name, node in tree.items()}
  scales = perturbed.materialize(of_kind.perturb(scales, key, 0.3))
  return moved, {
    name: jnp.asarray(
      quantized.Quantized(
        node.values, scales[name]["scales"], kind, node.weight_dtype
      )
    )
    for name, node in tree.items()
  }


@jax.jit
def every_reading(table, kernel):
  rows = jnp.array([[7, 0], [299, 64]])

  def normalizer(x):
    return perturbed.log_normalizer(x, table)

  return {
    "read": perturbed.read(table),
    "take": perturbed.take(table, rows),
    "take across blocks": perturbed.take(kernel, rows % 2),
    "read_rows": perturbed.read_rows(table, 64, 128),
    "dot": perturbed.dot(X, kernel),
    "dot_transposed": perturbed.dot_transposed(X, table),
    "log_normalizer": normalizer(X),
    "its gradient": jax.grad(lambda x: normalizer(x).sum())(X),
  }


@pytest.mark.parametrize(
  "kind, direction",
  [
    *((kind, "stored") for kind in quantized.KINDS),
    ("int4", "factors"),
    ("int8", directions.Rademacher()),
  ],
  ids=str,
)
def test_every_way_of_reading_reads_the_same_weights(kind, direction):
  nodes, plain = nodes_of(kind, direction)
  actual, expected = every_reading(**nodes), every_reading(**plain)
  for name, value in expected.items():
    np.testing.assert_allclose(
      actual[name], value, rtol=1e-4, atol=1e-4, err_msg=name
    )


def test_an_update_moves_scales_and_no_integer():
  node = jax.tree.map(jnp.asarray, quantized.quantize(KERNELS, "int4"))
  tree = {"layers": {"kernel": node, "scale": jnp.ones((2, 24))}}
  key = keys_lib.DirectionKey(*jax.random.split(jax.random.key(0), (2, 1)))
  key = key._replace(subspace=key.subspace[0])
  of_scales = sampler.Sampler(
    directions.Rademacher(),
    select=lambda path: path.endswith("/scales"),
    stacked="layers/",
  )
  moved = jax.jit(of_scales.apply_directions)(tree, key, jnp.array([0.5]))
  moved = moved["layers"]
  np.testing.assert_array_equal(moved["scale"], tree["layers"]["scale"])
  np.testing.assert_array_equal(moved["kernel"].values, node.values)
  np.testing.assert_allclose(
    jnp.abs(moved["kernel"].scales - node.scales), 0.5, rtol=1e-5
  )


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_scan_reads_a_layer_at_a_time(kind):
  node = jax.tree.map(jnp.asarray, quantized.quantize(KERNELS, kind))

  def body(total, layer):
    return total + perturbed.dot(X, layer).sum(), None

  total, _ = jax.lax.scan(body, 0.0, node)
  expected = jnp.einsum("bi,lio->", X, jnp.asarray(node))
  np.testing.assert_allclose(total, expected, rtol=1e-3)
  np.testing.assert_allclose(
    perturbed.dot(X, node[1]), X @ jnp.asarray(node)[1], rtol=1e-3, atol=1e-4
  )


@kinds
def test_a_change_is_added_to_integers_exactly_on_average(kind):
  node = quantized.quantize(KERNELS, kind)
  base = {"kernel": jax.tree.map(jnp.asarray, node), "bias": jnp.ones(3)}
  left = jnp.asarray(RNG.normal(size=(2, 128, 1)), jnp.float32)
  right = jnp.asarray(RNG.normal(size=(2, 1, 24)), jnp.float32)
  write = jax.jit(
    lambda size, seed: factors.add_in_place(
      base,
      {"kernel": factors.Factors(size * left, right)},
      jax.random.key(seed),
    )["kernel"]
  )
  jax.tree.map(np.testing.assert_array_equal, write(0.0, 0), node)
  before, change = np.asarray(node.__jax_array__()), 1e-2 * left @ right
  moves = [np.asarray(write(1e-2, seed)) - before for seed in range(32)]
  assert np.sum(np.mean(moves, axis=0) * change) / np.sum(
    change * change
  ) == pytest.approx(1.0, abs=0.1)
  # Between neighbouring levels, which are twice as far apart as the bound.
  largest = np.max(np.abs(before))
  assert np.max(np.abs(moves[0] - change)) < 2 * BOUNDS[kind] * largest
  # No further than the last level.
  assert np.max(np.abs(jnp.asarray(write(1e3, 0)))) <= largest * (1 + 1e-6)
