"""The families at one size, and a step's temporaries of two of them."""

import families
import pytest
from bench import workload

from zofo_jax import models
from zofo_jax.models import decoder, transformer
from zofo_jax.models.hf import published


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "falcon", "bert"])
def test_a_family_at_one_size_keeps_its_features(name):
  config = next(
    models.from_hf(config)[0].config
    for config in published.CONFIGS.values()
    if config["model_type"] == name
  )
  same = families.at_one_size(config, workload.TINY.llama)
  assert (same.num_layers, same.hidden_size, same.head_dim) == (2, 16, 8)
  for feature in ("norm", "norm_places", "fused_qkv", "gated", "parallel"):
    assert getattr(same, feature) == getattr(config, feature)
  if config.windows:
    assert same.windows == config.windows[:2]
  shapes = decoder.parameter_shapes(transformer.Transformer(same))
  assert shapes["embed/embedding"] == (128, 16)


# With a large table, and with a small one.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3_text", "llama"])
def test_temporaries_of_a_step_are_a_tenth_of_the_weights(name):
  _, module = families.smallest(name)
  assert families.memory(module)["ratio"] <= 0.1
