"""The largest models that fit a topology, for each way of storing weights."""

from collections.abc import Callable, Mapping
from typing import Any

from zofo_jax import errors, models
from zofo_jax.models.hf import published

# Changes of the config, besides none.
STORAGES: tuple[Mapping[str, str], ...] = (
  {},
  {"model.quantize": "int4"},
  {"model.offload": "host"},
  {"model.quantize": "int4", "model.offload": "host"},
)


def largest(
  model_type: str,
  fits: Callable[[Mapping[str, Any]], bool],
  remat: bool = True,
) -> dict[str, str | None]:
  """Finds the largest published models of a family that fit.

  Args:
    model_type: of the family, as in config.json.
    fits: changes of the config, `model.name` among them, to whether it fits.
    remat: `model.remat` of the config. Without it activations may decide,
      however weights are stored: the last of `STORAGES` is tried with it, too.

  Returns:
    For each of `STORAGES`, as flags, the name of the model; None if the
    smallest does not fit, or weights cannot be stored in this way.
  """
  sizes = {
    name: _size(config)
    for name, config in published.CONFIGS.items()
    if config["model_type"] == model_type
  }
  names = sorted(sizes, key=lambda name: sizes[name])

  ways: list[Mapping[str, Any]] = [*STORAGES]
  if not remat:
    ways.append({**STORAGES[-1], "model.remat": True})

  def last(changes):
    return _last(names, lambda name: fits({**changes, "model.name": name}))

  return {
    " ".join(f"--config.{k}={v}" for k, v in changes.items()): last(changes)
    for changes in ways
  }


def _last(names: list[str], fits: Callable[[str], bool]) -> str | None:
  """Returns the last of some names that fits, if those before it do too."""
  low, high = 0, len(names)
  while low < high:
    middle = (low + high) // 2
    try:
      does = fits(names[middle])
    except errors.UserError:
      does = False
    low, high = (middle + 1, high) if does else (low, middle)
  return names[low - 1] if low else None


def _size(config: dict[str, Any]) -> int:
  """Returns about how many weights the layers of a model have."""
  c = models.from_hf(config)[0].config
  return c.num_layers * c.hidden_size * (4 * c.hidden_size + 3 * c.mlp_size)
