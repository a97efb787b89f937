"""The step of every family of models is lowered for TPUs and GPUs as well."""

import jax
import numpy as np
import pytest
from jax import export

import zofo_jax as zofo
from tests import tiny
from zofo_jax import models
from zofo_jax.models.hf import published
from zofo_jax.plan import estimate, planner
from zofo_jax.sharding import mesh as mesh_lib

SHAPES = {
  "opt": {"ffn_dim": 64},
  "llama": {"intermediate_size": 64},
  "mistral": {"intermediate_size": 64, "num_key_value_heads": 2},
  "qwen2": {"intermediate_size": 64, "num_key_value_heads": 2},
  "gemma3_text": {
    "intermediate_size": 64,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 8,
    "sliding_window_pattern": 2,
    "final_logit_softcapping": 30.0,
  },
}


def test_every_model_is_here():
  here = {models.FAMILIES[name].Model for name in SHAPES}
  assert here == {family.Model for family in models.FAMILIES.values()}


@pytest.mark.parametrize(
  "name",
  [
    "gemma3_text",
    # Parts of it, or with biases.
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in ("opt", "llama", "mistral", "qwen2")
    ),
  ],
)
def test_the_step_exports(name, monkeypatch):
  hf_config = {
    "model_type": name,
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    **SHAPES[name],
  }
  monkeypatch.setitem(published.CONFIGS, "tiny", hf_config)
  config = tiny.base_config()
  config.model.name = "tiny"
  config.model.dtype = "bfloat16"
  config.zo.select = tiny.MOVED
  mesh = mesh_lib.make(config.mesh)
  run = planner.make_run(config, mesh)
  state = run.abstract_state()
  batch = estimate.abstract_batch(run)
  step = jax.jit(run.algorithm.step)
  # Typed keys are no arrays to a program that is written down.
  whole = lambda tree: jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree
  )
  exported = export.export(step, platforms=("tpu", "cuda", "cpu"))(
    whole(state), whole(batch), zofo.BilevelHParams(1e-3, np.float32(1.0))
  )
  assert exported.platforms == ("tpu", "cuda", "cpu")
  assert len(exported.out_avals) == len(
    jax.tree.leaves(jax.eval_shape(step, state, batch, zofo.BilevelHParams()))
  )
