"""What all kinds of adapters share: how a tree of them is made and asked."""

from typing import Any

import jax
import numpy as np

from zofo_jax.adapters import lora, prefix, prompt
from zofo_jax.core import perturbed

_NODES = (lora.Lora, prefix.Prefix, prefix.ProjectedPrefix, prompt.Prompt)


def parts(adapter: Any) -> dict[str, Any]:
  """Returns the parts of an adapter by path: {"embed/prompt": Prompt, ...}."""
  flat = jax.tree_util.tree_leaves_with_path(
    adapter, is_leaf=lambda node: isinstance(node, _NODES)
  )
  return {perturbed.path_name(path): node for path, node in flat}


def join(*adapters: Any) -> dict[str, Any]:
  """Makes one adapter of several kinds.

  Args:
    *adapters: nested dicts without a part in common.

  Returns:
    A nested dict with the parts of all.

  Raises:
    ValueError: two of them have the same part.
  """
  joined: dict[str, Any] = {}
  for adapter in adapters:
    for name, child in adapter.items():
      if name not in joined:
        joined[name] = child
      elif isinstance(child, dict) and isinstance(joined[name], dict):
        joined[name] = join(joined[name], child)
      else:
        raise ValueError(f"two adapters have a '{name}' at the same place")
  return joined


def expand(adapter: Any) -> Any:
  """Replaces every projected prefix by its keys and values.

  Models do so themselves; for export, and to drop the network after training.
  """
  return jax.tree.map(
    lambda node: (
      prefix.project(node) if isinstance(node, prefix.ProjectedPrefix) else node
    ),
    adapter,
    is_leaf=lambda node: isinstance(node, _NODES),
  )


def prefix_length(adapter: Any) -> int:
  """Counts the positions of an adapter's prefix; 0 without one."""
  for node in parts(adapter).values():
    if isinstance(node, prefix.Prefix):
      return node.key.shape[-3]
    if isinstance(node, prefix.ProjectedPrefix):
      return node.embedding.shape[-2]
  return 0


def prompt_length(adapter: Any) -> int:
  """Counts the virtual tokens of an adapter's prompt; 0 without one."""
  for node in parts(adapter).values():
    if isinstance(node, prompt.Prompt):
      return node.embedding.shape[-2]
  return 0


def num_positions(adapter: Any) -> int:
  """Counts the positions that an adapter takes from a row's context."""
  return prefix_length(adapter) + prompt_length(adapter)


def has_dropout(adapter: Any) -> bool:
  """Tells whether a loss of this adapter needs a key while it trains."""
  return any(getattr(node, "dropout", 0.0) for node in parts(adapter).values())


def count_parameters(tree: Any) -> int:
  """Counts the elements of a tree of arrays or shapes."""
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
