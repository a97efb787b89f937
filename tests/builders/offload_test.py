"""A model whose layers are in the host's memory, from checkpoint to export."""

import flax.traverse_util
import jax
import numpy as np
import pytest

from tests import tiny
from zofo_jax import adapters, errors
from zofo_jax.builders import model as model_lib
from zofo_jax.config import validate
from zofo_jax.core import factors, offload
from zofo_jax.report import memory
from zofo_jax.sharding import mesh as mesh_lib


@pytest.fixture(scope="module")
def model(tiny_model):
  return model_lib.load_model(str(tiny_model), offload="host")


@pytest.fixture(scope="module")
def whole(tiny_model):
  return model_lib.load_base(model_lib.load_model(str(tiny_model)))


@pytest.fixture(scope="module")
def base(model):
  return model_lib.load_base(model)


def test_matrices_of_layers_alone_are_on_the_host(base, whole):
  jax.tree.map(np.testing.assert_array_equal, base, whole)
  flat = flax.traverse_util.flatten_dict(base, sep="/")
  on_host = {path for path, leaf in flat.items() if offload.is_on_host(leaf)}
  assert on_host == {
    path
    for path in flat
    if path.startswith("layers/") and path.endswith("kernel")
  }


@pytest.mark.many_devices
def test_every_chip_has_its_shards_on_its_host(model, base, tiny_model):
  mesh = mesh_lib.make({"pert": 1, "data": 1, "fsdp": 2, "model": 2})
  sharded = model_lib.load_base(model, mesh)
  jax.tree.map(np.testing.assert_array_equal, sharded, base)
  kernel = sharded["layers"]["mlp"]["gate"]["kernel"]
  assert offload.is_on_host(kernel)
  assert kernel.addressable_shards[0].data.shape == (2, 16, 32)
  tokens = np.arange(3, 19, dtype=np.int32).reshape(2, 8)
  logits = jax.jit(
    lambda base: model.module.apply(
      {"params": base}, tokens, tokens > 0, method="logits"
    )
  )
  in_memory = model_lib.load_base(model_lib.load_model(str(tiny_model)), mesh)
  np.testing.assert_array_equal(logits(sharded), logits(in_memory))


def test_an_export_is_read_a_layer_at_a_time(model, base, whole, tmp_path):
  adapter = adapters.init_lora(jax.random.key(0), whole, rank=2, alpha=4.0)
  adapter = jax.tree.map(lambda leaf: leaf + 0.1, adapter)
  merged = factors.displace(base, adapters.fold_lora(adapter))
  model_lib.save_base(tmp_path / "out", model, merged)
  again = model_lib.load_base(model_lib.load_model(str(tmp_path / "out")))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    again,
    adapters.merge_lora(whole, adapter),
  )


def test_tokens_are_generated_from_the_host(model, base, whole):
  rows = np.arange(3, 19, dtype=np.int32).reshape(2, 8)
  generate = jax.jit(model_lib.make_generate_fn(model, max_new_tokens=4))
  keys = jax.random.split(jax.random.key(0), 2)
  jax.tree.map(
    np.testing.assert_array_equal,
    generate(base, {}, rows, rows > 0, keys),
    generate(whole, {}, rows, rows > 0, keys),
  )


def test_too_little_memory_is_said_before_anything_is_read(model, monkeypatch):
  monkeypatch.setattr(memory, "available_host_bytes", lambda: 10**5)
  with pytest.raises(errors.UserError, match="GB are available; expected more"):
    model_lib.load_base(model)
  monkeypatch.setattr(memory, "available_host_bytes", lambda: None)
  monkeypatch.setattr(offload, "MEMORY_KIND", "far_away")
  with pytest.raises(errors.UserError, match="memory 'far_away'; those of cpu"):
    model_lib.load_base(model)


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"method": "full"}, "method 'full' needs gradients of all weights on the"),
    ({"zo.optimizer": "adam"}, "zo.optimizer 'adam' needs trees of the size"),
    (
      {"zo.write_every": 4, "zo.direction": "guided"},
      "'guided' writes the weights in every step; expected 1; found 4",
    ),
    (
      {"zo.write_every": 4, "model.offload": ""},
      "weights on the device are written in every step",
    ),
    (
      {"zo.write_every": 4, "method": "mezo_then_peft"},
      "'mezo_then_peft' is neither 'bilevel' nor 'mezo'",
    ),
    ({"model.offload": "disk"}, "expected one of .*host; found 'disk'"),
  ],
)
def test_what_does_not_fit_a_device_is_said(changes, words):
  config = tiny.base_config()
  config.model.name, config.model.offload = "model", "host"
  validate.check(config)
  config.update_from_flattened_dict(changes)
  with pytest.raises(errors.UserError, match=words):
    validate.check(config)
