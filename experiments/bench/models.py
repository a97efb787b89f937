"""Models of the benchmark's sizes, random weights, and rows as batches."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench import workload

from zofo_jax.core import losses
from zofo_jax.core import tree as tree_lib
from zofo_jax.models import opt, transformer


def llama_module(sizes: workload.Decoder) -> transformer.Transformer:
  config = transformer.Config(
    vocab_size=sizes.vocab_size,
    hidden_size=sizes.hidden_size,
    mlp_size=sizes.mlp_size,
    num_layers=sizes.num_layers,
    num_heads=sizes.num_heads,
    num_kv_heads=sizes.num_kv_heads,
    head_dim=sizes.hidden_size // sizes.num_heads,
    max_length=sizes.max_length,
    tied_head=True,
  )
  return transformer.Transformer(config)


def opt_module(sizes: workload.Decoder) -> transformer.Transformer:
  config = opt.config_from_hf(
    {
      "vocab_size": sizes.vocab_size,
      "hidden_size": sizes.hidden_size,
      "ffn_dim": sizes.mlp_size,
      "num_hidden_layers": sizes.num_layers,
      "num_attention_heads": sizes.num_heads,
      "max_position_embeddings": sizes.max_length,
    }
  )
  return transformer.Transformer(config)


def random_base(module: Any, dtype: str) -> Any:
  """Makes weights, one host copy of a leaf at a time."""
  ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), *[ids] * 5)["params"]
  rng = np.random.default_rng(0)

  def leaf(path, shape):
    if tree_lib.path_name(path).endswith("scale"):
      return jnp.ones(shape.shape, dtype)
    values = rng.standard_normal(shape.shape, np.float32)
    values *= 0.02
    return jnp.asarray(values, dtype)

  return jax.tree.map_with_path(leaf, shapes)


def device_peak_bytes() -> int | None:
  """Returns the peak of the device's allocator; None on a CPU."""
  return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def num_bytes(tree: Any) -> int:
  """Counts the bytes of a tree of arrays."""
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def make_batch(rows: workload.Rows) -> losses.Batch:
  """Makes a batch whose loss is -log p of each row's target."""
  count = len(rows.tokens)
  zeros = np.zeros((count, 1, 1), np.int32)
  batch = losses.Batch(
    tokens=rows.tokens[:, None],
    mask=rows.mask()[:, None],
    positions=(rows.lengths - 1)[:, None, None],
    target_slot=zeros,
    target_token=rows.targets[:, None, None],
    target_option=zeros,
    target_weight=np.ones((count, 1, 1), np.float32),
    label=np.zeros(count, np.int32),
    option_mask=np.ones((count, 1), bool),
    example_weight=np.ones(count, np.float32),
  )
  return jax.tree.map(jnp.asarray, batch)
