"""Backbone updates against textbook formulae and compiled memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zofo_jax import directions, outer, zo

SAMPLER = directions.Sampler(directions.Rademacher())


def _base():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return {"plain": draw(4, 3), "layers": {"stacked": draw(2, 5)}}


def _estimate(step, num_directions):
  """Makes up an estimate: random keys, random coefficients."""
  rng = np.random.default_rng(step)
  return zo.Estimate(
    keys=jax.random.split(jax.random.key(step), num_directions),
    coefficients=jnp.asarray(rng.normal(size=num_directions), jnp.float32),
    num_nonfinite=jnp.int32(0),
    value=jnp.float32(0.0),
    aux=(),
  )


@jax.jit
def _unit(key, tree):
  zeros = jax.tree.map(jnp.zeros_like, tree)
  return SAMPLER.add(zeros, key[None], jnp.ones(1))


def _flat(tree):
  leaves = [np.array(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
  return np.concatenate([leaf.reshape(-1) for leaf in leaves])


def _gradient(estimate, base):
  """Sums c_q z_q / Q in float64, from one unit direction at a time."""
  return np.mean(
    [
      float(c) * _flat(_unit(key, base))
      for key, c in zip(estimate.keys, estimate.coefficients)
    ],
    axis=0,
  )


def _run(tx, num_directions, num_steps=4):
  """Returns the bases visited and the gradients that moved them."""
  tx = outer.as_outer(tx)
  base = _base()
  state = tx.init(base)
  update = jax.jit(functools.partial(tx.update, sampler=SAMPLER))
  bases, gradients = [_flat(base)], []
  for step in range(num_steps):
    estimate = _estimate(step, num_directions)
    gradients.append(_gradient(estimate, base))
    base, state = update(base, state, estimate)
    bases.append(_flat(base))
  assert update._cache_size() == 1
  return bases, gradients, state


def _close(left, right):
  np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_directions", [1, 5])
@pytest.mark.parametrize(
  "make", [outer.sgd, optax.sgd], ids=["in place", "optax"]
)
def test_sgd(make, num_directions):
  bases, gradients, _ = _run(make(0.3), num_directions)
  for before, after, gradient in zip(bases, bases[1:], gradients):
    _close(after, before - 0.3 * gradient)


def test_sgd_schedule_and_state():
  schedule = optax.linear_schedule(1.0, 0.2, 4)
  bases, gradients, state = _run(outer.sgd(schedule), 1)
  rates = [1.0, 0.8, 0.6, 0.4]
  for before, after, gradient, rate in zip(bases, bases[1:], gradients, rates):
    _close(after, before - rate * gradient)
  assert int(state.num_updates) == 4
  assert len(jax.tree.leaves(state)) == 2


def test_sgd_rate_lives_in_the_state():
  tx = outer.sgd(0.5)
  base, estimate = _base(), _estimate(0, 2)
  update = jax.jit(functools.partial(tx.update, sampler=SAMPLER))
  state = tx.init(base)
  for rate in (0.5, 2.0):
    state = state._replace(learning_rate=jnp.float32(rate))
    moved, _ = update(base, state, estimate)
    _close(_flat(moved), _flat(base) - rate * _gradient(estimate, base))
  assert update._cache_size() == 1


def test_momentum():
  bases, gradients, _ = _run(optax.sgd(0.1, momentum=0.9), 2)
  trace = 0.0
  for before, after, gradient in zip(bases, bases[1:], gradients):
    trace = gradient + 0.9 * trace
    _close(after, before - 0.1 * trace)


def test_adam():
  bases, gradients, _ = _run(optax.adam(0.01), 2)
  first = second = 0.0
  for t, gradient in enumerate(gradients, start=1):
    first = 0.9 * first + 0.1 * gradient
    second = 0.999 * second + 0.001 * gradient**2
    step = first / (1 - 0.9**t) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
    _close(bases[t], bases[t - 1] - 0.01 * step)


def test_dropped_directions_move_nothing():
  tx = outer.sgd(1.0)
  base = _base()
  estimate = _estimate(0, 3)._replace(coefficients=jnp.zeros(3))
  moved, _ = jax.jit(functools.partial(tx.update, sampler=SAMPLER))(
    base, tx.init(base), estimate
  )
  jax.tree.map(np.testing.assert_array_equal, moved, base)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sgd_needs_no_copy_of_the_weights(dtype):
  base = {"layers": {"kernel": jnp.zeros((16, 128, 256), dtype)}}
  size = base["layers"]["kernel"].nbytes
  temp = {}
  for name, tx in (("in place", outer.sgd(0.1)), ("optax", optax.sgd(0.1))):
    tx = outer.as_outer(tx)
    state = tx.init(base)
    update = jax.jit(
      functools.partial(tx.update, sampler=SAMPLER), donate_argnums=0
    )
    compiled = update.lower(base, state, _estimate(0, 3)).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= size
    temp[name] = memory.temp_size_in_bytes
  # In place: a few layers in float32. Written out: the float32 gradient.
  assert temp["in place"] < 3 * 128 * 256 * 4
  assert temp["optax"] >= 16 * 128 * 256 * 4


def test_donated_weights_are_gone():
  tx = outer.sgd(0.1)
  base = _base()
  update = jax.jit(
    functools.partial(tx.update, sampler=SAMPLER), donate_argnums=(0, 1)
  )
  moved, _ = update(base, tx.init(base), _estimate(0, 1))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(base))
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(moved))
