"""Bilevel-ZOFO in JAX: zeroth-order backbones, first-order adapters."""

try:
  import jax as _jax  # noqa: F401
except ValueError as error:  # of a variable such as JAX_ENABLE_X64=banana
  from zofo_jax import errors as _errors

  _errors.exit_if_command(error)
  raise

from zofo_jax import adapters, errors
from zofo_jax.core import (
  baselines,
  directions,
  guided,
  keys,
  losses,
  multitask,
  offload,
  outer,
  perturbed,
  population,
  quantized,
  zo,
)
from zofo_jax.core.bilevel import bilevel_step, make_bilevel_step
from zofo_jax.core.es import EsAlgorithm, es_step, make_es_step
from zofo_jax.core.mezo import (
  MezoAlgorithm,
  MezoInfo,
  MezoState,
  make_mezo_step,
  mezo_step,
)
from zofo_jax.core.outer import OuterTransform
from zofo_jax.core.sampler import Sampler
from zofo_jax.core.types import (
  BilevelAlgorithm,
  BilevelBatch,
  BilevelHParams,
  BilevelInfo,
  BilevelState,
  LossFn,
)
from zofo_jax.core.zeroth_order import ZerothOrder

__version__ = "0.1.0"

__all__ = [
  "BilevelAlgorithm",
  "BilevelBatch",
  "BilevelHParams",
  "BilevelInfo",
  "BilevelState",
  "EsAlgorithm",
  "LossFn",
  "MezoAlgorithm",
  "MezoInfo",
  "MezoState",
  "OuterTransform",
  "Sampler",
  "ZerothOrder",
  "adapters",
  "baselines",
  "bilevel_step",
  "directions",
  "errors",
  "es_step",
  "guided",
  "keys",
  "losses",
  "make_bilevel_step",
  "make_es_step",
  "make_mezo_step",
  "mezo_step",
  "multitask",
  "offload",
  "outer",
  "perturbed",
  "population",
  "quantized",
  "zo",
]


def __dir__() -> list[str]:
  """Lists the public names; subpackages that are not public are left out."""
  return sorted([*__all__, "__version__", "__doc__"])
