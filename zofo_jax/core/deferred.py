"""Updates of weights in the host's memory that are written several at a time.

Writing an update copies all weights to the device and back. An update is a few
numbers and keys, however, from which it can be computed wherever a layer is
read. So updates are kept in the state of the optimizer; whatever reads a layer
applies them, in order, to its copy; and several are written at once. Weights
have the bits that they would have if every update were written by itself.
"""

import dataclasses
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zofo_jax.core import keys as keys_lib
from zofo_jax.core import offload
from zofo_jax.core import sampler as sampler_lib
from zofo_jax.core import tree as tree_lib
from zofo_jax.core.types import InPlaceUpdate


class Updates(NamedTuple):
  """Deferred updates, the oldest first; there is room for K.

  Attributes:
    directions: uint32 words of the directions' keys, shape [K, Q, 2].
    subspaces: of the keys of what these share, shape [K, 2].
    roundings: of the keys of stochastic rounding, shape [K, 2].
    weights: factors of the directions, float32, shape [K, Q].
    decays: factors by which matrices shrink, float32, shape [K].
    num_deferred: how many there are, int32, shape [].
  """

  directions: jax.Array
  subspaces: jax.Array
  roundings: jax.Array
  weights: jax.Array
  decays: jax.Array
  num_deferred: jax.Array


def none(num_updates: int, num_directions: int) -> Updates:
  """Returns room for updates, of so many directions each."""
  return Updates(
    directions=jnp.zeros((num_updates, num_directions, 2), jnp.uint32),
    subspaces=jnp.zeros((num_updates, 2), jnp.uint32),
    roundings=jnp.zeros((num_updates, 2), jnp.uint32),
    weights=jnp.zeros((num_updates, num_directions)),
    decays=jnp.zeros(num_updates),
    num_deferred=jnp.zeros([], jnp.int32),
  )


def append(
  updates: Updates,
  keys: keys_lib.DirectionKey,
  move: InPlaceUpdate,
  rounding_key: jax.Array,
) -> Updates:
  """Returns updates with one more.

  Args:
    updates: fewer than there is room for.
    keys: keys of its directions, `direction` [Q] and one `subspace` [].
    move: the update.
    rounding_key: typed PRNG key of its rounding, shape [].
  """
  *arrays, count = updates
  words = map(jax.random.key_data, (*keys, rounding_key))
  new = (*words, move.weights, jnp.asarray(move.decay, jnp.float32))
  arrays = [
    jax.lax.dynamic_update_index_in_dim(array, row, count, 0)
    for array, row in zip(arrays, new, strict=True)
  ]
  return Updates._make((*arrays, count + 1))


def paths(tree: Any, sampler: sampler_lib.Sampler) -> frozenset[str]:
  """Returns the paths of the weights whose updates are deferred.

  These are the selected stacks of layers in the host's memory.
  """
  if sampler.stacked is None:
    return frozenset()
  return frozenset(
    path
    for path, leaf in tree_lib.named_leaves(tree).items()
    if offload.is_on_host(leaf)
    and jnp.issubdtype(leaf.dtype, jnp.floating)
    and sampler.select(path)
    and re.search(sampler.stacked, path)
  )


def read(tree: Any, updates: Updates, sampler: sampler_lib.Sampler) -> Any:
  """Returns a tree to be read in place of one whose updates are deferred.

  Args:
    tree: pytree of weights.
    updates: the deferred updates.
    sampler: of the updates.

  Returns:
    A tree like `tree`, with `offload.Deferred` nodes for some of its leaves.
  """
  chosen = paths(tree, sampler)

  def node(path, leaf, leaf_keys, round_keys):
    if tree_lib.path_name(path) not in chosen:
      return leaf
    return _node(leaf, leaf_keys, round_keys, updates, sampler)

  return jax.tree.map_with_path(node, tree, *_keys(tree, updates, sampler))


def write(
  tree: Any,
  updates: Updates,
  sampler: sampler_lib.Sampler,
  is_due: jax.typing.ArrayLike = True,
) -> Any:
  """Writes updates, a layer at a time, in place if `tree` is donated.

  Args:
    tree: pytree of weights.
    updates: the deferred updates.
    sampler: of the updates.
    is_due: bool, shape []; if False, nothing is copied or written.

  Returns:
    A tree like `tree`, of arrays.
  """

  def write_leaf(node):
    if not isinstance(node, offload.Deferred):
      return node
    chosen = range(node.shape[0]) if sampler.layers is None else sampler.layers
    layers = jnp.asarray(tuple(chosen), jnp.int32)

    def write_layer(i, stack):
      layer = jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layers[i], 0, False),
        dataclasses.replace(node, value=stack),
      )
      block = offload.move_like(layer.__jax_array__(), stack)
      return jax.lax.dynamic_update_index_in_dim(stack, block, layers[i], 0)

    # A loop that may take no turns, not a conditional, which would copy.
    turns = jnp.where(is_due, len(layers), 0)
    return jax.lax.fori_loop(0, turns, write_layer, node.value)

  return jax.tree.map(
    write_leaf,
    read(tree, updates, sampler),
    is_leaf=lambda leaf: isinstance(leaf, offload.Deferred),
  )


def _keys(tree, updates, sampler):
  """Returns trees of the directions' and rounding keys, [K, ...]."""

  def of_one(directions, subspace, rounding):
    wrap = lambda words: jax.random.wrap_key_data(words, impl=keys_lib.IMPL)
    keys = keys_lib.DirectionKey(wrap(directions), wrap(subspace))
    leaf_keys, [round_keys] = sampler.leaf_keys(tree, keys, wrap(rounding))
    return leaf_keys, round_keys

  return jax.vmap(of_one)(
    updates.directions, updates.subspaces, updates.roundings
  )


def _node(leaf, leaf_keys, round_keys, updates, sampler):
  """Returns the node of a stack; axis 0 of all it holds counts layers."""
  num_layers = leaf.shape[0]
  stack = lambda x: jnp.broadcast_to(x, (num_layers, *x.shape))
  count = stack(updates.num_deferred)
  if sampler.layers is not None:
    chosen = jnp.zeros(num_layers, bool).at[jnp.asarray(sampler.layers)]
    count = jnp.where(chosen.set(True), count, 0)
  return offload.Deferred(
    leaf,
    (
      jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), leaf_keys),
      jnp.moveaxis(round_keys.direction, 1, 0),
      stack(updates.weights),
      stack(updates.decays),
    ),
    count,
    _Apply(sampler),
  )


@dataclasses.dataclass(frozen=True)
class _Apply:
  """Applies updates to a layer; equal for equal samplers."""

  sampler: sampler_lib.Sampler

  def __call__(self, stored, updates, count):
    def apply_one(k, layer):
      leaf_keys, round_key, weights, decay = jax.tree.map(
        lambda x: x[k], updates
      )
      return self.sampler.moved(layer, leaf_keys, weights, decay, round_key)

    return jax.lax.fori_loop(0, count, apply_one, stored)
