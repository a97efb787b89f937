"""Work-arounds for how XLA schedules and fuses, each with its platforms.

None of them changes a number; they change what is kept in memory, and when it
is computed. They were found in programs compiled by jaxlib 0.10 for CPU and
GPU, and ahead of time for TPU. Whoever updates jaxlib may try without them:
tests of the compiled programs (temporaries, loops, conditionals) show whether
they are still needed.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

_T = TypeVar("_T")


def by_platform(
  *args: Any,
  default: Callable[..., _T],
  cpu: Callable[..., _T] | None = None,
  gpu: Callable[..., _T] | None = None,
  tpu: Callable[..., _T] | None = None,
) -> _T:
  """Calls the function of the platform that the program is compiled for."""
  functions = {"cpu": cpu, "cuda": gpu, "rocm": gpu, "tpu": tpu}
  given = {name: fn for name, fn in functions.items() if fn is not None}
  return jax.lax.platform_dependent(*args, default=default, **given)


def no_fusion(x: _T) -> _T:
  """Returns x, computed and stored before anything that uses it.

  GPU: XLA keeps the barrier until it has fused. CPU and TPU remove barriers
  earlier; a loop (`prng.threefry2x32_materialized`) or `in_a_branch` is needed
  there.
  """
  return jax.lax.optimization_barrier(x)


def depends_on(x: _T, before: Any) -> _T:
  """Returns x, which exists only once `before` has been computed.

  TPU and GPU: without it, XLA forms all perturbed matrices of a layer at once.
  CPU does not, and is faster without the constraint.
  """
  x, _ = jax.lax.optimization_barrier((x, before))
  return x


def after(x: jax.Array, floats: jax.Array) -> jax.Array:
  """Returns x; on a CPU it exists only once `floats` have been computed.

  CPU, which removes barriers: without it, XLA computes what follows from x at
  the same time as the floats, and keeps both. No float is larger than infinity.
  """

  def select(x, floats):
    return jnp.where(jnp.any(floats > jnp.inf), jnp.zeros_like(x), x)

  return by_platform(x, floats, cpu=select, default=lambda x, _: x)


def recompute(x: _T) -> _T:
  """Returns x, which XLA cannot tell to be the x used elsewhere.

  All platforms: what is derived from it is computed again and not exchanged
  between devices or kept in memory.
  """
  return jax.lax.optimization_barrier(x)


def in_a_loop(x: jax.Array, word: Any) -> jax.Array:
  """Returns x, computed once and stored, however many products read it.

  CPU: XLA fuses what is cheap with the layout of each operand, and keeps what
  it reads until the last one is computed. What a loop carries is in memory.

  Args:
    x: float, any shape.
    word: any traced uint32, shape []: the condition, never true, is made of it
      so that XLA cannot remove the loop.
  """
  # An iteration would change x; it is not carried otherwise.
  loop = jax.lax.while_loop(
    lambda carry: (carry[0] | 1) == 0,
    lambda carry: (carry[0], -carry[1]),
    (word, x),
  )
  return loop[1]


def in_a_branch(fn: Callable[[Any], jax.Array], arg: Any, word: Any) -> Any:
  """Returns fn(arg), computed once and stored.

  CPU: XLA fuses an expensive elementwise function into each of its uses and
  recomputes it there. What a branch of a conditional returns is in memory.

  Args:
    fn: the function.
    arg: its argument.
    word: any traced uint32, shape []: the condition, always true, is made of it
      so that XLA cannot fold it.
  """
  return jax.lax.cond(
    (word | 1) > 0, fn, lambda arg: jnp.zeros_like(fn(arg)), arg
  )
