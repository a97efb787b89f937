"""First-order steps on an adapter with the backbone held fixed.

The lower level of Bilevel-ZOFO: T steps of an optax transformation on
L(theta, s; D_p), in one `lax.scan`. The backbone is closed over, so nothing
is ever differentiated with respect to it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from zofo_jax.core import tree as tree_lib
from zofo_jax.core.types import LossFn


def apply_gradients(
  grads: Any,
  opt_state: optax.OptState,
  adapter: Any,
  *,
  tx: optax.GradientTransformation,
) -> tuple[Any, optax.OptState, jax.Array]:
  """Takes one optimizer step on an adapter, unless a gradient is not finite.

  Args:
    grads: gradient, a tree like `adapter`.
    opt_state: state of `tx`.
    adapter: adapter parameters.
    tx: optax transformation of the adapter.

  Returns:
    The adapter, the optimizer state and the gradient's norm, float32, shape [].
    If the norm is not finite, the first two are unchanged.
  """
  norm = optax.tree.norm(grads)
  updates, new_state = tx.update(grads, opt_state, adapter)
  new = (optax.apply_updates(adapter, updates), new_state)
  is_finite = jnp.isfinite(norm)
  adapter, opt_state = tree_lib.where(is_finite, new, (adapter, opt_state))
  return adapter, opt_state, norm


def minimize(
  loss_fn: LossFn,
  base: Any,
  adapter: Any,
  opt_state: optax.OptState,
  batches: Any,
  key: jax.Array,
  *,
  tx: optax.GradientTransformation,
) -> tuple[Any, optax.OptState, jax.Array]:
  """Takes T optimizer steps on an adapter.

  A step whose gradient is not finite is skipped.

  Args:
    loss_fn: the lower loss.
    base: backbone parameters; not differentiated.
    adapter: adapter parameters.
    opt_state: state of `tx` for the adapter.
    batches: batches stacked on a leading axis T; T is read from the shape.
    key: typed PRNG key, shape []. Folded with the index of the step.
    tx: optax transformation of the adapter.

  Returns:
    The adapter, the optimizer state and the losses, float32, shape [T].
  """
  num_steps = jax.tree.leaves(batches)[0].shape[0]

  def step(carry, xs):
    adapter, opt_state = carry
    batch, index = xs
    loss, grads = jax.value_and_grad(loss_fn, argnums=1)(
      base, adapter, batch, jax.random.fold_in(key, index)
    )
    adapter, opt_state, _ = apply_gradients(grads, opt_state, adapter, tx=tx)
    return (adapter, opt_state), loss.astype(jnp.float32)

  (adapter, opt_state), losses = jax.lax.scan(
    step, (adapter, opt_state), (batches, jnp.arange(num_steps))
  )
  return adapter, opt_state, losses
