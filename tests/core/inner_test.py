"""The scanned inner loop against a plain Python loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.core.problems import normal, not_differentiated
from zofo_jax.core import inner

NUM_STEPS = 5


def _loss(base, adapter, batch, key):
  """A nonlinear regression with dropout on the adapter's input."""
  x, y = batch
  mask = jax.random.bernoulli(key, 0.8, x.shape)
  weight = not_differentiated(base["w"])
  prediction = jnp.tanh(x @ weight) + (x * mask) @ adapter["a"]
  return jnp.mean((prediction + adapter["b"] - y) ** 2)


def _problem():
  draw = normal(0)
  base = {"w": draw(6)}
  adapter = {"a": draw(6), "b": draw()}
  batches = (draw(NUM_STEPS, 8, 6), draw(NUM_STEPS, 8))
  return base, adapter, batches


@pytest.mark.parametrize(
  "tx",
  [
    optax.sgd(0.1, momentum=0.9),
    optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
  ],
  ids=["momentum", "clip+adamw"],
)
def test_scan_equals_a_python_loop(tx):
  base, adapter, batches = _problem()
  key = jax.random.key(3)
  got, got_state, got_losses = jax.jit(
    functools.partial(inner.minimize, _loss, tx=tx)
  )(base, adapter, tx.init(adapter), batches, key)

  @jax.jit
  def step(adapter, state, batch, key):
    loss, grads = jax.value_and_grad(_loss, argnums=1)(
      base, adapter, batch, key
    )
    updates, state = tx.update(grads, state, adapter)
    return optax.apply_updates(adapter, updates), state, loss

  state, losses = tx.init(adapter), []
  for t in range(NUM_STEPS):
    batch = jax.tree.map(lambda leaf, t=t: leaf[t], batches)
    adapter, state, loss = step(
      adapter, state, batch, jax.random.fold_in(key, t)
    )
    losses.append(loss)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, got, adapter)
  jax.tree.map(close, got_state, state)
  close(got_losses, np.array(losses))
  assert got_losses.shape == (NUM_STEPS,) and got_losses.dtype == jnp.float32
  assert losses[-1] != losses[0]


def test_the_guard_fires_when_the_base_is_differentiated():
  base, adapter, batches = _problem()
  batch = jax.tree.map(lambda leaf: leaf[0], batches)
  with pytest.raises(AssertionError, match="theta"):
    jax.grad(_loss)(base, adapter, batch, jax.random.key(0))


def test_dropout_differs_by_step_and_the_key_decides():
  def loss(base, adapter, batch, key):
    return jax.random.uniform(key) + 0.0 * adapter

  run = jax.jit(functools.partial(inner.minimize, loss, tx=optax.sgd(0.1)))
  arguments = (None, jnp.float32(1.0), optax.sgd(0.1).init(0.0))
  seen = {
    seed: np.array(run(*arguments, jnp.zeros(7), jax.random.key(seed))[2])
    for seed in (0, 1)
  }
  assert len(np.unique(np.concatenate(list(seen.values())))) == 14
  repeated = run(*arguments, jnp.zeros(7), jax.random.key(0))[2]
  np.testing.assert_array_equal(repeated, seen[0])


def test_error_decays_linearly_in_the_number_of_steps():
  # 0.5 h (s - target)^2 by SGD: the error shrinks by 1 - lr h at each step.
  def loss(base, adapter, batch, key):
    return 0.5 * base * (adapter - batch) ** 2

  for num_steps in (1, 4, 16):
    adapter, _, _ = jax.jit(
      functools.partial(inner.minimize, loss, tx=optax.sgd(0.1))
    )(
      jnp.float32(2.0),
      jnp.float32(5.0),
      optax.sgd(0.1).init(0.0),
      jnp.ones(num_steps),
      jax.random.key(0),
    )
    np.testing.assert_allclose(adapter - 1, 4 * 0.8**num_steps, rtol=1e-4)
