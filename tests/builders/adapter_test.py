"""Fresh adapters of every kind, from shapes alone."""

import jax
import pytest

from tests import tiny
from zofo_jax import adapters
from zofo_jax.builders import adapter as adapter_lib
from zofo_jax.builders import model as model_lib
from zofo_jax.sharding import mesh as mesh_lib


@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt", "lora+prompt"])
def test_a_kind_is_made_as_the_config_was(kind):
  config = tiny.base_config()
  config.adapter.kind = kind
  config.prompt.init, config.prompt.text = "text", "needs no tokenizer here"
  model = model_lib.published_model(
    "facebook/opt-125m",
    dtype="float32",
    remat=False,
    mesh=mesh_lib.abstract(config.mesh, 1),
  )
  init_fn = adapter_lib.make_init_fn(config, model)
  # What is changed later changes nothing.
  config.lora.rank, config.prompt.length, config.prefix.length = 1, 1, 1
  adapter = jax.eval_shape(
    lambda base: init_fn(jax.random.key(0), base),
    model_lib.abstract_base(model),
  )
  shapes = [leaf.shape for leaf in jax.tree.leaves(adapter)]
  assert any(8 in shape for shape in shapes) == ("lora" in kind)
  assert adapters.prompt_length(adapter) == 10 * ("prompt" in kind)
  assert adapters.prefix_length(adapter) == 5 * ("prefix" in kind)
