"""Reads config.json; missing or unsupported fields raise a `UserError`."""

from collections.abc import Mapping
from typing import Any

from zofo_jax import errors
from zofo_jax.models import layers


def field(config: Mapping[str, Any], name: str) -> Any:
  """Reads a required field of config.json."""
  if config.get(name) is None:
    raise errors.UserError(f"config.json has no field '{name}'.")
  return config[name]


def activation(config: Mapping[str, Any], name: str, default: str) -> str:
  """Reads and checks the name of an activation function."""
  value = config.get(name, default)
  if value not in layers.ACTIVATIONS:
    raise errors.UserError(
      f"config.json has {name} '{value}'; supported are "
      f"{', '.join(layers.ACTIVATIONS)}."
      f"{errors.nearest(str(value), layers.ACTIVATIONS)}"
    )
  return value


def check(config: Mapping[str, Any], name: str, expected: Any) -> None:
  """Raises a `UserError` if a field has an unsupported value."""
  if name in config and config[name] not in (None, expected):
    raise errors.UserError(
      f"config.json has {name} = {config[name]!r}; only {expected!r} is "
      "supported."
    )
