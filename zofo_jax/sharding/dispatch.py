"""Host arrays to the devices of a mesh, and functions jitted for it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from zofo_jax.sharding import rules
from zofo_jax.sharding.mesh import AnyMesh


def make_sharded_array(
  shape: tuple[int, ...],
  sharding: NamedSharding,
  read: Callable[[tuple[slice, ...]], np.ndarray],
) -> jax.Array:
  """Makes an array of the parts that this process holds, each read once.

  Args:
    shape: of the whole array.
    sharding: of the array.
    read: (index) -> the part of the array at that index.
  """
  parts: dict[str, np.ndarray] = {}

  def part(index):
    name = str(index)
    if name not in parts:
      parts[name] = read(index)
    return parts[name]

  array = jax.make_array_from_callback(shape, sharding, part)
  # On CPU it may be the host's memory itself, which cannot be donated.
  if jax.default_backend() != "cpu":
    return array
  return jax.jit(jnp.copy, out_shardings=sharding)(array)


def shard_batch(mesh: AnyMesh, batch: Any, axis: int = 0) -> Any:
  """Puts a batch on the devices; each process puts the rows that it holds.

  Args:
    mesh: the devices.
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
      leaf.shape, rules.batch_sharding(mesh, axis), lambda index: leaf[index]
    )

  return jax.tree.map(put, batch)


def compiler_options(mesh: AnyMesh) -> dict[str, Any]:
  """Returns XLA's options for a program, by the mesh's kind of device.

  On CPUs operations run one after another. By default they may run in parallel
  there, so that the losses of an iteration have their temporaries at once: 378
  MB against 243 for SmolLM2-135M and 8 rows of 40 tokens, in the same time, as
  one operation already uses all cores.
  """
  if isinstance(mesh, jax.sharding.AbstractMesh):  # nothing is compiled
    return {}
  if mesh.devices.flat[0].platform != "cpu":
    return {}
  return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def jit_step(
  step: Callable[..., Any], mesh: AnyMesh, state_shardings: Any
) -> jax.stages.Wrapped:
  """Jits a step: its state is donated and keeps its shardings.

  Args:
    step: (state, ...) -> (state, info).
    mesh: the devices.
    state_shardings: of the state.
  """
  return jax.jit(
    step,
    donate_argnums=0,
    out_shardings=(state_shardings, rules.replicated(mesh)),
    compiler_options=compiler_options(mesh),
  )


def jit_on_batches(
  fn: Callable[..., Any], mesh: AnyMesh, num_whole: int
) -> Callable[..., Any]:
  """Jits a function of a batch, for any mesh; its results are replicated.

  Args:
    fn: takes `num_whole` trees that are on the mesh, then host arrays of rows.
    mesh: the devices.
    num_whole: how many arguments come before the rows.
  """
  jitted = jax.jit(
    fn,
    out_shardings=rules.replicated(mesh),
    compiler_options=compiler_options(mesh),
  )

  def call(*args):
    batch = shard_batch(mesh, args[num_whole:])
    return jitted(*args[:num_whole], *batch)

  return call


def map_directions(
  mesh: AnyMesh, at_once: int = 1
) -> Callable[[Callable[[Any], Any], Any], Any]:
  """Returns the map over directions of `zo.estimate`: in groups along `pert`.

  Args:
    mesh: the devices; its `pert` divides the number of directions.
    at_once: how many directions of a group are evaluated at a time.

  Returns:
    map(fn, keys) like `jax.lax.map`. Groups exchange what fn returns, and
    nothing else.
  """
  serial = jax.lax.map
  if at_once > 1:
    serial = functools.partial(jax.lax.map, batch_size=at_once)
  if mesh.shape["pert"] == 1:
    return serial

  def parallel(fn, keys):
    def group(keys):
      return serial(fn, keys)

    split = jax.shard_map(
      group,
      mesh=mesh,
      in_specs=P("pert"),
      out_specs=P("pert"),
      axis_names={"pert"},
      check_vma=False,
    )
    return jax.lax.with_sharding_constraint(split(keys), rules.replicated(mesh))

  return parallel
