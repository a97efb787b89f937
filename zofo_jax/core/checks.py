"""Checks of what a user passes in, before anything is computed.

They read shapes, dtypes and names alone, so they cost nothing, and hold for
arrays, for `jax.ShapeDtypeStruct`s and under jit. Each raises a `ValueError`
of one sentence: the name, what was found, what was expected.
"""

import functools
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zofo_jax.core import directions, types
from zofo_jax.core import sampler as sampler_lib
from zofo_jax.core import tree as tree_lib

_ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
# Names that a message lists before it says how many more there are.
_MAX_NAMES = 8


def check_arrays(params: types.Params, name: str) -> None:
  """Checks that parameters are a pytree of arrays.

  Args:
    params: pytree of parameters, or of their shapes.
    name: what the parameters are, for the message.

  Raises:
    ValueError: a leaf is a function, a number or a string, or a PRNG key.
  """
  for path, leaf in tree_lib.named_leaves(params).items():
    about = f"{name}: the leaf '{path}' is"
    if callable(leaf) and not isinstance(leaf, _ARRAYS):
      raise ValueError(
        f"{about} a function; expected arrays, such as the first part of "
        "eqx.partition(model, eqx.is_array)."
      )
    if not isinstance(leaf, _ARRAYS):
      raise ValueError(
        f"{about} of type {type(leaf).__name__}; expected arrays."
      )
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      raise ValueError(
        f"{about} a PRNG key; expected weights alone, such as the state params "
        "of graphdef, params, rest = nnx.split(model, nnx.Param, ...)."
      )


def check_sampler(
  sampler: sampler_lib.Sampler, params: types.Params, name: str
) -> None:
  """Checks that a sampler fits the parameters.

  Args:
    sampler: which parameters are perturbed, and along what directions.
    params: pytree of arrays, or of their shapes.
    name: what the parameters are, for the message.

  Raises:
    ValueError: nothing is selected, `stacked` matches leaves that are not
      stacks of layers, `layers` is out of range, or a low-rank direction
      meets no matrix.
  """
  floating = {
    path: tuple(leaf.shape)
    for path, leaf in tree_lib.named_leaves(params).items()
    if jnp.issubdtype(leaf.dtype, jnp.floating)
  }
  if not floating:
    raise ValueError(f"{name} has no floating-point leaf to perturb.")
  selected = {p: shape for p, shape in floating.items() if sampler.select(p)}
  if not selected:
    raise ValueError(
      f"Sampler.select matches no floating-point leaf of {name}; the leaves "
      f"are {_join(floating)}."
    )
  depths = _check_stacks(sampler.stacked, selected)
  if sampler.layers is not None:
    _check_layers(sampler.layers, depths)
  low_rank = [
    kind
    for kind in nested_directions(sampler.direction)
    if isinstance(kind, directions.LowRank)
  ]
  ranks = {
    path: len(shape) - (path in depths) for path, shape in selected.items()
  }
  if low_rank and 2 not in ranks.values():
    raise ValueError(
      f"{low_rank[0]}: no selected leaf of {name} is a matrix; found "
      f"{_join(selected)}: if their first axis counts layers, match their "
      "paths by Sampler.stacked."
    )


def _check_stacks(
  pattern: str | None, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
  """Returns the number of layers of every stacked leaf."""
  depths: dict[str, int] = {}
  first: dict[str, str] = {}
  for path, shape in shapes.items():
    match = re.search(pattern, path) if pattern is not None else None
    if match is None:
      continue
    if not shape:
      raise ValueError(
        f"Sampler.stacked={pattern!r} matches '{path}', a scalar; expected "
        "leaves whose first axis counts layers."
      )
    depths[path] = shape[0]
    # Two stacks of a model may differ in depth, one stack's leaves may not.
    other = first.setdefault(path[: match.end()], path)
    if depths[other] != shape[0]:
      raise ValueError(
        f"Sampler.stacked={pattern!r} matches leaves of unequal first axes, "
        f"'{other}' {list(shapes[other])} and '{path}' {list(shape)}; expected "
        "stacks of layers, or stacked=None if the layers are separate leaves."
      )
  return depths


def _check_layers(layers: tuple[int, ...], depths: Mapping[str, int]) -> None:
  if not depths:
    raise ValueError(
      f"Sampler.layers={layers}, but no selected leaf is stacked; match the "
      "paths of leaves whose first axis counts layers by Sampler.stacked."
    )
  count = min(depths.values())
  if len(set(layers)) < len(layers) or not set(layers) <= set(range(count)):
    raise ValueError(
      f"Sampler.layers={layers}; expected different numbers from 0 to "
      f"{count - 1}."
    )


def nested_directions(
  direction: directions.Direction,
) -> Iterator[directions.Direction]:
  """Yields a direction and those that it is made of."""
  yield direction
  for name in getattr(direction, "__dataclass_fields__", ()):
    part = getattr(direction, name)
    if hasattr(part, "sample"):
      yield from nested_directions(part)


def check_arguments(
  fn: Callable[..., Any], name: str, arguments: tuple[str, ...]
) -> None:
  """Checks that a function can be called with these positional arguments.

  Raises:
    ValueError: it cannot.
  """
  if not callable(fn):
    raise ValueError(f"{name} is {fn!r}; expected a function.")
  try:
    signature = inspect.signature(fn)
  except (TypeError, ValueError):  # compiled functions may have none
    return
  try:
    signature.bind(*arguments)
  except TypeError:
    raise ValueError(
      f"{name} takes {signature}; expected ({', '.join(arguments)})."
    ) from None


def checked_loss(
  fn: Callable[..., Any], name: str, has_aux: bool = False
) -> Callable[..., Any]:
  """Wraps a loss so that its result is checked when it is traced.

  Args:
    fn: the loss. Errors that it raises itself pass through.
    name: what it is called in messages.
    has_aux: whether it returns (loss, aux).

  Returns:
    A function like `fn`, which raises a ValueError where the loss is not a
    floating-point scalar, and warns where it is of low precision.
  """
  checked = _checked(fn, name, has_aux, jnp.floating, "a floating-point scalar")

  @functools.wraps(fn)
  def call(*args: Any) -> Any:
    result = checked(*args)
    value = result[0] if has_aux else result
    if jnp.finfo(jnp.result_type(value)).bits < 32:
      warnings.warn(
        f"{name} returned {_describe(value)}; expected float32, since "
        "differences of losses that are rounded to so few digits are mostly "
        "rounding.",
        stacklevel=2,
      )
    return result

  return call


def checked_score(
  fn: Callable[..., Any], name: str, has_aux: bool = False
) -> Callable[..., Any]:
  """Wraps a function as `checked_loss`; counts and booleans will do, too."""
  return _checked(fn, name, has_aux, jnp.generic, "a scalar")


def _checked(fn, name, has_aux, dtype, expected):
  @functools.wraps(fn)
  def call(*args: Any) -> Any:
    result = fn(*args)
    value = result
    if has_aux:
      if not isinstance(result, tuple) or len(result) != 2:
        raise ValueError(
          f"{name} returned {_describe(result)}; expected a pair, {expected} "
          "and aux, as has_aux is True."
        )
      value, _ = result
    elif isinstance(result, tuple):
      raise ValueError(
        f"{name} returned {_describe(result)}; expected {expected}, or a pair "
        "of it and aux with has_aux=True."
      )
    if not (
      isinstance(value, (*_ARRAYS, int, float))
      and jnp.shape(value) == ()
      and jnp.issubdtype(jnp.result_type(value), dtype)
    ):
      raise ValueError(
        f"{name} returned {_describe(value)}; expected {expected}."
      )
    return result

  return call


def check_lower_batch(batch: types.BilevelBatch, axis: int = 0) -> None:
  """Checks that `batch.lower` has the axis of the T inner steps.

  Args:
    batch: rows of one outer iteration.
    axis: number of that axis: 0, or 1 behind an axis of tasks.

  Raises:
    ValueError: its leaves have not one axis more than those of
      `batch.penalty`, or that axis differs between them.
  """
  lower, penalty = map(tree_lib.named_leaves, (batch.lower, batch.penalty))
  lengths = {}
  for path, leaf in lower.items():
    shape = jnp.shape(leaf)
    about = f"batch.lower: the leaf '{path}' has" if path else "batch.lower has"
    if path in penalty:
      rows = jnp.shape(penalty[path])
      if len(shape) != len(rows) + 1:
        raise ValueError(
          f"{about} shape {list(shape)}, and batch.penalty {list(rows)}; "
          "expected one axis more, which counts the inner steps."
        )
    if len(shape) <= axis:
      raise ValueError(
        f"{about} shape {list(shape)}; expected an axis that counts the inner "
        "steps."
      )
    lengths[path] = shape[axis]
  if len(set(lengths.values())) > 1:
    raise ValueError(
      "batch.lower: expected one number of inner steps on all leaves; found "
      f"{_join(lengths)}."
    )


def check_examples(batch: Any, axis: int = 0) -> None:
  """Checks that all leaves of a batch have the same number of examples.

  Raises:
    ValueError: they have not, so that no example has a direction of its own.
  """
  shapes = {
    path: jnp.shape(leaf) for path, leaf in tree_lib.named_leaves(batch).items()
  }
  sizes = {shape[axis : axis + 1] for shape in shapes.values()}
  if len(sizes) != 1 or () in sizes:
    raise ValueError(
      "ZerothOrder.per_example: expected batches of one size; found "
      f"{_join(shapes)}."
    )


def _describe(value: Any) -> str:
  """Returns `float32[8]` for an array, else the type's name."""
  if isinstance(value, _ARRAYS):
    return f"{value.dtype}{list(value.shape)}"
  if isinstance(value, tuple):
    return f"a tuple of {len(value)}"
  return f"a value of type {type(value).__name__}"


def _join(values: Mapping[str, Any]) -> str:
  """Returns `'a' [2, 3], 'b' [4] and 7 more`."""
  listed = [
    f"'{path}' {list(value) if isinstance(value, tuple) else value}"
    for path, value in list(values.items())[:_MAX_NAMES]
  ]
  more = len(values) - len(listed)
  return ", ".join(listed) + (f" and {more} more" if more else "")
