"""Which array is sharded along which axes of a mesh.

Weights are sharded by the rules of their family of models (`SHARDINGS`, which
is that of `models/transformer.py` in all families of this package), batches by
rows, and everything else is replicated; XLA partitions the program.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from zofo_jax import errors
from zofo_jax.core import offload
from zofo_jax.core import tree as tree_lib
from zofo_jax.core.array_like import is_array_like
from zofo_jax.sharding.mesh import ROW_AXES, AnyMesh

# (pattern searched in a leaf's path, its sharding); the first match wins.
Rules = Sequence[tuple[str, P]]


def replicated(mesh: AnyMesh) -> NamedSharding:
  """Returns the sharding of an array that every device holds whole."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh: AnyMesh, axis: int = 0) -> NamedSharding:
  """Returns the sharding of a batch whose rows are along an axis."""
  return NamedSharding(mesh, P(*[None] * axis, ROW_AXES))


def shardings(
  mesh: AnyMesh, tree: Any, rules: Rules, on_host: str | None = None
) -> Any:
  """Returns the sharding of each leaf of a tree; scalars are replicated.

  The parts of a quantized weight are sharded as the weight would be. An axis of
  too few blocks is not divided.

  Args:
    mesh: the devices.
    tree: arrays or shapes.
    rules: for every path.
    on_host: pattern of the paths of weights in the host's memory; None: none.

  Returns:
    A tree like `tree` of shardings.

  Raises:
    UserError: a leaf has no rule, or an axis does not divide it.
  """

  def sharding_of(path, leaf):
    if not leaf.shape:
      return replicated(mesh)
    name = tree_lib.path_name(path)
    specs = [spec for pattern, spec in rules if re.search(pattern, name)]
    if not specs:
      raise errors.UserError(
        f"config.mesh: no rule says how the weight {name} is sharded."
      )
    for axis, names in enumerate(specs[0]):
      if leaf.shape[axis] % _num_shards(mesh, names):
        names = (names,) if isinstance(names, str) else names
        text = " times ".join(f"mesh.{n}={mesh.shape[n]}" for n in names)
        raise errors.UserError(
          f"config.mesh: the weight {name} has {leaf.shape[axis]} on axis "
          f"{axis}, which {text} does not divide."
        )
    kind = None
    if on_host is not None and re.search(on_host, name):
      kind = offload.MEMORY_KIND
    return jax.tree.map(
      lambda part: NamedSharding(
        mesh, _divisible(mesh, specs[0], part.shape), memory_kind=kind
      ),
      leaf,
    )

  return jax.tree.map_with_path(sharding_of, tree, is_leaf=is_array_like)


def _num_shards(mesh: AnyMesh, names: Any) -> int:
  """Returns into how many parts an entry of a sharding divides an axis."""
  names = (names,) if isinstance(names, str) else names or ()
  return math.prod(mesh.shape[name] for name in names)


def _divisible(mesh: AnyMesh, spec: P, shape: tuple[int, ...]) -> P:
  """Returns a sharding without the axes that it does not divide."""
  return P(
    *(
      None if shape[axis] % _num_shards(mesh, names) else names
      for axis, names in enumerate(spec)
    )
  )


def state_shardings(
  mesh: AnyMesh, state: Any, rules: Rules, on_host: str | None = None
) -> Any:
  """Returns the shardings of a run's state: `base`, `base_opt` by the rules.

  Args:
    mesh: the devices.
    state: `BilevelState`, or a named tuple with these two fields.
    rules: for the paths of the backbone's weights.
    on_host: as of `shardings`, for `base`.

  Returns:
    A tree like `state` of shardings; adapters and all else are replicated.
  """
  whole = jax.tree.map(lambda _: replicated(mesh), state)
  return whole._replace(
    base=shardings(mesh, state.base, rules, on_host),
    # What is no tree of weights is small.
    base_opt=shardings(mesh, state.base_opt, (*rules, ("", P()))),
  )


def with_shardings(tree: Any, leaf_shardings: Any) -> Any:
  """Returns the shapes of a tree with a sharding for each leaf."""
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    tree,
    leaf_shardings,
  )


def make_activation_constraint(
  mesh: AnyMesh,
) -> Callable[[jax.Array, bool], jax.Array]:
  """Returns the sharding constraint of a model's activations.

  Without it they would be sharded like the weights that they are multiplied
  by, and the weights of an `fsdp` axis would not be gathered.

  Args:
    mesh: the devices.

  Returns:
    (x [B, ..., D], whether to shard D) -> x: the batch over (data, fsdp), and
    within a layer the features over `model`.
  """
  parts = math.prod(mesh.shape[name] for name in ROW_AXES)

  def constrain(x, shard_features):
    if mesh.size == 1:
      return x
    # With a direction for each example, the batch axis is hidden by vmap.
    divisible = x.shape[0] % parts == 0
    rows = ROW_AXES if divisible else P.UNCONSTRAINED
    features = "model" if shard_features else None
    spec = P(rows, *[None] * (x.ndim - 2), features)
    # Within a group of directions (`dispatch.map_directions`) the mesh is
    # another.
    context = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(
      x, NamedSharding(mesh if context.empty else context, spec)
    )

  return constrain
