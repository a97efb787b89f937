"""The devices of a run as a grid, and what lies where on it.

Four axes: `pert` divides the directions of a zeroth-order estimate, `data` the
rows of a batch, `fsdp` the rows and the weights, which are gathered a layer at
a time where they are used, and `model` the weights with their products. What
is said of a leaf comes from one table of rules per family of models; XLA
divides the program.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from zofo_jax import errors
from zofo_jax.core import tree as tree_lib

# Devices that exchange most are neighbours: `model` varies fastest.
AXES = ("pert", "data", "fsdp", "model")
_ROWS = ("data", "fsdp")

# A grid of devices, or its shape alone.
AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh
# (pattern searched in a leaf's path, how its axes are divided); the first that
# matches is taken.
Rules = Sequence[tuple[str, P]]


def resolve(sizes: Mapping[str, int], num_devices: int) -> dict[str, int]:
  """Fills the rest of the devices in for the axis of size -1.

  Args:
    sizes: of every axis in AXES; at most one is -1.
    num_devices: how many devices there are.

  Returns:
    The sizes, all of them positive.

  Raises:
    UserError: the sizes and the devices do not fit.
  """
  text = ", ".join(f"mesh.{name}={sizes[name]}" for name in AXES)
  free = [name for name in AXES if sizes[name] == -1]
  if len(free) > 1 or any(sizes[n] < 1 for n in AXES if n not in free):
    raise errors.UserError(
      f"config.mesh: expected numbers above 0, one of them -1 for the rest; "
      f"found {text}."
    )
  taken = math.prod(sizes[name] for name in AXES if name not in free)
  if taken > num_devices or (free and num_devices % taken):
    expected = "a divisor of that" if free else "at most that"
    raise errors.UserError(
      f"config.mesh: {text} takes {taken} devices; expected {expected}, there "
      f"{'is' if num_devices == 1 else 'are'} {num_devices}."
    )
  return {n: num_devices // taken if n in free else sizes[n] for n in AXES}


def make(
  sizes: Mapping[str, int], devices: Sequence[Any] | None = None
) -> jax.sharding.Mesh:
  """Arranges devices in a grid.

  Args:
    sizes: of every axis in AXES; one may be -1 for the rest.
    devices: what to arrange; None for all there are. Those left over idle.

  Returns:
    The mesh; its axes are XLA's to use.

  Raises:
    UserError: the sizes and the devices do not fit, or leave a process without
      any device.
  """
  found = jax.devices() if devices is None else list(devices)
  full = resolve(sizes, len(found))
  shape = tuple(full[name] for name in AXES)
  size = math.prod(shape)
  if size < len(found) and len({d.process_index for d in found}) > 1:
    raise errors.UserError(
      f"config.mesh: takes {size} devices; expected all {len(found)}, since "
      "several processes hold them."
    )
  # An axis may be a part of a torus's: 8 x 2 chips of a slice of 4 x 4.
  grid = mesh_utils.create_device_mesh(
    shape, found[:size], allow_split_physical_axes=True
  )
  return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract(
  sizes: Mapping[str, int], num_devices: int
) -> jax.sharding.AbstractMesh:
  """Returns the shape of a mesh of devices that are not here; see `make`."""
  full = resolve(sizes, num_devices)
  return jax.sharding.AbstractMesh(
    tuple(full[name] for name in AXES),
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
  )


def check_rows(mesh: AnyMesh, counts: Mapping[str, int]) -> None:
  """Stops where a number of rows cannot be divided.

  Args:
    mesh: the grid.
    counts: the rows of a batch by the name of their field.

  Raises:
    UserError: names the field and the numbers.
  """
  parts = math.prod(mesh.shape[name] for name in _ROWS)
  for field, count in counts.items():
    if count % parts:
      raise errors.UserError(
        f"config.{field}: {count} rows are divided among mesh.data="
        f"{mesh.shape['data']} times mesh.fsdp={mesh.shape['fsdp']}; expected "
        f"a multiple of {parts}."
      )


def check_directions(mesh: AnyMesh, count: int) -> None:
  """Stops where directions cannot be divided.

  Raises:
    UserError: has the numbers.
  """
  if count % mesh.shape["pert"]:
    raise errors.UserError(
      f"config.zo.num_directions: {count} are divided among mesh.pert="
      f"{mesh.shape['pert']}; expected a multiple of it."
    )


def replicated(mesh: AnyMesh) -> NamedSharding:
  """Returns the sharding of what every device has whole."""
  return NamedSharding(mesh, P())


def shardings(mesh: AnyMesh, tree: Any, rules: Rules) -> Any:
  """Says how each leaf is divided; scalars are not.

  Args:
    mesh: the grid.
    tree: arrays or shapes.
    rules: for every path.

  Returns:
    A tree like `tree` of shardings.

  Raises:
    UserError: no rule is for a leaf, or an axis does not divide it.
  """

  def place(path, leaf):
    if not leaf.shape:
      return replicated(mesh)
    name = tree_lib.path_name(path)
    found = [spec for pattern, spec in rules if re.search(pattern, name)]
    if not found:
      raise errors.UserError(
        f"config.mesh: no rule says how the weight {name} is divided."
      )
    for axis, names in enumerate(found[0]):
      names = (names,) if isinstance(names, str) else names or ()
      parts = math.prod(mesh.shape[n] for n in names)
      if leaf.shape[axis] % parts:
        text = " times ".join(f"mesh.{n}={mesh.shape[n]}" for n in names)
        raise errors.UserError(
          f"config.mesh: the weight {name} has {leaf.shape[axis]} on axis "
          f"{axis}, which {text} does not divide."
        )
    return NamedSharding(mesh, found[0])

  return jax.tree.map_with_path(place, tree)


def with_shardings(tree: Any, places: Any) -> Any:
  """Returns the shapes of a tree with a sharding for each leaf."""
  return jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=place
    ),
    tree,
    places,
  )


def state_shardings(mesh: AnyMesh, state: Any, rules: Rules) -> Any:
  """Says how a run's state is divided: `base` and `base_opt` by the rules.

  Args:
    mesh: the grid.
    state: `BilevelState`, or a named tuple with these two fields.
    rules: for the paths of the backbone's weights.

  Returns:
    A tree like `state` of shardings; adapters and the rest are whole
    everywhere.
  """
  places = jax.tree.map(lambda _: replicated(mesh), state)
  return places._replace(
    base=shardings(mesh, state.base, rules),
    base_opt=shardings(mesh, state.base_opt, rules),
  )


def make_sharded_array(
  shape: tuple[int, ...],
  place: NamedSharding,
  read: Callable[[tuple[slice, ...]], np.ndarray],
) -> jax.Array:
  """Makes an array of the parts that this process holds, each read once.

  Args:
    shape: of the whole array.
    place: its sharding.
    read: returns the part of an index.
  """
  parts: dict[str, np.ndarray] = {}

  def part(index):
    name = str(index)
    if name not in parts:
      parts[name] = read(index)
    return parts[name]

  made = jax.make_array_from_callback(shape, place, part)
  # On CPU it may be the host's memory itself, which cannot be donated.
  on_cpu = jax.default_backend() == "cpu"
  return jnp.array(made, copy=True) if on_cpu else made


def batch_sharding(mesh: AnyMesh, axis: int = 0) -> NamedSharding:
  """Returns the sharding of a batch whose rows are along an axis."""
  return NamedSharding(mesh, P(*[None] * axis, _ROWS))


def shard_batch(mesh: AnyMesh, batch: Any, axis: int = 0) -> Any:
  """Puts a batch on the devices: each process the rows that are its own.

  Args:
    mesh: the grid.
    batch: host arrays, the same in every process, or arrays of this process.
    axis: of the rows.
  """

  def put(leaf):
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(
      leaf.dtype, jax.dtypes.prng_key
    ):
      data = put(np.asarray(jax.random.key_data(leaf)))
      return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    leaf = np.asarray(leaf)
    return jax.make_array_from_callback(
      leaf.shape, batch_sharding(mesh, axis), lambda index: leaf[index]
    )

  return jax.tree.map(put, batch)


def compiler_options(mesh: AnyMesh) -> dict[str, Any]:
  """Returns what XLA is told of a step, by the mesh's kind of device.

  On CPUs operations come one after another. Side by side, as by default there,
  the losses of an iteration have their temporaries at once: 378 MB against 243
  for SmolLM2-135M and 8 rows of 40 tokens, in the same time, as one operation
  already takes all cores.
  """
  if mesh.devices.flat[0].platform != "cpu":
    return {}
  return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def jit_step(
  step: Callable[..., Any], mesh: AnyMesh, places: Any
) -> jax.stages.Wrapped:
  """Jits a step: its state is donated and stays where it is.

  Args:
    step: (state, ...) -> (state, info).
    mesh: the grid.
    places: shardings of the state.
  """
  return jax.jit(
    step,
    donate_argnums=0,
    out_shardings=(places, replicated(mesh)),
    compiler_options=compiler_options(mesh),
  )


def jit_on_batches(
  fn: Callable[..., Any], mesh: AnyMesh, num_whole: int
) -> Callable[..., Any]:
  """Jits a function of a batch, for any mesh; its results are whole everywhere.

  Args:
    fn: takes `num_whole` trees that lie on the mesh, then host arrays of rows.
    mesh: the grid.
    num_whole: how many arguments come before the rows.
  """
  jitted = jax.jit(fn, out_shardings=replicated(mesh))

  def call(*args):
    batch = shard_batch(mesh, args[num_whole:])
    return jitted(*args[:num_whole], *batch)

  return call


def make_activation_constraint(
  mesh: AnyMesh,
) -> Callable[[jax.Array, bool], jax.Array]:
  """Makes what divides states [B, ..., D] by rows, and within a layer by D.

  Without it they would be divided as the weights that they meet are, and the
  weights of an `fsdp` axis not gathered.
  """
  parts = math.prod(mesh.shape[name] for name in _ROWS)

  def place(x, divided):
    if mesh.size == 1:
      return x
    # Examples of a direction each are a batch axis that is not seen here.
    alone = x.shape[0] % parts != 0
    first = P.UNCONSTRAINED if alone else _ROWS
    last = "model" if divided else None
    spec = P(first, *[None] * (x.ndim - 2), last)
    # Within a group of directions the mesh is another.
    here = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(
      x, NamedSharding(mesh if here.empty else here, spec)
    )

  return place


def map_directions(
  mesh: AnyMesh,
) -> Callable[[Callable[[Any], Any], Any], Any]:
  """Makes the map over directions of `zo.estimate`: in groups along `pert`.

  Args:
    mesh: the grid; its `pert` divides the number of directions.

  Returns:
    map(fn, keys) like `jax.lax.map`. Groups exchange what fn returns, scalars,
    and nothing else.
  """
  if mesh.shape["pert"] == 1:
    return jax.lax.map

  def parallel(fn, keys):
    def group(keys):
      return jax.lax.map(fn, keys)

    split = jax.shard_map(
      group,
      mesh=mesh,
      in_specs=P("pert"),
      out_specs=P("pert"),
      axis_names={"pert"},
      check_vma=False,
    )
    return jax.lax.with_sharding_constraint(split(keys), replicated(mesh))

  return parallel
