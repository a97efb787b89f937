"""Backbone updates against textbook formulae and compiled memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.core.problems import (
  KEY,
  SAMPLER,
  flatten,
  make_base,
  make_estimate,
  make_updater,
  mean_direction,
  unit_direction,
)
from zofo_jax.core import outer


def _run(tx, num_directions, num_steps=4):
  """Returns the bases visited and the gradients that moved them."""
  tx = outer.to_outer_transform(tx)
  base = make_base()
  state = tx.init(base)
  update = make_updater(tx)
  bases, gradients = [flatten(base)], []
  for step in range(num_steps):
    estimate = make_estimate(step, num_directions)
    gradients.append(mean_direction(estimate, estimate.coefficients, base))
    base, state = update(base, state, estimate)
    bases.append(flatten(base))
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
  base, estimate = make_base(), make_estimate(0, 2)
  update = make_updater(tx)
  state = tx.init(base)
  for rate in (0.5, 2.0):
    state = state._replace(learning_rate=jnp.float32(rate))
    moved, _ = update(base, state, estimate)
    gradient = mean_direction(estimate, estimate.coefficients, base)
    _close(flatten(moved), flatten(base) - rate * gradient)
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
  base, estimate = make_base(), make_estimate(0, 2)
  fused = outer.sgd(0.3, weight_decay=0.1)
  matrices = {"plain": True, "layers": {"bias": False, "kernel": True}}
  explicit = outer.from_optax(
    optax.chain(optax.add_decayed_weights(0.1, mask=matrices), optax.sgd(0.3))
  )
  moved = [
    flatten(make_updater(tx)(base, tx.init(base), estimate)[0])
    for tx in (fused, explicit)
  ]
  _close(*moved)
  plain = outer.sgd(0.3)
  without, _ = make_updater(plain)(base, plain.init(base), estimate)
  assert np.abs(moved[0] - flatten(without)).max() > 0.01


def test_conservative_takes_the_best_of_three():
  target = flatten(make_base()) + np.random.default_rng(1).normal(size=52)
  start = make_base()

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
    estimate = make_estimate(step, 1)
    before, value = flatten(base), float(objective(base))
    move = 0.3 * mean_direction(estimate, estimate.coefficients, base)
    base, state = update(base, state, estimate)
    candidates = [before - move, before, before + move]
    values = [
      np.inf if x[0] > 2 else np.sum((x - target) ** 2) for x in candidates
    ]
    taken.append(int(np.argmin(values)))
    _close(flatten(base), candidates[taken[-1]])
    assert float(objective(base)) <= value
  assert set(taken) == {0, 1, 2}
  with pytest.raises(ValueError, match="one direction"):
    update(base, state, make_estimate(0, 2))


def test_conservative_stays_where_nothing_is_finite():
  tx, base = outer.conservative(0.3), make_base()
  moved, _ = make_updater(tx, static_argnames="objective")(
    base, tx.init(base), make_estimate(0, 1), objective=lambda base: jnp.nan
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
  base = make_base(dtype)
  update = make_updater(tx)
  base, state = update(base, tx.init(base), make_estimate(0, 2))
  after, after_state = update(base, state, make_estimate(1, 2, broken=(0, 1)))
  _same(after, base)
  _same(after_state, state)


@pytest.mark.parametrize("make", [outer.sgd, optax.sgd])
def test_broken_directions_do_not_count(make):
  tx = outer.to_outer_transform(make(1.0))
  base, estimate = make_base(), make_estimate(0, 4, broken=(1, 3))
  moved, _ = make_updater(tx)(base, tx.init(base), estimate)
  z = [
    flatten(unit_direction(k, estimate.keys.subspace, base))
    for k in estimate.keys.direction
  ]
  c = np.array(estimate.coefficients, np.float64)
  _close(flatten(moved), flatten(base) - (c[0] * z[0] + c[2] * z[2]) / 2)


@pytest.mark.parametrize("make", [outer.sgd, optax.sgd])
def test_small_steps_survive_bfloat16(make):
  # A hundred steps of a fiftieth of the spacing at 1.
  base = {"w": jnp.ones((40, 100), jnp.bfloat16)}
  tx = outer.to_outer_transform(make(2.0**-7 / 50))
  estimate = make_estimate(0, 1)._replace(coefficients=-jnp.ones(1))
  z = np.array(
    unit_direction(estimate.keys.direction[0], estimate.keys.subspace, base)[
      "w"
    ]
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
    update = make_updater(tx, donate_argnums=0)
    lowered = update.lower(base, tx.init(base), make_estimate(0, 3))
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= size
    temp[name] = memory.temp_size_in_bytes
  # In place: a few layers in float32. Written out: the float32 gradient.
  assert temp["in place"] < 3 * 128 * 256 * 4
  assert temp["optax"] >= 16 * 128 * 256 * 4


def test_donated_weights_are_gone():
  tx = outer.sgd(0.1)
  base = make_base()
  update = make_updater(tx, donate_argnums=(0, 1))
  moved, _ = update(base, tx.init(base), make_estimate(0, 1))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(base))
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(moved))
