"""Work-arounds for XLA: what they return, and that XLA keeps them."""

import jax
import jax.numpy as jnp
import numpy as np

from zofo_jax.core import xla


def test_what_comes_after_floats_is_the_same_and_waits_for_them():
  wait = jax.jit(xla.after)
  for x in (np.array([0, 7, 2**32 - 1], np.uint32), np.float32([0.0, -np.inf])):
    for value in (0.0, -1.5, np.inf, -np.inf, np.nan):
      floats = jnp.array([1.0, value], jnp.float32)
      np.testing.assert_array_equal(wait(x, floats), x)
    # The program that runs still compares the floats.
    program = wait.lower(x, floats).compile().as_text()
    assert "direction=GT" in program
