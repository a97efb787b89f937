"""Bilevel-ZOFO in JAX: zeroth-order backbones, first-order adapters."""

from zofo_jax.core import (
  baselines,
  directions,
  keys,
  losses,
  multitask,
  outer,
  perturbed,
  zo,
)
from zofo_jax.core.bilevel import bilevel_step, make_bilevel_step
from zofo_jax.core.sampler import Sampler
from zofo_jax.core.types import (
  BilevelAlgorithm,
  BilevelBatch,
  BilevelHParams,
  BilevelInfo,
  BilevelState,
)

__version__ = "0.1.0"

__all__ = [
  "BilevelAlgorithm",
  "BilevelBatch",
  "BilevelHParams",
  "BilevelInfo",
  "BilevelState",
  "Sampler",
  "baselines",
  "bilevel_step",
  "directions",
  "keys",
  "losses",
  "make_bilevel_step",
  "multitask",
  "outer",
  "perturbed",
  "zo",
]
