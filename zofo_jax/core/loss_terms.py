"""Several losses at one backbone; equal functions are one batched call."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from zofo_jax.core import tree as tree_lib
from zofo_jax.core.types import LossFn

# A loss, its adapter and its batch.
Term = tuple[LossFn, Any, Any]


def _same_structure(trees: Iterable[Any]) -> bool:
  """Returns whether trees agree in structure, and leaves in shape and dtype."""
  first, *others = (jax.tree.map(jax.typeof, tree) for tree in trees)
  return all(other == first for other in others)


def evaluate_losses(
  terms: Sequence[Term], base: Any, keys: jax.Array | None
) -> jax.Array:
  """Evaluates several losses at one backbone.

  Terms of one function and one shape become a batch axis of one call, so that
  the backbone's products, and its perturbation, are shared between them.

  Args:
    terms: a loss, its adapter and its batch each.
    base: backbone parameters, perturbed or not.
    keys: typed PRNG keys, shape [terms], or None for no dropout.

  Returns:
    float32, shape [terms].
  """
  loss_fns, adapters, batches = zip(*terms, strict=True)
  if len(set(loss_fns)) == 1 and _same_structure(zip(adapters, batches)):
    losses = jax.vmap(
      loss_fns[0], in_axes=(None, 0, 0, None if keys is None else 0)
    )(base, tree_lib.stack(adapters), tree_lib.stack(batches), keys)
  else:
    losses = jnp.stack(
      [
        loss_fn(base, adapter, batch, None if keys is None else keys[i])
        for i, (loss_fn, adapter, batch) in enumerate(terms)
      ]
    )
  return losses.astype(jnp.float32)


def loss_gradients(
  terms: Sequence[Term], base: Any, keys: jax.Array, *, has_aux: bool = False
) -> tuple[jax.Array, list[Any], list[Any]]:
  """Evaluates several losses at one backbone, and their adapters' gradients.

  One after the other, so that only one loss's activations exist at a time;
  terms of one function and one shape are computed by one program in a loop.

  Args:
    terms: a loss, its adapter and its batch each.
    base: backbone parameters.
    keys: typed PRNG keys, shape [terms].
    has_aux: whether the losses return (scalar, aux).

  Returns:
    Losses, float32, shape [terms]; for each term a tree like its adapter; for
    each term its aux, () without `has_aux`.
  """
  loss_fns, adapters, batches = zip(*terms, strict=True)

  def value_and_grad(loss_fn, adapter, batch, key):
    value, grads = jax.value_and_grad(loss_fn, argnums=1, has_aux=has_aux)(
      base, adapter, batch, key
    )
    loss, aux = value if has_aux else (value, ())
    return loss, grads, aux

  if len(set(loss_fns)) == 1 and _same_structure(zip(adapters, batches)):
    stacked = (tree_lib.stack(adapters), tree_lib.stack(batches), keys)
    losses, *stacked_parts = jax.lax.map(
      lambda term: value_and_grad(loss_fns[0], *term), stacked
    )
    parts = [
      jax.tree.map(lambda leaf, i=i: leaf[i], tuple(stacked_parts))
      for i in range(len(terms))
    ]
  else:
    triples = [
      value_and_grad(*term, key) for term, key in zip(terms, keys, strict=True)
    ]
    losses = jnp.stack([loss for loss, *_ in triples])
    parts = [(grads, aux) for _, grads, aux in triples]
  all_grads, all_aux = map(list, zip(*parts, strict=True))
  return losses.astype(jnp.float32), all_grads, all_aux


def over_tasks(fn: Callable[..., Any], num_tasks: int | None) -> Any:
  """Maps a function over the tasks' axis of its arguments, if there is one.

  A single task is computed without the axis, so that the results are those of a
  step without it, bit for bit.
  """
  if num_tasks is None:
    return fn
  if num_tasks > 1:
    return jax.vmap(fn)

  def call(*args):
    result = fn(*jax.tree.map(lambda leaf: leaf[0], args))
    return jax.tree.map(lambda leaf: leaf[None], result)

  return call


def without_aux(
  lower_loss_fn: Callable[..., Any], upper_loss_fn: Callable[..., Any]
) -> tuple[LossFn, LossFn]:
  """Drops the aux of the losses; equal functions remain equal."""
  lower_fn = lambda *args: lower_loss_fn(*args)[0]
  if upper_loss_fn == lower_loss_fn:
    return lower_fn, lower_fn
  return lower_fn, lambda *args: upper_loss_fn(*args)[0]


def make_objective(
  upper_fn: LossFn,
  lower_fn: LossFn,
  penalty: jax.Array,
  num_tasks: int | None,
  weights: jax.Array | None,
) -> Callable[..., jax.Array]:
  """Returns the objective G of theta, or the mean of the tasks'.

  Args:
    upper_fn: L on D_f, without aux.
    lower_fn: L on D_p, without aux.
    penalty: lam, float32, shape [].
    num_tasks: M, of the leading axis of adapters and rows; None: there is none.
    weights: of the tasks, float32 [M]; None for equal ones.

  Returns:
    (theta, p, s, rows of D_f and D_p, with_penalty=True) -> float32, shape [].
    With s None its term is left out, without the penalty both of D_p are.
  """

  def objective(base, upper, lower, rows, with_penalty=True):
    def of_task(upper, lower, rows, penalty_rows):
      terms = [(upper_fn, upper, rows)]
      if with_penalty:
        terms.append((lower_fn, upper, penalty_rows))
      if lower is not None:
        terms.append((lower_fn, lower, penalty_rows))
      losses = evaluate_losses(terms, base, None)
      if len(losses) == 1:
        return losses[0]
      difference = losses[1] - losses[2] if len(losses) == 3 else losses[1]
      return losses[0] + penalty * difference

    # Within the tasks' axis theta has none: a weight is perturbed once for all.
    values = over_tasks(of_task, num_tasks)(upper, lower, *rows)
    if num_tasks is None:
      return values
    return jnp.average(values, weights=weights)

  return objective
