"""LoRA adapters (Hu et al., 2021, "LoRA: low-rank adaptation of LLMs").

W x becomes W x + (alpha / rank) B A x, parametrised as in PEFT; with rank
stabilisation (Kalajdzievski, 2023, "rsLoRA") the factor is alpha / sqrt(rank).
"""

import dataclasses
import math
import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zofo_jax import errors
from zofo_jax.core import tree as tree_lib
from zofo_jax.core.array_like import is_array_like
from zofo_jax.core.factors import Factors

QUERY_VALUE = r"attention/(query|value)$"

# Matrices that are several in one, which answer to the names of all of them.
_FUSED = {"qkv": ("query", "key", "value"), "gate_up": ("gate", "up")}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lora:
  """A low-rank update of one weight matrix [in, out].

  Attributes:
    a: [in, R] or, stacked, [layers, in, R]; float32.
    b: [R, out] or [layers, R, out]; float32.
    scale: factor of the product; static.
    dropout: probability of dropping an input of the product during training;
      static.
  """

  a: jax.Array
  b: jax.Array
  scale: float = dataclasses.field(metadata={"static": True})
  dropout: float = dataclasses.field(default=0.0, metadata={"static": True})


def lora_product(
  x: jax.Array, lora: Lora, key: jax.Array | None = None
) -> jax.Array:
  """Multiplies inputs by scale * A B, in the adapter's dtype.

  Args:
    x: [..., in], any float dtype.
    lora: one layer's factors.
    key: typed PRNG key of the dropout; None for no dropout.

  Returns:
    [..., out] in the adapter's dtype.
  """
  x = x.astype(lora.a.dtype)
  if key is not None and lora.dropout:
    keep = jax.random.bernoulli(key, 1.0 - lora.dropout, x.shape)
    x = jnp.where(keep, x / (1.0 - lora.dropout), 0.0)
  return lora.scale * ((x @ lora.a) @ lora.b)


def _names(module: str) -> list[str]:
  """Returns the paths that a module answers to."""
  parent, _, last = module.rpartition("/")
  return [module, *(f"{parent}/{part}" for part in _FUSED.get(last, ()))]


def init_lora(
  key: jax.Array,
  base: Any,
  *,
  rank: int,
  alpha: float,
  targets: str = QUERY_VALUE,
  dropout: float = 0.0,
  rank_stabilized: bool = False,
) -> dict[str, Any]:
  """Initialises LoRA as PEFT does: A uniform within 1/sqrt(in), B zero.

  Args:
    key: typed PRNG key. Folded with each module's path, not consumed.
    base: nested dict of weights, or of their shapes.
    rank: R, at least 1.
    alpha: numerator of the scale.
    targets: regular expression searched in module paths such as
      `layers/attention/query`; one matrix for query, key and value answers to
      all three names.
    dropout: probability of dropping an input of the adapter, in [0, 1).
    rank_stabilized: whether to scale by alpha / sqrt(rank) instead of
      alpha / rank.

  Returns:
    Nested dict like `base` with {"lora": Lora} at each module that matches.

  Raises:
    UserError: the rank is below 1, the dropout is not in [0, 1), or no module
      matches `targets`.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from zofo_jax import adapters
    >>> base = {"layers": {"query": {"kernel": jnp.zeros((2, 4, 4))}}}
    >>> adapter = adapters.init_lora(
    ...   jax.random.key(0), base, rank=1, alpha=2.0, targets="query")
    >>> adapter["layers"]["query"]["lora"].a.shape
    (2, 4, 1)
  """
  if rank < 1:
    raise errors.UserError(f"LoRA's rank is {rank}; expected at least 1.")
  if not 0.0 <= dropout < 1.0:
    raise errors.UserError(
      f"LoRA's dropout is {dropout}; expected at least 0 and below 1."
    )
  adapter: dict[str, Any] = {}
  modules = []
  for name, leaf in tree_lib.named_leaves(base, is_array_like).items():
    module, _, leaf_name = name.rpartition("/")
    if leaf_name != "kernel":
      continue
    modules.append(module)
    if not any(re.search(targets, name) for name in _names(module)):
      continue
    *stack, features_in, features_out = leaf.shape
    bound = 1.0 / np.sqrt(features_in)
    module_key = jax.random.fold_in(key, np.uint32(zlib.crc32(module.encode())))
    lora = Lora(
      a=jax.random.uniform(
        module_key, (*stack, features_in, rank), jnp.float32, -bound, bound
      ),
      b=jnp.zeros((*stack, rank, features_out), jnp.float32),
      scale=alpha / (math.sqrt(rank) if rank_stabilized else rank),
      dropout=dropout,
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


def fold_lora(adapter: Any) -> dict[str, Factors]:
  """Returns what an adapter adds to the weights, as factors.

  The `fold` of a `guided.Guide`.

  Args:
    adapter: nested dict from `init_lora`.

  Returns:
    {path of a kernel: scale * A and B}.

  Raises:
    UserError: a part of the adapter is not LoRA.
  """
  folded = {}
  is_lora = lambda node: isinstance(node, Lora)
  for name, lora in tree_lib.named_leaves(adapter, is_lora).items():
    if not is_lora(lora):
      raise errors.UserError(
        f"The adapter's {name or 'array'} is not added to any weight; expected "
        "LoRA alone."
      )
    kernel = name.removesuffix("lora") + "kernel"
    folded[kernel] = Factors(lora.scale * lora.a, lora.b)
  return folded


def merge_lora(base: Any, adapter: Any) -> Any:
  """Merges an adapter into the weights: kernel + scale * A B.

  Args:
    base: nested dict of weights.
    adapter: nested dict from `init_lora` of the same model.

  Returns:
    A new tree like `base`. The product is computed in float32; the sum is
    rounded once to the kernel's dtype.

  Raises:
    UserError: a part of the adapter is not LoRA and has no equivalent weights.
  """
  merged = dict(base)
  for name, child in adapter.items():
    if isinstance(child, Lora):
      kernel = base["kernel"]
      delta = child.scale * jnp.einsum(
        "...dr,...rf->...df", child.a, child.b, precision="highest"
      )
      merged["kernel"] = (kernel.astype(jnp.float32) + delta).astype(
        kernel.dtype
      )
    elif isinstance(child, dict):
      merged[name] = merge_lora(base[name], child)
    else:
      raise errors.UserError(
        f"The adapter has a {name}, which cannot be merged into the weights; "
        "expected LoRA alone."
      )
  return merged
