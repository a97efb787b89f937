"""A model whose matrices are integers, from its checkpoint to its export."""

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from zofo_jax import adapters, errors
from zofo_jax.builders import base_update
from zofo_jax.builders import model as model_lib
from zofo_jax.checkpoints import manager
from zofo_jax.config import validate
from zofo_jax.core import losses, perturbed, quantized
from zofo_jax.models import apply
from zofo_jax.sharding import mesh as mesh_lib

TOKENS = np.arange(3, 19, dtype=np.int32).reshape(2, 8)


@pytest.fixture(scope="module")
def model(tiny_model):
  return model_lib.load_model(str(tiny_model), quantize="int4")


@pytest.fixture(scope="module")
def base(model):
  return model_lib.load_base(model)


def floats(base):
  return jax.tree.map(
    perturbed.read, base, is_leaf=lambda x: isinstance(x, quantized.Quantized)
  )


def test_a_checkpoint_is_quantized_a_layer_at_a_time(model, base, tiny_model):
  whole = model_lib.load_base(model_lib.load_model(str(tiny_model)))
  abstract = model_lib.abstract_base(model)
  assert jax.tree.structure(base) == jax.tree.structure(abstract)
  flat = flax.traverse_util.flatten_dict(base, sep="/")
  for path, weight in flax.traverse_util.flatten_dict(whole, sep="/").items():
    if not path.endswith(("kernel", "embedding")):
      np.testing.assert_array_equal(flat[path], weight)
      continue
    axis = -2 if path.endswith("kernel") else -1
    expected = quantized.quantize(weight, "int4", axis=axis)
    np.testing.assert_array_equal(flat[path].values, expected.values)
    np.testing.assert_array_equal(flat[path].scales, expected.scales)


@pytest.mark.many_devices
def test_shards_are_parts_of_the_same_integers(model, base):
  # The feed-forward network has one block for each column along `fsdp`.
  mesh = mesh_lib.make({"pert": 1, "data": 1, "fsdp": 2, "model": 2})
  sharded = model_lib.load_base(model, mesh)
  jax.tree.map(np.testing.assert_array_equal, sharded, base)
  kernel = sharded["layers"]["mlp"]["gate"]["kernel"]
  assert kernel.values.sharding.shard_shape((2, 32, 64)) == (2, 16, 32)
  assert kernel.scales.sharding.shard_shape((2, 1, 64)) == (2, 1, 32)


def batch():
  position = np.full((2, 1, 1), 7, np.int32)
  zero = np.zeros((2, 1, 1), np.int32)
  return losses.Batch(
    tokens=TOKENS[:, None],
    mask=np.ones((2, 1, 8), bool),
    positions=position,
    target_slot=zero,
    target_token=position,
    target_option=zero,
    target_weight=np.ones((2, 1, 1), np.float32),
    label=np.zeros(2, np.int32),
    option_mask=np.ones((2, 1), bool),
    example_weight=np.ones(2, np.float32),
  )


def test_an_adapter_has_the_gradient_that_it_has_on_floats(model, base):
  loss_fn = model_lib.make_loss_fn("likelihood", model.module)
  adapter = adapters.init_lora(
    jax.random.key(0), base, rank=2, alpha=4.0, targets="query|down"
  )
  adapter = jax.tree.map(lambda leaf: leaf + 0.1, adapter)
  step = jax.jit(jax.value_and_grad(loss_fn, argnums=1))
  value, grads = step(base, adapter, batch(), None)
  expected, expected_grads = step(floats(base), adapter, batch(), None)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
    grads,
    expected_grads,
  )


def test_an_export_has_the_floats_that_are_read(model, base, tmp_path):
  model_lib.save_base(tmp_path / "out", model, base)
  again = model_lib.load_base(model_lib.load_model(str(tmp_path / "out")))
  jax.tree.map(np.testing.assert_array_equal, again, floats(base))
  merged = adapters.merge_lora(
    base,
    adapters.init_lora(jax.random.key(0), base, rank=1, alpha=1.0),
  )
  jax.tree.map(np.testing.assert_array_equal, floats(merged), floats(base))


def test_checkpoints_hold_integers(model, base, tmp_path):
  with manager.Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
    checkpoints.save(1, base, {})
    checkpoints.wait()
    again, _ = checkpoints.restore(
      jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), base
      )
    )
  assert again["embed"]["embedding"].values.dtype == jnp.int4
  jax.tree.map(np.testing.assert_array_equal, again, base)


def test_integers_cannot_be_selected(model):
  abstract = model_lib.abstract_base(model)
  base_update.check_selected("query/kernel/scales$", (0,), abstract)
  with pytest.raises(errors.UserError, match="'values' matches no weight"):
    base_update.check_selected("values", (), abstract)


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"method": "full"}, "method 'full' needs gradients of all weights"),
    (
      {"zo.optimizer": "adam"},
      "'adam' needs gradients .* 'sgd' or 'conservative'; found 'nf4'",
    ),
    ({"zo.direction": "per_example"}, "every row would have dequantized"),
    ({"model.quantize": "int2"}, "expected one of .*int4, nf4; found 'int2'"),
  ],
)
def test_what_integers_cannot_do_is_said(changes, words):
  config = tiny.base_config()
  config.model.name = "model"
  config.model.quantize = "nf4"
  validate.check(config)
  config.update_from_flattened_dict(changes)
  with pytest.raises(errors.UserError, match=words):
    validate.check(config)


def test_hidden_states_of_a_probe_read_integers(model, base):
  hidden_fn = jax.jit(apply.make_hidden_fn(model.module))
  np.testing.assert_allclose(
    hidden_fn(base, batch()),
    hidden_fn(floats(base), batch()),
    rtol=1e-3,
    atol=1e-5,
  )
