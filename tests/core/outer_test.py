"""Backbone updates against textbook formulae and compiled memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zofo_jax.core import directions, outer, sampler, zo
from zofo_jax.core import keys as keys_lib

STACKED = r"(^|/)layers/"

SAMPLER = sampler.Sampler(directions.Rademacher(), stacked=STACKED)
KEY = jax.random.key(99)


def _base(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  return {
    "plain": draw(4, 3),
    "layers": {"bias": draw(2, 5), "kernel": draw(2, 5, 3)},
  }


def _estimate(step, num_directions, broken=()):
  """Makes up an estimate: random keys, coefficients and values."""
  rng = np.random.default_rng(step)
  direction_key, subspace_key = jax.random.split(jax.random.key(step))
  finite = np.ones(num_directions, bool)
  finite[list(broken)] = False
  coefficients = np.where(finite, rng.normal(size=num_directions), 0)
  values = rng.normal(size=(num_directions, 2))
  values[~finite, 0] = np.nan
  return zo.Estimate(
    keys=keys_lib.DirectionKey(
      jax.random.split(direction_key, num_directions), subspace_key
    ),
    coefficients=jnp.asarray(coefficients, jnp.float32),
    num_nonfinite=jnp.int32(len(broken)),
    values=jnp.asarray(values, jnp.float32),
    aux=(),
  )


@jax.jit
def _unit(direction_key, subspace_key, tree):
  return SAMPLER.weighted_sum(
    tree, keys_lib.DirectionKey(direction_key[None], subspace_key), jnp.ones(1)
  )


def _flat(tree):
  leaves = [np.array(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
  return np.concatenate([leaf.reshape(-1) for leaf in leaves])


def _sum(estimate, coefficients, base):
  """Sums c_q z_q over finite q and divides by their number, in float64."""
  direction_key, subspace_key = estimate.keys
  total = sum(
    float(c) * _flat(_unit(k, subspace_key, base))
    for k, c in zip(direction_key, coefficients)
  )
  return total / (len(direction_key) - int(estimate.num_nonfinite))


def _updater(tx, **options):
  fixed = dict(sampler=SAMPLER, objective=None, key=KEY)
  return jax.jit(functools.partial(tx.update, **fixed), **options)


def _run(tx, num_directions, num_steps=4):
  """Returns the bases visited and the gradients that moved them."""
  tx = outer.to_outer_transform(tx)
  base = _base()
  state = tx.init(base)
  update = _updater(tx)
  bases, gradients = [_flat(base)], []
  for step in range(num_steps):
    estimate = _estimate(step, num_directions)
    gradients.append(_sum(estimate, estimate.coefficients, base))
    base, state = update(base, state, estimate)
    bases.append(_flat(base))
  assert update._cache_size() == 1
  return bases, gradients, state


def _close(left, right):
  np.testing.assert_allclose(left, right, rtol=1e-5, atol=2e-6)


def _same(left, right):
  jax.tree.map(np.testing.assert_array_equal, left, right)


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
  _close(state.learning_rate, 0.4)
  assert len(jax.tree.leaves(state)) == 2


def test_sgd_rate_lives_in_the_state():
  tx = outer.sgd(0.5)
  base, estimate = _base(), _estimate(0, 2)
  update = _updater(tx)
  state = tx.init(base)
  for rate in (0.5, 2.0):
    state = state._replace(learning_rate=jnp.float32(rate))
    moved, _ = update(base, state, estimate)
    gradient = _sum(estimate, estimate.coefficients, base)
    _close(_flat(moved), _flat(base) - rate * gradient)
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


SCALINGS = {
  "clip": outer.clip(0.5),
  "sign": outer.sign(),
  "std": outer.scale_by_std(),
  "rms": outer.scale_by_running_rms(0.9),
}


def test_weight_decay_is_that_of_optax_on_matrices():
  base, estimate = _base(), _estimate(0, 2)
  fused = outer.sgd(0.3, weight_decay=0.1)
  matrices = {"plain": True, "layers": {"bias": False, "kernel": True}}
  explicit = outer.from_optax(
    optax.chain(optax.add_decayed_weights(0.1, mask=matrices), optax.sgd(0.3))
  )
  moved = [
    _flat(_updater(tx)(base, tx.init(base), estimate)[0])
    for tx in (fused, explicit)
  ]
  _close(*moved)
  plain = outer.sgd(0.3)
  without, _ = _updater(plain)(base, plain.init(base), estimate)
  assert np.abs(moved[0] - _flat(without)).max() > 0.01


def test_conservative_takes_the_best_of_three():
  target = _flat(_base()) + np.random.default_rng(1).normal(size=52)
  start = _base()

  def objective(base):
    x = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(base)])
    # Far on one side there is nothing, which is never best.
    return jnp.where(x[0] > 2.0, jnp.nan, jnp.sum((x - target) ** 2))

  tx = outer.conservative(0.3)
  update = jax.jit(
    lambda base, state, estimate: tx.update(
      base, state, estimate, SAMPLER, objective, KEY
    )
  )
  base, state, taken = start, tx.init(start), []
  for step in range(25):
    estimate = _estimate(step, 1)
    before, value = _flat(base), float(objective(base))
    move = 0.3 * _sum(estimate, estimate.coefficients, base)
    base, state = update(base, state, estimate)
    candidates = [before - move, before, before + move]
    values = [
      np.inf if x[0] > 2 else np.sum((x - target) ** 2) for x in candidates
    ]
    taken.append(int(np.argmin(values)))
    _close(_flat(base), candidates[taken[-1]])
    assert float(objective(base)) <= value
  assert set(taken) == {0, 1, 2}
  with pytest.raises(ValueError, match="one direction"):
    update(base, state, _estimate(0, 2))


def test_conservative_stays_where_nothing_is_finite():
  tx, base = outer.conservative(0.3), _base()
  moved, _ = _updater(tx, static_argnames="objective")(
    base, tx.init(base), _estimate(0, 1), objective=lambda base: jnp.nan
  )
  _same(moved, base)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
  "tx",
  [
    outer.sgd(0.3, *SCALINGS.values(), weight_decay=0.1),
    outer.sgd(optax.linear_schedule(1.0, 0.1, 5)),
    outer.from_optax(optax.adamw(0.3), SCALINGS["rms"], SCALINGS["std"]),
  ],
  ids=["sgd", "schedule", "adam"],
)
def test_nothing_finite_changes_nothing(tx, dtype):
  base = _base(dtype)
  update = _updater(tx)
  base, state = update(base, tx.init(base), _estimate(0, 2))
  after, after_state = update(base, state, _estimate(1, 2, broken=(0, 1)))
  _same(after, base)
  _same(after_state, state)


@pytest.mark.parametrize("make", [outer.sgd, optax.sgd])
def test_broken_directions_do_not_count(make):
  tx = outer.to_outer_transform(make(1.0))
  base, estimate = _base(), _estimate(0, 4, broken=(1, 3))
  moved, _ = _updater(tx)(base, tx.init(base), estimate)
  z = [
    _flat(_unit(k, estimate.keys.subspace, base))
    for k in estimate.keys.direction
  ]
  c = np.array(estimate.coefficients, np.float64)
  _close(_flat(moved), _flat(base) - (c[0] * z[0] + c[2] * z[2]) / 2)


@pytest.mark.parametrize("make", [outer.sgd, optax.sgd])
def test_small_steps_survive_bfloat16(make):
  # A hundred steps of a fiftieth of the spacing at 1.
  base = {"w": jnp.ones((40, 100), jnp.bfloat16)}
  tx = outer.to_outer_transform(make(2.0**-7 / 50))
  estimate = _estimate(0, 1)._replace(coefficients=-jnp.ones(1))
  z = np.array(
    _unit(estimate.keys.direction[0], estimate.keys.subspace, base)["w"]
  )

  def step(i, carry):
    key = jax.random.fold_in(KEY, i)
    return tx.update(*carry, estimate, SAMPLER, None, key)

  run = jax.jit(lambda carry: jax.lax.fori_loop(0, 100, step, carry))
  after, _ = run((base, tx.init(base)))
  moved = np.array(after["w"], np.float64) - 1
  np.testing.assert_allclose(moved[z > 0].mean(), 2.0**-6, rtol=0.1)
  np.testing.assert_allclose(moved[z < 0].mean(), -(2.0**-6), rtol=0.1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sgd_needs_no_copy_of_the_weights(dtype):
  base = {"layers": {"kernel": jnp.zeros((16, 128, 256), dtype)}}
  size = base["layers"]["kernel"].nbytes
  temp = {}
  scalings = SCALINGS["rms"], SCALINGS["std"]
  for name, tx in (
    ("in place", outer.sgd(0.1, *scalings, weight_decay=0.1)),
    ("optax", outer.to_outer_transform(optax.sgd(0.1))),
  ):
    update = _updater(tx, donate_argnums=0)
    lowered = update.lower(base, tx.init(base), _estimate(0, 3))
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= size
    temp[name] = memory.temp_size_in_bytes
  # In place: a few layers in float32. Written out: the float32 gradient.
  assert temp["in place"] < 3 * 128 * 256 * 4
  assert temp["optax"] >= 16 * 128 * 256 * 4


def test_donated_weights_are_gone():
  tx = outer.sgd(0.1)
  base = _base()
  update = _updater(tx, donate_argnums=(0, 1))
  moved, _ = update(base, tx.init(base), _estimate(0, 1))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(base))
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(moved))
