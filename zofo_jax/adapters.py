"""LoRA adapters (Hu et al., 2021, "LoRA: low-rank adaptation of LLMs").

W x becomes W x + (alpha / rank) B A x, in the parametrisation of PEFT. An
adapter is a tree that mirrors module paths and holds a `Lora` under each
adapted module; a model reads it as its collection "adapter". Adapters of many
tasks are a leading axis under `vmap`.
"""

import dataclasses
import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zofo_jax import errors, perturbed

QUERY_VALUE = r"attention/(query|value)$"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lora:
  """A low-rank addition to one weight matrix [in, out].

  Attributes:
    a: [in, R] or, stacked, [layers, in, R]; float32.
    b: [R, out] or [layers, R, out]; float32.
    scale: alpha / rank; static.
  """

  a: jax.Array
  b: jax.Array
  scale: float = dataclasses.field(metadata={"static": True})


def lora_product(x: jax.Array, lora: Lora) -> jax.Array:
  """Multiplies x [..., in] by scale * A B, in the adapter's dtype."""
  return lora.scale * ((x.astype(lora.a.dtype) @ lora.a) @ lora.b)


def init_lora(
  key: jax.Array,
  base: Any,
  *,
  rank: int,
  alpha: float,
  targets: str = QUERY_VALUE,
) -> dict[str, Any]:
  """Starts an adapter: A uniform within 1/sqrt(in), B zero, as PEFT does.

  Args:
    key: typed PRNG key. Folded with each module's path, not consumed.
    base: nested dict of weights, or of their shapes.
    rank: R, at least 1.
    alpha: numerator of the scale alpha / rank.
    targets: pattern searched in the module path, `layers/attention/query`.

  Returns:
    Nested dict like `base` with {"lora": Lora} at each module that matches.

  Raises:
    UserError: the rank is below 1 or no module matches `targets`.
  """
  if rank < 1:
    raise errors.UserError(f"LoRA's rank is {rank}; expected at least 1.")
  adapter: dict[str, Any] = {}
  modules = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(base):
    module, _, leaf_name = perturbed.path_name(path).rpartition("/")
    if leaf_name != "kernel":
      continue
    modules.append(module)
    if not re.search(targets, module):
      continue
    *stack, features_in, features_out = leaf.shape
    bound = 1.0 / np.sqrt(features_in)
    own = jax.random.fold_in(key, np.uint32(zlib.crc32(module.encode())))
    lora = Lora(
      a=jax.random.uniform(
        own, (*stack, features_in, rank), jnp.float32, -bound, bound
      ),
      b=jnp.zeros((*stack, rank, features_out), jnp.float32),
      scale=alpha / rank,
    )
    node = adapter
    for name in module.split("/"):
      node = node.setdefault(name, {})
    node["lora"] = lora
  if not adapter:
    raise errors.UserError(
      f"LoRA's targets '{targets}' match no module; the modules are "
      f"{', '.join(modules)}."
    )
  return adapter


def merge_lora(base: Any, adapter: Any) -> Any:
  """Folds an adapter into the weights: kernel + scale * A B.

  Args:
    base: nested dict of weights.
    adapter: nested dict from `init_lora` of the same model.

  Returns:
    A new tree like `base`; the product is taken in float32, the sum is
    rounded once to the kernel's dtype.
  """
  merged = dict(base)
  for name, child in adapter.items():
    if name != "lora":
      merged[name] = merge_lora(base[name], child)
      continue
    kernel = base["kernel"]
    delta = child.scale * jnp.einsum(
      "...dr,...rf->...df", child.a, child.b, precision="highest"
    )
    merged["kernel"] = (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
  return merged


def count_parameters(tree: Any) -> int:
  """Counts the elements of a tree of arrays or shapes."""
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
