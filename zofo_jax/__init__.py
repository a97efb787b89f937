"""Bilevel-ZOFO in JAX: zeroth-order backbones, first-order adapters."""

from zofo_jax.core import (
  baselines,
  directions,
  losses,
  multitask,
  outer,
  perturbed,
  zo,
)
from zofo_jax.core.bilevel import (
  BilevelAlgorithm,
  BilevelBatch,
  BilevelHParams,
  BilevelInfo,
  BilevelState,
  bilevel_step,
  make_bilevel_step,
)
from zofo_jax.core.sampler import Sampler

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
  "losses",
  "make_bilevel_step",
  "multitask",
  "outer",
  "perturbed",
  "zo",
]
