"""The recorded tiny models of every family, ready to be applied."""

import dataclasses
import functools
from types import ModuleType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.models.reference import make_logits
from zofo_jax import models
from zofo_jax.core import directions, prng


class Recorded(NamedTuple):
  """A model, its weights and what transformers computes with them."""

  model: nn.Module
  family: ModuleType
  base: Any
  tokens: np.ndarray
  mask: np.ndarray
  logits: np.ndarray


def build(config, tensors, **options):
  """Makes (model, family, base) of a config and Hugging Face's tensors."""
  model, family = models.from_hf(config, **options)
  names = family.hf_parameters(model.config)
  tree = make_logits.nest(tensors, names, model.config.num_layers)
  return model, family, jax.tree.map(jnp.asarray, tree)


@functools.cache
def load(name, **options):
  config, tensors, tokens, mask, logits = make_logits.load(name)
  return Recorded(*build(config, tensors, **options), tokens, mask, logits)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, base, tokens, mask, adapter=None):
  """Logits at every position, float32 [B, L, V]."""
  variables = {"params": base, "adapter": adapter or {}}
  return model.apply(variables, tokens, mask, method="logits")


@dataclasses.dataclass(frozen=True)
class Waves(directions.Direction):
  """A direction that compiles in no time: sines of row, column and key."""

  def sample(self, key, shape, rows=None):
    if rows is None:
      rows = jnp.arange(shape[0])
    elif isinstance(rows, prng.RowRange):
      rows = rows.start + jnp.arange(rows.size)
    columns = jnp.arange(np.prod(shape[1:], dtype=int)) * 0.7
    phase = (key.direction[0] % 997).astype(jnp.float32)
    z = jnp.sin(
      phase
      + rows[..., None] * 1.3
      + jnp.expand_dims(columns, tuple(range(rows.ndim)))
    )
    return z.reshape(*rows.shape, *shape[1:])
