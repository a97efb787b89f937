"""Samplers: which weights move, along which directions, and how in place.

The z that `perturb` reads in a forward pass and the z that `apply_directions`
adds to the weights are the same function of a key; see `keys`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zofo_jax.core import directions, offload, perturbed, prng, rounding, xla
from zofo_jax.core import keys as keys_lib
from zofo_jax.core import tree as tree_lib


def _select_all(path: str) -> bool:
  """Selects every leaf."""
  del path
  return True


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Which weights are perturbed, along what directions, and how they are read.

  Attributes:
    direction: the kind of direction.
    select: from a leaf's path, such as `layers/attention/query/kernel`, to
      whether it is perturbed and updated. Leaves that are not floats never are.
    layers: indices of the layers that are, in stacked leaves; None for all.
    stacked: regular expression, searched in the paths, of the leaves whose axis
      0 counts layers and is scanned over by the model. Every layer of such a
      leaf has a direction of its own: a stack of matrices is matrices to
      `directions.LowRank` and to weight decay. None: no leaf is a stack.
    lazy: whether the loss gets `Perturbed` nodes, which form a perturbed weight
      where it is used, instead of a perturbed copy of the whole tree. Both give
      the same values up to rounding. None (default): lazily where leaves are
      stacked, so that one layer of perturbed weights exists at a time, and the
      loss reads its weights as arrays only; whole otherwise. Set it to False
      for a loss that reads a weight many times, such as a recurrent cell: each
      reading draws z again. True: always, with no look at the loss.

  Raises:
    ValueError: `layers` are chosen where no leaf is stacked.
  """

  direction: directions.Direction = directions.Gaussian()
  select: Callable[[str], bool] = _select_all
  layers: tuple[int, ...] | None = None
  stacked: str | None = None
  lazy: bool | None = None

  def __post_init__(self) -> None:
    """Checks that the choice of layers can be met."""
    if self.layers is not None and self.stacked is None:
      raise ValueError(
        f"Sampler(layers={self.layers}) needs `stacked`, a pattern of the "
        "paths of leaves whose axis 0 counts layers; it is None."
      )

  def _selects(self, path: tuple[Any, ...], leaf: Any) -> bool:
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return floating and self.select(tree_lib.path_name(path))

  def perturb(
    self, tree: Any, key: keys_lib.DirectionKey, scale: jax.typing.ArrayLike
  ) -> Any:
    """Returns tree + scale * z(key).

    Args:
      tree: pytree of weights; only read.
      key: key of the direction. Folded, not consumed.
      scale: signed step along z, float32, shape [].

    Returns:
      A tree like `tree`, of `Perturbed` nodes if `lazy` is True, of arrays
      otherwise.
    """
    nodes = self._nodes(tree, key, scale)
    return nodes if self.lazy else perturbed.materialize(nodes)

  def line(
    self, fn: Callable[[Any], Any], tree: Any, key: keys_lib.DirectionKey
  ) -> Callable[[jax.Array], Any]:
    """Returns the function t -> fn(tree + t * z(key)).

    Args:
      fn: function of a tree like `tree`; evaluated as `lazy` says.
      tree: pytree of weights; only read.
      key: key of the direction. Folded, not consumed.

    Returns:
      A function of t, float32, shape []. It raises a ValueError if `lazy` is
      True and fn accepts arrays only.
    """
    lazy = self.lazy
    if lazy is None:
      lazy = self.stacked is not None and perturbed.reads_arrays_only(
        fn, jax.eval_shape(lambda: self._nodes(tree, key, 0.0))
      )

    def value(t):
      nodes = self._nodes(tree, key, t)
      if not lazy:
        return fn(perturbed.materialize(nodes))
      try:
        return fn(nodes)
      except Exception as error:  # whatever the model's own code raises
        self._explain(error, fn, nodes)
        raise

    return value

  def _explain(self, error, fn, nodes):
    """Raises a ValueError if fn fails on nodes and not on arrays."""
    try:
      jax.eval_shape(lambda nodes: fn(perturbed.materialize(nodes)), nodes)
    except Exception:  # an error of fn itself
      return
    raise ValueError(
      f"Sampler(lazy=True, stacked={self.stacked!r}): the loss accepts arrays "
      f"but not `Perturbed` nodes ({type(error).__name__}: {error}); if it "
      "scans over layers, pass `stacked`, a pattern of the paths of all leaves "
      "whose axis 0 counts layers, and otherwise lazy=None."
    ) from error

  def _nodes(self, tree, key, scale):
    """Returns tree + scale * z(key) as `Perturbed` nodes."""
    scale = jnp.asarray(scale, jnp.float32)

    def node(path, leaf, leaf_key, weight):
      if not self._selects(path, leaf):
        return weight
      leaf_scale = jnp.broadcast_to(scale, leaf_key.direction.shape[:-1])
      if self.layers is not None and leaf_scale.ndim:
        chosen = np.zeros(leaf_scale.shape, np.float32)
        chosen[list(self.layers)] = 1.0
        leaf_scale = leaf_scale * chosen
      return perturbed.Perturbed(weight, leaf_key, leaf_scale, self.direction)

    stored = offload.stored(tree)
    return jax.tree.map_with_path(
      node, stored, keys_lib.leaf_keys(key, stored, self.stacked), tree
    )

  def apply_directions(
    self,
    tree: Any,
    keys: keys_lib.DirectionKey,
    weights: jax.Array,
    *,
    decay: jax.typing.ArrayLike = 0.0,
    rounding_key: jax.Array | None = None,
  ) -> Any:
    """Returns (1 - decay) tree + sum_q weights[q] * z(keys[q]).

    A donated `tree` is updated in place: the temporaries are one layer, or some
    rows of a table, in float32, whatever the number of directions. Stacks in
    the host's memory stay there; a layer at a time is on the device.

    Args:
      tree: pytree of weights, any float dtype.
      keys: keys of the directions, `direction` [Q] and one `subspace` [].
        Folded, not consumed.
      weights: float32, shape [Q].
      decay: factor by which matrices shrink, float32, shape []. Vectors (norms
        and biases) do not decay.
      rounding_key: typed PRNG key for stochastic rounding to dtypes narrower
        than float32, by which steps far below one unit in the last place still
        move the weights on average; None rounds to nearest.

    Returns:
      A tree like `tree`; leaves that are not selected are returned unchanged.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import zofo_jax as zofo
      >>> sampler = zofo.Sampler(zofo.directions.Rademacher())
      >>> key, subspace = jax.random.split(jax.random.key(0))
      >>> keys = zofo.keys.direction_keys(key, subspace, 1)
      >>> moved = sampler.apply_directions(jnp.ones(3), keys, jnp.array([0.5]))
      >>> (abs(moved - 1)).tolist()
      [0.5, 0.5, 0.5]
    """

    def new(stored, leaf_keys, round_key, part=None):
      return self.moved(stored, leaf_keys, weights, decay, round_key, part)

    def add_leaf(leaf, leaf_keys, round_key):
      if leaf_keys is None:
        return leaf
      # z is not drawn while the losses are evaluated.
      leaf_keys = jax.tree.map(
        lambda words: xla.after(words, weights), leaf_keys
      )
      return self._write(new, leaf, leaf, leaf_keys, round_key)

    return self._map_selected(add_leaf, tree, keys, rounding_key)

  def moved(
    self,
    stored: jax.Array,
    leaf_keys: keys_lib.LeafKey,
    weights: jax.Array,
    decay: jax.typing.ArrayLike,
    round_key: jax.Array | None,
    part: tuple[tuple[int, ...], prng.RowRange] | None = None,
  ) -> jax.Array:
    """Returns the new weights of a leaf, or of a layer of a stack.

    Args:
      stored: its weights, or some rows of them; on the device.
      leaf_keys: keys of the leaf or layer, [Q, 2].
      weights: as for `apply_directions`, and `decay` too.
      decay: see `weights`.
      round_key: uint32 words of its rounding key, shape [2]; None for none.
      part: (shape of the whole, its rows in `stored`); None for all rows.
    """
    block = stored.astype(jnp.float32)
    if stored.ndim > 1:
      block = block - decay * block
    block = block + self._sum(stored, leaf_keys, weights, part)
    rows = None if part is None else part[1]
    return rounding.stochastic_round(block, stored.dtype, round_key, rows)

  def weighted_sum(
    self, tree: Any, keys: keys_lib.DirectionKey, weights: jax.Array
  ) -> Any:
    """Returns sum_q weights[q] * z(keys[q]) as a float32 tree like `tree`.

    Args:
      tree: pytree of weights; read only by directions that depend on them.
      keys: keys of the directions, `direction` [Q] and one `subspace` [].
      weights: float32, shape [Q].

    Returns:
      A float32 tree like `tree`; zeros where a weight is not selected.
    """

    def new(stored, leaf_keys, _, part=None):
      return self._sum(stored, leaf_keys, weights, part)

    def write_leaf(leaf, leaf_keys, _):
      zeros = jnp.zeros(leaf.shape, jnp.float32)
      if leaf_keys is None:
        return zeros
      return self._write(new, leaf, zeros, leaf_keys, None)

    return self._map_selected(write_leaf, tree, keys, None)

  def leaf_keys(
    self, tree: Any, keys: keys_lib.DirectionKey, rounding_key: jax.Array | None
  ) -> tuple[Any, list[Any]]:
    """Derives the keys of all leaves, for `moved`.

    Args:
      tree: pytree of weights.
      keys: keys of the directions, `direction` [Q] and one `subspace` [].
      rounding_key: typed PRNG key, shape []; None for none.

    Returns:
      A tree like `tree` of `LeafKey` [Q, 2] or [Q, layers, 2], and a list of
      one of rounding keys [2] or [layers, 2], in `direction`; of none without.
    """
    keys_tree = jax.vmap(
      lambda direction_key: keys_lib.leaf_keys(
        keys_lib.DirectionKey(direction_key, keys.subspace), tree, self.stacked
      )
    )(keys.direction)
    rounding_keys = []
    if rounding_key is not None:
      pair = keys_lib.DirectionKey(rounding_key, rounding_key)
      rounding_keys = [keys_lib.leaf_keys(pair, tree, self.stacked)]
    return keys_tree, rounding_keys

  def _map_selected(self, fn, tree, keys, rounding_key):
    """Maps fn(leaf, keys [Q, ...] or None if not selected, rounding key)."""
    keys_tree, rounding_keys = self.leaf_keys(tree, keys, rounding_key)

    def apply(path, leaf, leaf_keys, *round_key):
      selected = self._selects(path, leaf)
      keys = leaf_keys if selected else None
      return fn(leaf, keys, round_key[0].direction if round_key else None)

    return jax.tree.map_with_path(apply, tree, keys_tree, *rounding_keys)

  def _write(self, new, leaf, into, leaf_keys, round_key):
    """Returns `into` with the selected layers replaced by `new` of them.

    Args:
      new: (stored weights, keys, rounding key, part) -> new weights of a layer;
        `part` as for `_sum`.
      leaf: the stored leaf.
      into: what is overwritten, of the same shape; `leaf` for an update in
        place.
      leaf_keys: keys of the leaf, [Q, 2] or [Q, layers, 2].
      round_key: rounding key of the leaf, [2] or [layers, 2]; None for none.
    """
    on_host = offload.is_on_host(leaf)
    if leaf_keys.direction.ndim == 2:  # no layers
      at_once = leaf.ndim != 2 or leaf.shape[0] <= perturbed.ROWS_PER_BLOCK
      if leaf_keys.direction.shape[0] > 1:  # summed whole if the kind can
        kind = type(self.direction)
        at_once |= kind.weighted_sum is not directions.Direction.weighted_sum
      if at_once or on_host:
        block = new(offload.fetch(leaf), leaf_keys, round_key)
        return offload.move_like(block, into)
      return xla.by_platform(
        *(leaf, into, leaf_keys, round_key),
        cpu=lambda leaf, _, *keys: new(leaf, *keys),
        default=functools.partial(self._write_rows, new, into is leaf),
      )
    one_direction = leaf_keys.direction.shape[0] == 1
    whole = self.layers is None and self.direction.elementwise
    if one_direction and whole and not on_host:

      def vectorised(leaf, _, leaf_keys, round_key):
        axes = (0, 1, None if round_key is None else 0)
        return jax.vmap(new, axes)(leaf, leaf_keys, round_key)

      # One pass over the memory, in parallel and in place, except on TPU, where
      # it would need a copy.
      return xla.by_platform(
        *(leaf, into, leaf_keys, round_key),
        cpu=vectorised,
        gpu=vectorised,
        default=functools.partial(self._write_layers, new, into is leaf),
      )
    return self._write_layers(
      new, into is leaf, leaf, into, leaf_keys, round_key
    )

  def _write_rows(self, new, in_place, leaf, into, leaf_keys, round_key):
    """Computes `_write` of a table, a block of rows at a time."""

    def write(start, size, table):
      rows = prng.RowRange(start, size)
      stored = jax.lax.dynamic_slice_in_dim(
        table if in_place else leaf, start, size
      )
      block = new(stored, leaf_keys, round_key, (leaf.shape, rows))
      return jax.lax.dynamic_update_slice_in_dim(table, block, start, 0)

    size = perturbed.ROWS_PER_BLOCK
    count, remainder = divmod(leaf.shape[0], size)
    into = jax.lax.fori_loop(
      0, count, lambda i, table: write(i * size, size, table), into
    )
    return write(count * size, remainder, into) if remainder else into

  def _write_layers(self, new, in_place, leaf, into, leaf_keys, round_key):
    """Computes `_write` of stacked layers, a layer at a time.

    A sum of directions, or a mask, then exists for one layer at a time.
    """
    selected = range(leaf.shape[0]) if self.layers is None else self.layers
    if not selected:  # a loop without iterations is still traced
      return into
    layers = jnp.asarray(tuple(selected), jnp.int32)

    def write_layer(i, stack):
      layer = layers[i]
      layer_keys = jax.tree.map(lambda key: _at(key, layer, 1), leaf_keys)
      layer_round_key = None if round_key is None else _at(round_key, layer)
      # Read from where it will be written, so that one stack is enough.
      stored = offload.fetch(_at(stack if in_place else leaf, layer))
      block = new(stored, layer_keys, layer_round_key)
      block = offload.move_like(block, stack)
      return jax.lax.dynamic_update_index_in_dim(stack, block, layer, 0)

    return jax.lax.fori_loop(0, len(selected), write_layer, into)

  def _sum(self, stored, keys, weights, part=None):
    """Returns sum_q weights[q] z(keys[q]) for the weights of a layer, float32.

    Args:
      stored: the weights, or some rows of them.
      keys: keys of a leaf or layer, [Q, 2].
      weights: float32, shape [Q].
      part: (shape of the whole, its rows in `stored`); None for all rows.
    """
    whole, rows = part or (stored.shape, None)
    if weights.shape[0] == 1:
      key = jax.tree.map(lambda k: k[0], keys)
      z = self.direction.sample(key, whole, rows)
      return self.direction.mask(weights[0] * z, stored)
    combined = None
    if part is None:
      combined = self.direction.weighted_sum(keys, weights, whole)
    if combined is None:

      def add_one(q, total):
        key = jax.tree.map(lambda k: k[q], keys)
        return total + weights[q] * self.direction.sample(key, whole, rows)

      zero = jnp.zeros(stored.shape, jnp.float32)
      combined = jax.lax.fori_loop(0, weights.shape[0], add_one, zero)
    return self.direction.mask(combined, stored)


def _at(stack, layer, axis=0):
  return jax.lax.dynamic_index_in_dim(stack, layer, axis, keepdims=False)
