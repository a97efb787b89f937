"""Pytrees: names of leaves, stacking, and a choice between two trees."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

_Tree = TypeVar("_Tree")


def path_name(path: tuple[Any, ...]) -> str:
  """Returns a key path as a name such as `layers/attention/query/kernel`."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(
  tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> dict[str, Any]:
  """Returns the leaves of a pytree by name, in the tree's order.

  Args:
    tree: any pytree.
    is_leaf: nodes for which it is true are leaves as well.

  Examples:
    >>> from zofo_jax.core import tree
    >>> tree.named_leaves({"a": [1, 2], "b": {"c": 3}})
    {'a/0': 1, 'a/1': 2, 'b/c': 3}
  """
  return {
    path_name(path): leaf
    for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_leaf)
  }


def stack(trees: Sequence[_Tree]) -> _Tree:
  """Stacks trees of one structure along a new leading axis of every leaf."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def where(condition: jax.Array, if_true: _Tree, if_false: _Tree) -> _Tree:
  """Returns one of two trees of one structure; `condition`: bool, shape []."""
  return jax.tree.map(
    lambda t, f: jnp.where(condition, t, f), if_true, if_false
  )
