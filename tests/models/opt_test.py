"""Configurations of OPT, as Hugging Face writes them."""

import pytest

from tests.models.reference import make_logits as hf
from zofo_jax import errors
from zofo_jax.models import opt


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"activation_function": "rellu"}, "'rellu'.*mean 'relu'"),
    ({"ffn_dim": None}, "no field 'ffn_dim'"),
    ({"num_attention_heads": 3}, "num_attention_heads = 3"),
  ],
)
def test_what_is_not_supported_is_named(fields, words):
  with pytest.raises(errors.UserError, match=words):
    opt.config_from_hf({**hf.CASES["opt"], **fields})
