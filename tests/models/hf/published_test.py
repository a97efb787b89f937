"""The configurations of published models."""

from zofo_jax import models
from zofo_jax.models.hf import published


def test_all_of_them_are_read():
  for name, config in published.CONFIGS.items():
    _, family = models.from_hf(config)
    assert family is models.FAMILIES[config["model_type"]], name
