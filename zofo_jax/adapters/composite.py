"""Functions on adapters of any kind, or of several kinds at once."""

from typing import Any

import jax

from zofo_jax.adapters import lora, prefix, prompt
from zofo_jax.core import tree as tree_lib

_NODES = (lora.Lora, prefix.Prefix, prefix.ProjectedPrefix, prompt.Prompt)


def parts(adapter: Any) -> dict[str, Any]:
  """Returns an adapter's parts by path: {"embed/prompt": Prompt, ...}."""
  return tree_lib.named_leaves(
    adapter, is_leaf=lambda node: isinstance(node, _NODES)
  )


def join(*adapters: Any) -> dict[str, Any]:
  """Joins adapters of several kinds into one.

  Args:
    *adapters: nested dicts with disjoint parts.

  Returns:
    A nested dict with all parts.

  Raises:
    ValueError: two adapters have a part at the same path.
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
  """Replaces every projected prefix by the keys and values it computes.

  Models accept both. Use this for export, and to drop the projection network
  after training.
  """
  return jax.tree.map(
    lambda node: (
      prefix.project(node) if isinstance(node, prefix.ProjectedPrefix) else node
    ),
    adapter,
    is_leaf=lambda node: isinstance(node, _NODES),
  )


def prefix_length(adapter: Any) -> int:
  """Returns the number of positions of the prefix; 0 without one."""
  for node in parts(adapter).values():
    if isinstance(node, prefix.Prefix):
      return node.key.shape[-3]
    if isinstance(node, prefix.ProjectedPrefix):
      return node.embedding.shape[-2]
  return 0


def prompt_length(adapter: Any) -> int:
  """Returns the number of virtual tokens of the prompt; 0 without one."""
  for node in parts(adapter).values():
    if isinstance(node, prompt.Prompt):
      return node.embedding.shape[-2]
  return 0


def has_dropout(adapter: Any) -> bool:
  """Returns whether the training loss needs a key for the adapter's dropout."""
  return any(getattr(node, "dropout", 0.0) for node in parts(adapter).values())
