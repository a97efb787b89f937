"""Reading config.json, with a sentence for what is missing or not supported."""

from collections.abc import Mapping
from typing import Any

from zofo_jax import errors
from zofo_jax.models import layers


def field(config: Mapping[str, Any], name: str) -> Any:
  """Reads a field that config.json must have."""
  if config.get(name) is None:
    raise errors.UserError(f"config.json has no field '{name}'.")
  return config[name]


def activation(config: Mapping[str, Any], name: str, default: str) -> str:
  """Reads the name of an activation function and checks it."""
  found, known = config.get(name, default), layers.ACTIVATIONS
  if found not in known:
    raise errors.UserError(
      f"config.json has {name} '{found}'; supported are {', '.join(known)}."
      f"{errors.nearest(str(found), known)}"
    )
  return found


def check(config: Mapping[str, Any], name: str, expected: Any) -> None:
  """Stops at a field whose value needs something not implemented."""
  if name in config and config[name] not in (None, expected):
    raise errors.UserError(
      f"config.json has {name} = {config[name]!r}; only {expected!r} is "
      "supported."
    )
