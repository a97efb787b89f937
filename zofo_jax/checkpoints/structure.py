"""Structure of a saved state: names, shapes and types, compared before reading.

No array is read for it.
"""

from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from zofo_jax import errors


def check_structure(saved: Any, expected: Any, name: str) -> None:
  """Checks that a saved tree has the leaves of an expected one.

  Args:
    saved: arrays, or anything with a shape and a dtype.
    expected: the same, of the state that is to be restored.
    name: the checkpoint's, for the message.

  Raises:
    UserError: names the first leaf that is missing, is not expected, or has
      another shape or type.
  """
  actual = {path: _describe(leaf) for path, leaf in _flatten(saved).items()}
  wanted = {path: _describe(leaf) for path, leaf in _flatten(expected).items()}
  for path in sorted(actual.keys() | wanted.keys()):
    if actual.get(path) != wanted.get(path):
      raise errors.UserError(
        f"The checkpoint '{name}' does not fit this configuration: leaf "
        f"'{path}' is {actual.get(path, 'missing')} there, expected "
        f"{wanted.get(path, 'no such leaf')}."
        + ("" if path in actual else errors.nearest(path, actual))
      )


def without_none(state: Any) -> Any:
  """Returns a named tuple as a dictionary without the fields that are None.

  Older states, which lack these fields, are stored as the same.

  Args:
    state: any pytree; one that is no named tuple, or has no such field, is
      returned unchanged.
  """
  if not hasattr(state, "_asdict") or all(v is not None for v in state):
    return state
  return {k: v for k, v in state._asdict().items() if v is not None}


def with_default_sharding(leaf: Any) -> Any:
  """Returns the description of a leaf that orbax restores it by.

  Args:
    leaf: an array or a `jax.ShapeDtypeStruct`.

  Returns:
    A NumPy array unchanged; else a shape with a sharding, by default that of
    the first device.
  """
  if isinstance(leaf, np.ndarray):
    return leaf
  sharding = getattr(leaf, "sharding", None)
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _flatten(tree: Any) -> dict[str, Any]:
  """Flattens to names such as "upper/layers/attention/query/lora/a"."""
  flat = ocp.tree.to_flat_dict(tree)
  return {"/".join(map(str, path)): leaf for path, leaf in flat.items()}


def _describe(leaf: Any) -> str:
  """Returns a leaf's type and shape, a typed key's as those of its data."""
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.eval_shape(jax.random.key_data, leaf)
  return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
