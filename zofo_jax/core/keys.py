"""Random keys: z is a value, not a state.

A direction z is never stored. Each of its elements is a pure function of

  (run key, step, direction, leaf path, layer, element),

so the z of the forward passes, of the update, of a replay and of any other mesh
have the same bits, eager or compiled. The keys are derived in this order:

  run key --step_keys--> StepKeys --direction_keys--> DirectionKey [Q]
    --leaf_keys--> LeafKey of every leaf, or of every layer of a stacked leaf.

From a `LeafKey` on, `directions` and `prng` count the elements.
"""

import re
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zofo_jax.core import prng
from zofo_jax.core import tree as tree_lib

# The generator of all keys, whatever jax's default.
IMPL = "threefry2x32"


class StepKeys(NamedTuple):
  """Keys of one outer iteration; typed PRNG keys, shape [].

  Attributes:
    lower: of the steps on s, for dropout.
    upper: of the step on p, for dropout.
    direction: of the directions; see `direction_keys`.
    rounding: of the stochastic rounding of theta.
    subspace: of what the directions share; see `DirectionKey`.
  """

  lower: jax.Array
  upper: jax.Array
  direction: jax.Array
  rounding: jax.Array
  subspace: jax.Array


class DirectionKey(NamedTuple):
  """Key of a direction in the space of a whole tree.

  Typed threefry PRNG keys of shape []; for Q directions, `direction` has shape
  [Q] and all share one `subspace`.

  Attributes:
    direction: key of the part that differs between directions.
    subspace: key of the part that several directions share, over steps (the
      column space of `directions.LowRank`) or over a batch
      (`directions.PerExample`).
  """

  direction: jax.Array
  subspace: jax.Array


class LeafKey(NamedTuple):
  """Key of a direction's part in one leaf.

  Raw uint32 words, each of shape [2], or [layers, 2] for a stacked leaf.

  Attributes:
    direction: as in `DirectionKey`.
    subspace: as in `DirectionKey`.
  """

  direction: jax.Array
  subspace: jax.Array


def seed_key(seed: jax.typing.ArrayLike) -> jax.Array:
  """Returns the typed threefry key of a seed, shape []."""
  return jax.random.key(seed, impl=IMPL)


def check_generator(*keys: jax.Array) -> None:
  """Checks that keys give the same numbers in every program.

  Args:
    *keys: typed PRNG keys, shape [].

  Raises:
    ValueError: a key is not threefry, or jax is set to split keys in another
      way. Other generators give different numbers under vmap and in a loop, so
      that z could not be regenerated.
  """
  for key in keys:
    shape = jax.eval_shape(jax.random.key_data, key).shape
    if shape != (2,):
      raise ValueError(
        "directions need one threefry key (jax.random.key(seed, "
        f"impl='{IMPL}')); got key data of shape {shape}."
      )
  if not getattr(jax.config, "jax_threefry_partitionable", True):
    raise ValueError(
      "directions are drawn with jax_threefry_partitionable=True; it is False, "
      "which splits keys in another way."
    )


def step_keys(
  key: jax.Array, step: jax.typing.ArrayLike, subspace_steps: int = 1
) -> StepKeys:
  """Derives the keys of an outer iteration from the key of the run.

  Args:
    key: typed PRNG key of the run, shape []. Folded, not consumed.
    step: number of the iteration, from 0; int32, shape [].
    subspace_steps: number of consecutive iterations that share a subspace key.

  Returns:
    The keys of the iteration.

  Raises:
    ValueError: the key is not threefry; see `check_generator`.
  """
  check_generator(key)
  lower, upper, direction, rounding = jax.random.split(
    jax.random.fold_in(key, step), 4
  )
  # No step has this number, so the root differs from the keys of all steps.
  subspace_root = jax.random.fold_in(key, np.uint32(2**32 - 1))
  subspace_key = jax.random.fold_in(
    subspace_root, jnp.asarray(step) // subspace_steps
  )
  return StepKeys(lower, upper, direction, rounding, subspace_key)


def direction_keys(
  key: jax.Array, subspace_key: jax.Array | None, num_directions: int
) -> DirectionKey:
  """Splits a key into the keys of several directions.

  Args:
    key: typed PRNG key, shape [].
    subspace_key: typed PRNG key of what the directions share, shape []; `key`
      if None.
    num_directions: Q.

  Returns:
    Keys of the directions: `direction` [Q] and one `subspace` [].
  """
  subspace_key = key if subspace_key is None else subspace_key
  return DirectionKey(
    direction=jax.random.split(key, num_directions), subspace=subspace_key
  )


def leaf_keys(key: DirectionKey, tree: Any, stacked: str | None = None) -> Any:
  """Derives the keys of all leaves from the key of a direction.

  Args:
    key: key of the direction. Folded, not consumed.
    tree: any pytree of arrays.
    stacked: pattern of the paths of leaves whose axis 0 counts layers; None if
      there are none.

  Returns:
    A tree like `tree` of `LeafKey`.

  Raises:
    ValueError: a key is not threefry; see `check_generator`.
  """
  check_generator(*key)
  data = [jax.random.key_data(part) for part in key]
  leaves = jax.tree.leaves_with_path(tree)
  names = [tree_lib.path_name(path) for path, _ in leaves]
  crcs = np.array([zlib.crc32(name.encode()) for name in names], np.uint32)
  depths = [
    leaf.shape[0] if stacked is not None and re.search(stacked, name) else 0
    for name, (_, leaf) in zip(names, leaves, strict=True)
  ]
  layers = np.arange(max(depths, default=0), dtype=np.uint32)[None]

  def part_keys(words, part):
    """Folds paths and layers in, for all leaves at once: quick to compile."""
    whole = prng.fold_in(words, crcs, np.uint32(part))
    sliced = prng.fold_in(whole[:, None], layers, np.uint32(1))
    return [
      sliced[i, :depth] if depth else whole[i] for i, depth in enumerate(depths)
    ]

  # The two parts are numbered apart, so that equal keys give unequal numbers.
  direction_key, subspace_key = (
    part_keys(words, part) for part, words in zip((0, 2), data, strict=True)
  )
  return jax.tree.unflatten(
    jax.tree.structure(tree), map(LeafKey, direction_key, subspace_key)
  )
