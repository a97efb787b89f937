"""Configurations of the Llama family, as Hugging Face writes them."""

import pytest

from tests.models.reference import make_logits as hf
from zofo_jax import errors, models
from zofo_jax.models import llama


def test_old_and_new_forms_of_rope_read_the_same():
  new = hf.CASES["llama_llama3"]
  old = dict(new)
  scaling = dict(old.pop("rope_parameters"))
  old["rope_theta"] = scaling.pop("rope_theta")
  scaling["type"] = scaling.pop("rope_type")
  old["rope_scaling"] = scaling
  assert llama.config_from_hf(old) == llama.config_from_hf(new)
  assert llama.config_from_hf(old).rope.theta == 100.0


def llama_config(**fields):
  return {**hf.CASES["llama"], **fields}


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"model_type": "lama"}, "model_type 'lama'.*mean 'llama'"),
    ({"model_type": None}, "model_type 'None'"),
    ({"hidden_act": "gelu_tanh"}, "hidden_act 'gelu_tanh'.*mean"),
    ({"hidden_size": None}, "no field 'hidden_size'"),
    ({"num_key_value_heads": 3}, "num_key_value_heads = 3"),
    ({"rope_scaling": {"type": "longrope"}}, "rope_scaling.*'longrope'"),
    ({"rope_scaling": {"type": "yarn"}}, "'yarn' without 'factor'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
  ],
)
def test_what_is_not_supported_is_named(fields, words):
  with pytest.raises(errors.UserError, match=words):
    models.from_hf(llama_config(**fields))
