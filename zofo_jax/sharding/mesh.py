"""The devices of a run as a mesh of four axes, and checks that it fits.

`pert` shards the directions of a zeroth-order estimate, `data` the rows of a
batch, `fsdp` the rows and the weights, which are gathered a layer at a time
where they are used, and `model` the weights with their products.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from zofo_jax import errors

# Devices that exchange most are neighbours: `model` varies fastest.
AXES = ("pert", "data", "fsdp", "model")
# Those that shard the rows of a batch.
ROW_AXES = ("data", "fsdp")

# A mesh of devices, or its shape alone.
AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


def resolve(sizes: Mapping[str, int], num_devices: int) -> dict[str, int]:
  """Computes the size of the axis given as -1: all remaining devices.

  Args:
    sizes: of every axis in AXES; at most one is -1.
    num_devices: how many devices there are.

  Returns:
    The sizes, all of them positive.

  Raises:
    UserError: the sizes do not fit the number of devices.
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


def all_devices() -> list[jax.Device]:
  """Returns the devices of all processes.

  Raises:
    UserError: JAX finds none of the platform that it is to use.
  """
  try:
    return jax.devices()
  except (AssertionError, RuntimeError) as error:
    platforms = str(jax.config.values["jax_platforms"] or "")
    valid = ("cpu", "cuda", "rocm", "tpu")
    unknown = [name for name in platforms.split(",") if name not in valid]
    # JAX says nothing if no plugin for the name is installed.
    reason = errors.first_line(error) if str(error) else "no plugin for it"
    raise errors.UserError(
      f"JAX_PLATFORMS: expected some of {', '.join(valid)} that this machine "
      f"and this jaxlib have, or nothing; found '{platforms}' ({reason})."
      f"{errors.nearest(unknown[0], valid) if unknown else ''}"
    ) from error


def make(
  sizes: Mapping[str, int], devices: Sequence[Any] | None = None
) -> jax.sharding.Mesh:
  """Arranges devices in a mesh.

  Args:
    sizes: of every axis in AXES; one may be -1 for the remaining devices.
    devices: what to arrange; None for all. Devices beyond the sizes idle.

  Returns:
    The mesh, over which XLA partitions programs (`AxisType.Auto`).

  Raises:
    UserError: the sizes do not fit the devices, or leave a process without any,
      or there are no devices.
  """
  devices = all_devices() if devices is None else list(devices)
  full = resolve(sizes, len(devices))
  shape = tuple(full[name] for name in AXES)
  size = math.prod(shape)
  if size < len(devices) and len({d.process_index for d in devices}) > 1:
    raise errors.UserError(
      f"config.mesh: takes {size} devices; expected all {len(devices)}, since "
      "several processes hold them."
    )
  # An axis may be a part of a torus's: 8 x 2 chips of a slice of 4 x 4.
  grid = mesh_utils.create_device_mesh(
    shape, devices[:size], allow_split_physical_axes=True
  )
  return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract(
  sizes: Mapping[str, int], num_devices: int
) -> jax.sharding.AbstractMesh:
  """Returns the shape of a mesh of devices that need not exist; see `make`."""
  full = resolve(sizes, num_devices)
  return jax.sharding.AbstractMesh(
    tuple(full[name] for name in AXES),
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
  )


def check_rows(mesh: AnyMesh, counts: Mapping[str, int]) -> None:
  """Checks that batches can be sharded by rows.

  Args:
    mesh: the devices.
    counts: the rows of a batch by the name of their field.

  Raises:
    UserError: names the field and the numbers.
  """
  parts = math.prod(mesh.shape[name] for name in ROW_AXES)
  for field, count in counts.items():
    if count % parts:
      raise errors.UserError(
        f"config.{field}: {count} rows are sharded over mesh.data="
        f"{mesh.shape['data']} times mesh.fsdp={mesh.shape['fsdp']}; expected "
        f"a multiple of {parts}."
      )


def check_directions(mesh: AnyMesh, count: int) -> None:
  """Checks that directions can be sharded.

  Raises:
    UserError: names the numbers.
  """
  if count % mesh.shape["pert"]:
    raise errors.UserError(
      f"config.zo.num_directions: {count} are sharded over mesh.pert="
      f"{mesh.shape['pert']}; expected a multiple of it."
    )
