"""A direction for every example: fused products against separate models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zofo_jax as zofo
from zofo_jax.core import directions, outer, perturbed, zo
from zofo_jax.core import keys as keys_lib
from zofo_jax.core import sampler as sampler_lib
from zofo_jax.models import transformer
from zofo_jax.models.decoder import STACKED


def selected(path):
  """Selects one weight of each sort; each is more to compile."""
  return any(name in path for name in ("embed", "query", "down", "norm"))


SELECTED = functools.partial(
  sampler_lib.Sampler, select=selected, stacked=STACKED
)
PER_EXAMPLE = directions.PerExample()
LAZY = SELECTED(PER_EXAMPLE, lazy=True)
WHOLE = SELECTED(PER_EXAMPLE, lazy=False)
EXAMPLES, EPS = 4, 0.05
ESTIMATORS = {
  "central": zo.central,
  "forward": zo.forward,
  "exact": zo.exact,
}
# Biases and a tied table: vectors, matrices and a leaf that is looked up.
MODEL = transformer.Transformer(
  transformer.Config(40, 8, 12, 2, 2, 1, 4, tied_head=True, mlp_bias=True)
)


def _examples():
  rng = np.random.default_rng(0)
  draw = lambda high, *shape: jnp.asarray(rng.integers(high, size=shape))
  return {
    "tokens": draw(40, EXAMPLES, 6),
    "positions": draw(6, EXAMPLES, 2),
    "target_slot": draw(2, EXAMPLES, 3),
    "target_token": draw(40, EXAMPLES, 3),
  }


@functools.cache
def _base():
  inputs = {name: leaf[:1] for name, leaf in _examples().items()}
  init = lambda key: MODEL.init(key, mask=jnp.ones((1, 6), bool), **inputs)
  base = jax.jit(init)(jax.random.key(0))["params"]
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda w: jnp.asarray(0.3 * rng.normal(size=w.shape), w.dtype) + w, base
  )


def _loss(base, example):
  row = jax.tree.map(lambda leaf: leaf[None], example)
  mask = jnp.ones((1, 6), bool)
  return -jnp.mean(MODEL.apply({"params": base}, mask=mask, **row))


@functools.partial(jax.jit, static_argnames=("sampler", "estimator"))
def _estimate(base, examples, key, sampler=LAZY, estimator=zo.central):
  return zo.estimate_per_example(
    _loss, base, examples, key, EPS, zofo.ZerothOrder(sampler, estimator)
  )


@jax.jit
def _unit(direction_key, subspace_key, base):
  return WHOLE.weighted_sum(
    base, keys_lib.DirectionKey(direction_key[None], subspace_key), jnp.ones(1)
  )


def _directions(estimate):
  """Yields every example's number and its z, whole."""
  for i, direction_key in enumerate(estimate.keys.direction):
    yield i, _unit(direction_key, estimate.keys.subspace, _base())


@jax.jit
def _shift(base, z, t):
  return jax.tree.map(lambda w, z: w + jnp.float32(t) * z, base, z)


def _close(left, right, **tolerances):
  tolerances = dict(rtol=1e-5, atol=1e-5) | tolerances
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **tolerances), left, right
  )


@pytest.mark.parametrize(
  "name",
  [
    "exact",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("central", "forward")),
  ],
)
def test_fused_forward_equals_separate_models(name):
  estimate = _estimate(
    _base(), _examples(), jax.random.key(2), estimator=ESTIMATORS[name]
  )
  loss = jax.jit(_loss)
  slope = jax.jit(lambda b, z, e: jax.jvp(lambda b: _loss(b, e), (b,), (z,)))
  assert estimate.coefficients.shape == (EXAMPLES,)
  for i, z in _directions(estimate):
    example = jax.tree.map(lambda leaf, i=i: leaf[i], _examples())
    plus, zero, minus = (
      float(loss(_shift(_base(), z, t), example)) for t in (EPS, 0, -EPS)
    )
    values, c = {
      "central": ([plus, minus], (plus - minus) / (2 * EPS)),
      "forward": ([plus], (plus - zero) / EPS),
      "exact": ([zero], float(slope(_base(), z, example)[1])),
    }[name]
    _close(estimate.values[i], np.array(values))
    _close(estimate.coefficients[i], c, rtol=2e-4, atol=4e-4)


@pytest.mark.slow
def test_whole_perturbed_trees_give_the_same():
  arguments = _base(), _examples(), jax.random.key(2)
  lazy, whole = _estimate(*arguments), _estimate(*arguments, sampler=WHOLE)
  _close(lazy.values, whole.values)


@pytest.mark.slow
def test_other_kinds_and_a_loop_over_examples():
  # Of any kind; here without anything to share.
  sampler = SELECTED(directions.Rademacher(), lazy=True)
  estimate = _estimate(_base(), _examples(), jax.random.key(3), sampler=sampler)

  @jax.jit
  def alone(direction_key, example):
    key = keys_lib.DirectionKey(direction_key, estimate.keys.subspace)
    at = lambda t: _loss(sampler.perturb(_base(), key, t), example)
    return jnp.stack([at(EPS), at(-EPS)])

  for i, direction_key in enumerate(estimate.keys.direction):
    example = jax.tree.map(lambda leaf, i=i: leaf[i], _examples())
    _close(estimate.values[i], alone(direction_key, example))


@pytest.mark.slow
def test_fused_update_is_the_sum_of_rank_one_updates():
  estimate = _estimate(_base(), _examples(), jax.random.key(2))
  total = jax.tree.map(np.zeros_like, _base())
  units = [z for _, z in _directions(estimate)]
  for c, z in zip(np.array(estimate.coefficients), units):
    total = jax.tree.map(lambda t, z, c=c: t + c * z / EXAMPLES, total, z)
  # Over the signs they share, the directions of matrices are of rank one.
  for first, second in zip(*map(jax.tree.leaves, units[:2])):
    if np.any(first) and (first.ndim == 3 or first.shape[:1] == (40,)):
      for ratio in np.array(first * second).reshape(-1, *first.shape[-2:]):
        assert np.linalg.matrix_rank(ratio) == 1
  written = jax.jit(zo.gradient, static_argnums=2)(_base(), estimate, WHOLE)
  _close(written, total)
  tx = outer.sgd(0.5)
  moved, _ = jax.jit(
    lambda base: tx.update(
      base, tx.init(base), estimate, LAZY, None, jax.random.key(0)
    )
  )(_base())
  _close(moved, _shift(_base(), total, -0.5))


def test_mean_is_the_gradient_of_the_mean():
  rng = np.random.default_rng(5)
  x = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)
  tree = {
    "w": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
    "b": jnp.asarray(rng.normal(size=3), jnp.float32),
    "a": jnp.float32(0.7),
  }

  def fn(tree, x):
    hidden = perturbed.dot(x[None], tree["w"])[0] + perturbed.read(tree["b"])
    return jnp.sum(jnp.sin(hidden)) * perturbed.read(tree["a"])

  everything = sampler_lib.Sampler(PER_EXAMPLE, lazy=True)

  def gradient(key):
    estimate = zo.estimate_per_example(
      fn, tree, x, key, 1e-2, zofo.ZerothOrder(everything)
    )
    return zo.gradient(tree, estimate, everything)

  count = 3000
  keys = jax.random.split(jax.random.key(6), count)
  samples = jax.jit(lambda keys: jax.lax.map(gradient, keys))(keys)
  mean = lambda tree: jnp.mean(jax.vmap(fn, (None, 0))(tree, x))
  exact = jax.grad(mean)(tree)
  for sample, right in zip(*map(jax.tree.leaves, (samples, exact))):
    error = np.abs(np.mean(sample, axis=0) - right)
    assert np.all(error < 4.5 * np.std(sample, axis=0) / np.sqrt(count))


def test_a_broken_example_is_dropped():
  fn = lambda tree, x: jnp.sum(tree) * x
  examples = jnp.array([1.0, jnp.nan, 3.0])
  estimate = zo.estimate_per_example(
    *(fn, jnp.ones((2, 3)), examples, jax.random.key(0), 0.1),
    zofo.ZerothOrder(sampler_lib.Sampler(PER_EXAMPLE, lazy=False)),
  )
  assert int(estimate.num_nonfinite) == 1
  assert float(estimate.coefficients[1]) == 0.0
  np.testing.assert_allclose(
    estimate.mean_coefficients(), estimate.coefficients / 2, rtol=1e-6
  )
