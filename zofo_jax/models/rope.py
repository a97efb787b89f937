"""Rotary position embeddings (Su et al., 2021, "RoFormer") and extensions.

Default, linear interpolation, dynamic NTK, Llama-3's frequency bands, YaRN
(Peng et al., 2023) and LongRoPE (Ding et al., 2024), as defined in
transformers. Angles are float32.
"""

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zofo_jax import errors
from zofo_jax.models.hf import config as config_lib

# The kinds, and the fields that each must have.
_NEEDED: dict[str, tuple[str, ...]] = {
  "default": (),
  "linear": ("factor",),
  "dynamic": ("factor",),
  "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
  "yarn": ("factor",),
  "longrope": ("short_factor", "long_factor"),
}
KINDS = tuple(_NEEDED)


@dataclasses.dataclass(frozen=True)
class Rope:
  """Parameters of rotary position embeddings.

  Attributes:
    kind: one of KINDS, or "none": tokens have no position in these layers.
    theta: base of the frequencies.
    factor: factor by which the context is extended.
    original_length: context length of pretraining (all but default, linear).
    low_freq_factor: llama3, wavelengths above original_length / this are
      scaled by `factor`.
    high_freq_factor: llama3, wavelengths below original_length / this are kept.
    attention_factor: yarn and longrope, factor of cos and sin; None derives
      it.
    mscale: yarn, in the numerator of the derived attention factor.
    mscale_all_dim: yarn, in its denominator.
    beta_fast: yarn, rotations above which a dimension is kept.
    beta_slow: yarn, rotations below which a dimension is scaled.
    truncate: yarn, whether the ends of the band are rounded outwards.
    short_factors: longrope, divisors of the frequencies within
      original_length.
    long_factors: longrope, divisors in rows that are longer.
    fraction: part of each head, from its start, that is rotated.
  """

  kind: str = "default"
  theta: float = 10000.0
  factor: float = 1.0
  original_length: int = 2048
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  attention_factor: float | None = None
  mscale: float | None = None
  mscale_all_dim: float | None = None
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True
  short_factors: tuple[float, ...] = ()
  long_factors: tuple[float, ...] = ()
  fraction: float = 1.0

  @property
  def depends_on_length(self) -> bool:
    """Returns whether a token's angle depends on the length of its row."""
    return self.kind in ("dynamic", "longrope")

  def width(self, head_dim: int) -> int:
    """Returns how many features of a head are rotated."""
    return int(head_dim * self.fraction)


# The rotary positions of layers that have none.
NONE = Rope("none")

_NUMBERS = (
  "attention_factor",
  "beta_fast",
  "beta_slow",
  "factor",
  "high_freq_factor",
  "low_freq_factor",
  "mscale",
  "mscale_all_dim",
)
_POSITIVE = _NUMBERS[:-2]
# `finetuned` only records how a model was made.
_FIELDS = frozenset(
  "finetuned long_factor original_max_position_embeddings"
  " partial_rotary_factor rope_theta rope_type short_factor truncate"
  " type".split()
).union(_NUMBERS)


def from_hf(
  config: Mapping[str, Any],
  max_length: int,
  head_dim: int,
  partial: float | None = None,
) -> Rope:
  """Reads RoPE's parameters from config.json.

  Args:
    config: the file as a dict, with `rope_parameters` (transformers 5) or with
      `rope_theta` and `rope_scaling`.
    max_length: the model's context length.
    head_dim: width of a head.
    partial: the default of partial_rotary_factor; None for models that rotate
      whole heads, whatever the field says.

  Returns:
    The parameters.

  Raises:
    UserError: a kind or a field is not supported, or a field is missing.
  """
  name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
  scaling = config.get(name) or {}
  file = f"config.json's {name}"
  if not isinstance(scaling, Mapping):
    raise errors.UserError(f"{file} is {scaling!r}; expected an object.")
  config_lib.check_fields(scaling, _FIELDS, file)
  kind = scaling.get("rope_type", scaling.get("type", "default"))
  config_lib.check_kind(kind, KINDS, f"{file} has type")
  fraction = 1.0 if partial is None else partial
  for fields, place in ((config, config_lib.FILE), (scaling, file)):
    fraction = config_lib.number(
      fields, "partial_rotary_factor", fraction, place
    )
    if partial is None and fraction != 1.0:
      raise errors.UserError(
        f"{place} has partial_rotary_factor = {fraction}; only 1.0 is "
        "supported."
      )
  for field in _NEEDED[kind]:
    if scaling.get(field) is None:
      raise errors.UserError(f"{file} is of type '{kind}' without '{field}'.")
  theta = config_lib.number(config, "rope_theta", 10000.0)
  theta = config_lib.number(scaling, "rope_theta", theta, file)
  values: dict[str, Any] = {}
  if kind != "default":
    for option in _NUMBERS:
      if scaling.get(option) is not None:
        values[option] = config_lib.number(scaling, option, 0.0, file)
    values["truncate"] = config_lib.flag(scaling, "truncate", True, file)
  bad = theta <= 1 or values.get("factor", 1.0) < 1
  bad |= any(values.get(name, 1.0) <= 0 for name in _POSITIVE)
  if kind == "llama3":
    bad |= values["low_freq_factor"] >= values["high_freq_factor"]
  if bad:
    raise errors.UserError(
      f"{file} has rope_theta = {theta} and {values}; expected a theta above "
      "1, a factor of at least 1, and positive numbers (low_freq_factor below "
      "high_freq_factor)."
    )
  values["original_length"] = max_length
  original = "original_max_position_embeddings"
  for fields, place in ((scaling, file), (config, config_lib.FILE)):
    if (
      kind in ("llama3", "yarn", "longrope")
      and fields.get(original) is not None
    ):
      values["original_length"] = config_lib.integer(fields, original, place)
  width = int(head_dim * fraction)
  least = 4 if kind == "dynamic" else 2
  if not 0 < fraction <= 1 or width < least or width % 2:
    raise errors.UserError(
      f"config.json has heads of width {head_dim}, of which "
      f"partial_rotary_factor = {fraction} is rotated; rotary positions of "
      f"type '{kind}' expect at least {least} features, an even number."
    )
  if kind == "longrope":
    values.setdefault("factor", max_length / values["original_length"])
    for field in _NEEDED[kind]:
      values[field + "s"] = _factors(scaling, field, width // 2, file)
  return Rope(kind, theta, fraction=fraction, **values)


def _factors(
  scaling: Mapping[str, Any], field: str, size: int, file: str
) -> tuple[float, ...]:
  """Reads the divisors of the frequencies."""
  factors = scaling[field]
  if (
    not isinstance(factors, list)
    or len(factors) != size
    or any(type(f) not in (int, float) or not 0 < f < 1e9 for f in factors)
  ):
    raise errors.UserError(
      f"{file} has {field} = {reprlib.repr(factors)}; expected {size} positive "
      "numbers, one for each frequency."
    )
  return tuple(map(float, factors))


def _llama3(rope: Rope, frequency: np.ndarray) -> np.ndarray:
  """Scales long wavelengths, keeps short ones, interpolates in between."""
  turns = rope.original_length * frequency / (2 * math.pi)
  blend = (turns - rope.low_freq_factor) / (
    rope.high_freq_factor - rope.low_freq_factor
  )
  blend = np.clip(blend, 0.0, 1.0)
  return (1 - blend) * frequency / rope.factor + blend * frequency


def _yarn(rope: Rope, frequency: np.ndarray, head_dim: int) -> np.ndarray:
  """Interpolates, by dimension, between scaled and original frequencies."""

  def dimension(rotations):
    length = rope.original_length / (rotations * 2 * math.pi)
    return head_dim * math.log(length) / (2 * math.log(rope.theta))

  low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
  if rope.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, head_dim - 1)
  if low == high:
    high += 0.001
  ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
  return ramp * frequency / rope.factor + (1 - ramp) * frequency


def _attention_factor(rope: Rope) -> float:
  """Returns the factor of cos and sin of YaRN and LongRoPE; 1 for others."""
  if rope.kind not in ("yarn", "longrope"):
    return 1.0
  if rope.attention_factor is not None:
    return rope.attention_factor
  if rope.kind == "longrope":
    if rope.factor <= 1:
      return 1.0
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_length))

  def scale(mscale):
    return 0.1 * mscale * math.log(rope.factor) + 1 if rope.factor > 1 else 1.0

  if rope.mscale and rope.mscale_all_dim:
    return scale(rope.mscale) / scale(rope.mscale_all_dim)
  return scale(1.0)


def rotations(
  rope: Rope, head_dim: int, positions_BxL: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Computes the cosine and sine of every token's angles.

  Dynamic NTK and LongRoPE depend on the last position of each row, so that a
  row's result depends neither on padding nor on other rows.

  Args:
    rope: the parameters.
    head_dim: width of a head, of which `rope.width` features are rotated.
    positions_BxL: int32 positions; none of the padding's exceeds those of the
      real tokens.

  Returns:
    Two float32 arrays [B, L, 1, rope.width / 2].
  """
  width = rope.width(head_dim)
  exponent = np.arange(0, width, 2) / width
  frequency = rope.theta**-exponent
  if rope.kind == "none":
    frequency = 0 * frequency
  elif rope.kind == "linear":
    frequency = frequency / rope.factor
  elif rope.kind == "llama3":
    frequency = _llama3(rope, frequency)
  elif rope.kind == "yarn":
    frequency = _yarn(rope, frequency, width)
  elif rope.kind == "longrope":
    frequency = frequency / np.array(rope.short_factors)
  frequency_Bx1xF = jnp.asarray(frequency, jnp.float32)[None, None]
  if rope.depends_on_length:
    real_B = (jnp.max(positions_BxL, axis=1) + 1).astype(jnp.float32)
    stretch_B = jnp.maximum(real_B / rope.original_length, 1.0)
  if rope.kind == "dynamic":
    growth_B = (rope.factor * stretch_B - (rope.factor - 1)) ** (
      width / (width - 2)
    )
    frequency_Bx1xF = frequency_Bx1xF * jnp.power(
      growth_B[:, None, None], jnp.asarray(-exponent, jnp.float32)[None, None]
    )
  if rope.kind == "longrope":
    long = rope.theta**-exponent / np.array(rope.long_factors)
    frequency_Bx1xF = jnp.where(
      stretch_B[:, None, None] > 1,
      jnp.asarray(long, jnp.float32)[None, None],
      frequency_Bx1xF,
    )
  angle = positions_BxL[..., None].astype(jnp.float32) * frequency_Bx1xF
  factor = _attention_factor(rope)
  angle = angle[:, :, None, :]
  return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(x: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
  """Rotates the first features of each head by halves, [B, L, H, F]."""
  width = 2 * cosine.shape[-1]
  first, second = jnp.split(x[..., :width].astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
    [first * cosine - second * sine, second * cosine + first * sine], axis=-1
  )
  rotated = rotated.astype(x.dtype)
  if width == x.shape[-1]:
    return rotated
  return jnp.concatenate([rotated, x[..., width:]], axis=-1)
