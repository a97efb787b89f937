"""A bilevel problem with a loss of closed form, for tests of the step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import zofo_jax as zofo
from tests.core.problems import SAMPLER, normal, not_differentiated
from zofo_jax.core import keys as keys_lib
from zofo_jax.core import outer

D, ROWS, T = 8, 8, 3


def loss(base, adapter, batch, key):
  """Weighted squares of x (w_0 + w_1 a) + c b - y, coupling both levels."""
  del key
  x, y, weight = batch
  w = not_differentiated(base["layers"]["w"])
  c = not_differentiated(base["c"])
  residual = x @ (w[0] + w[1] * adapter["a"]) + c * adapter["b"] - y
  return jnp.sum(weight * residual**2) / jnp.sum(weight)


def start():
  """Returns what `init` takes: a key, the backbone, p and s."""
  draw = normal(0)
  base = {"layers": {"w": draw(2, D)}, "c": draw()}
  upper, lower = ({"a": draw(D), "b": draw()} for _ in range(2))
  return jax.random.key(11), base, upper, lower


def make_batch(seed=0, rows=ROWS):
  draw = normal(100 + seed)
  make = lambda *lead: (draw(*lead, D), draw(*lead), jnp.ones(lead))
  return zofo.BilevelBatch(
    lower=make(T, ROWS), penalty=make(ROWS), upper=make(rows)
  )


def make_algorithm(loss=loss, upper_loss=None, **options):
  defaults = {
    "lower_tx": optax.adam(3e-2),
    "upper_tx": optax.adam(1e-2),
    "base_tx": outer.sgd(1e-2),
    "zo": zofo.ZerothOrder(SAMPLER),
  }
  return zofo.make_bilevel_step(loss, upper_loss, **(defaults | options))


def remember_keys(tx, num_directions):
  """Keeps the keys of the last estimate in the state, for the slow path."""
  tx = outer.to_outer_transform(tx)
  blank = jax.random.key(0)
  blank = keys_lib.DirectionKey(jax.random.split(blank, num_directions), blank)

  def update(base, state, estimate, *args):
    base, state = tx.update(base, state[0], estimate, *args)
    return base, (state, estimate.keys)

  return outer.OuterTransform(lambda base: (tx.init(base), blank), update)


def assert_close(left, right, rtol=1e-5, atol=1e-5):
  assert jax.tree.structure(left) == jax.tree.structure(right)

  def check(a, b):
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)

  jax.tree.map(check, left, right)
