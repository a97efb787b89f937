"""Settings of a shell that the numbers of a run would depend on.

jax reads most of them from variables such as JAX_ENABLE_X64. A command sets
those that decide what is computed to fixed values; those that decide how the
compiler rounds are recorded with the run.
"""

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

import jax

from zofo_jax import errors

# The defaults of jax, with which runs were made from the first version on.
FIXED = {
  "jax_default_prng_impl": "threefry2x32",
  "jax_disable_jit": False,
  "jax_enable_x64": False,
  "jax_high_dynamic_range_gumbel": False,
  "jax_numpy_dtype_promotion": "standard",
  "jax_random_seed_offset": 0,
  "jax_softmax_custom_jvp": False,
  "jax_threefry_partitionable": True,
}
# They may be set for speed or for precision, so they are compared instead.
_ROUNDING = (
  "jax_default_matmul_precision",
  "jax_exec_time_optimization_effort",
  "jax_optimization_level",
)
_VARIABLES = (
  "LIBTPU_INIT_ARGS",
  "NPROC",
  "NVIDIA_TF32_OVERRIDE",
  "PJRT_NPROC",
  "XLA_FLAGS",
)
# Of these, those that change more than last bits.
_WARNED = ("JAX_DEFAULT_MATMUL_PRECISION", "NVIDIA_TF32_OVERRIDE")
# Compilers may then assume that nothing is NaN, and reorder sums.
_FAST_MATH = re.compile(
  r"--(xla_\w*fast_(?:math|min_max))(?:=(?:true|1))?(?=\s|$)", re.I
)


def _different() -> dict[str, Any]:
  """Returns the current values of fixed settings that have another one."""
  different = {}
  for name, fixed_value in FIXED.items():
    value = getattr(jax.config, name, fixed_value)  # not all versions have all
    value = getattr(value, "value", value)  # of an enumeration
    if value != fixed_value:
      different[name] = value
  return different


@contextlib.contextmanager
def fixed() -> Iterator[None]:
  """Fixes the settings in a `with` statement; warns of those that differ.

  Raises:
    UserError: XLA_FLAGS allow inexact arithmetic.
  """
  check_compiler()
  before = _different()
  for name in _WARNED:
    if name in os.environ:
      logging.getLogger("zofo_jax").warning(
        "%s is %r in this shell; the numbers of a run depend on it, so it is "
        "recorded and compared.",
        *(name, os.environ[name]),
      )
  try:
    for name, value in before.items():
      logging.getLogger("zofo_jax").warning(
        "%s is %r in this shell, which would change the numbers of a run; it "
        "is set to %r.",
        *(name.upper(), value, FIXED[name]),
      )
      jax.config.update(name, FIXED[name])
    yield
  finally:
    for name, value in before.items():
      jax.config.update(name, value)


def check() -> None:
  """Checks the settings of a program that uses the library.

  Raises:
    UserError: one of them would change the numbers of a run.
  """
  check_compiler()
  for name, value in _different().items():
    raise errors.UserError(
      f"{name} is {value!r} in this process, which would change the numbers "
      f"of a run; expected {FIXED[name]!r}."
    )


def check_compiler() -> None:
  """Checks that XLA_FLAGS let the compiler round as IEEE 754 says.

  Raises:
    UserError: names the flag that does not.
  """
  match = _FAST_MATH.search(os.environ.get("XLA_FLAGS", ""))
  if match:
    raise errors.UserError(
      f"XLA_FLAGS: {match[1]} makes sums inexact and hides NaN; expected it "
      "to be left out or false."
    )


def rounding() -> dict[str, Any]:
  """Returns the settings that the last bits of a result may depend on."""
  settings = {name: getattr(jax.config, name, None) for name in _ROUNDING}
  return {
    name: value if value is None else str(value)
    for name, value in (
      settings | {name: os.environ.get(name) for name in _VARIABLES}
    ).items()
  }
