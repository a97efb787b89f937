"""config.json: fields that are read, harmless, or refused by name."""

import json
import random

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from tests.models.hf import mutations
from tests.models.reference import make_logits as hf
from zofo_jax import errors, models
from zofo_jax.models.hf import config as config_lib
from zofo_jax.models.hf import weights

ROPES = [
  {"type": "linear", "factor": 2.0},
  {"rope_type": "dynamic", "factor": 4.0},
  {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
  {"rope_type": "yarn", "factor": 2.0, "attention_factor": 0.5},
  {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.5},
  {"rope_type": "linear", "factor": 2.0, "new": 1},
  {"rope_type": "linear", "factor": "2"},
  {"rope_type": "linear", "factor": 0},
  {"rope_type": "yarn", "factor": 2.0, "beta_fast": 0},
  {"rope_type": "linear"},
  {"rope_type": ["linear"]},
  {"type": "mrope", "mrope_section": [1, 1]},
  {"full_attention": {"rope_type": "default"}},
]
CHOICES: dict[str, list] = {
  "rope_scaling": ROPES,
  "rope_parameters": ROPES,
  "rope_theta": [100.0, 0],
  "hidden_act": ["gelu", ["silu"]],
  "model_type": ["llama", "qwen3", ["opt"]],
  "num_hidden_layers": [10**12, 1],
  "sliding_window": [4, None],
  "layer_types": [["full_attention"] * 2, ["chunked_attention"] * 2],
}
CHOICES |= {
  name: [True, False, None]
  for name in """
  _remove_final_layer_norm attention_bias attention_dropout dtype eos_token_id
  head_dim is_causal is_decoder learned_embeddings logit_scale mlp_bias
  num_labels original_max_position_embeddings pad_token_id
  partial_rotary_factor per_layer_config pretraining_tp quantization_config
  text_config tie_word_embeddings use_cache use_sliding_window
  """.split()
}
NAMES = ["llama", "qwen2_window", "opt"]
MORE = ["gpt2", "gpt_neox", "smollm3", "granite", "phi3", "gemma2", "falcon"]
MORE += ["gemma3_text"]


def refusal(fields):
  with pytest.raises(errors.UserError) as caught:
    models.from_hf(fields)
  assert "\n" not in str(caught.value)
  return str(caught.value)


@pytest.mark.parametrize("name", NAMES + MORE)
def test_fields_that_are_not_known_are_refused_by_name(name):
  fields, *_ = hf.load(name)
  plain = models.from_hf(fields)[0].config
  for field in ("logit_scale", "quantization_config", "per_layer_config"):
    for value in (0.5, "x", {"a": 1}, [0], True, 0):
      assert f"has {field} = " in refusal({**fields, field: value})
    for value in (None, False, {}, [], ""):
      assert models.from_hf({**fields, field: value})[0].config == plain
  for field in config_lib.HARMLESS - {"model_type"}:
    assert models.from_hf({**fields, field: 0.7})[0].config == plain
  assert "is_causal = False" in refusal({**fields, "is_causal": False})
  assert "is_causal = None" in refusal({**fields, "is_causal": None})


@pytest.mark.parametrize(
  "fields, words",
  [
    ({"vocab_size": "96"}, "vocab_size = '96'; expected an integer"),
    ({"num_hidden_layers": 10**12}, "num_hidden_layers = 1000000000000"),
    ({"tie_word_embeddings": "false"}, "expected true or false"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps = '1e-5'; expected a number"),
    ({"hidden_act": ["silu"]}, "hidden_act"),
    ({"model_type": ["llama"]}, "model_type"),
    ({"sliding_window": 8}, "sliding_window = 8, which is not supported"),
    ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, "at least 1"),
    ({"rope_scaling": {"type": "mrope", "x": 1}}, "x = 1"),
    (
      {"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 0}},
      "positive numbers",
    ),
    (
      {"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2}},
      "expect at least 4",
    ),
    ({"rope_scaling": {"factor": 2, "rope_type": "lin"}}, "type 'lin'"),
  ],
)
def test_values_are_checked(fields, words):
  plain, *_ = hf.load("llama")
  assert words in refusal({**plain, **fields})


def test_a_file_is_one_object(tmp_path):
  path = tmp_path / "config.json"
  path.write_text('\ufeff{"a": 1}', "utf-8")
  assert config_lib.read(path) == {"a": 1}
  for text in ("[]", "3", "{", "[" * 10**5, "\x00"):
    path.write_text(text)
    with pytest.raises(errors.UserError, match=r"config\.json"):
      config_lib.read(path)


@pytest.mark.parametrize(
  "name", [*NAMES, *MORE, "llama_yarn", "mistral", *hf.MASKED]
)
def test_mutations_are_read_or_refused(name):
  fields, *_ = hf.load(name)
  draw, refused = random.Random(0), 0
  for _ in range(1000):
    mutated = mutations.mutate(draw, fields, CHOICES)
    try:
      models.from_hf(mutated)
    except errors.UserError as error:
      assert "\n" not in str(error)
      refused += 1
  assert 300 < refused < 900


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
  "name",
  NAMES
  + [
    pytest.param(name, marks=pytest.mark.slow) for name in (*MORE, *hf.MASKED)
  ],
)
def test_what_is_read_gives_the_logits_of_transformers(name, tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  fields, tensors, tokens, *_ = hf.load(name)
  tokens = tokens[:1]
  safetensors.numpy.save_file(
    tensors, tmp_path / "model.safetensors", metadata={"format": "pt"}
  )
  auto = transformers.AutoModelForCausalLM
  if name in hf.MASKED:
    auto = transformers.AutoModelForMaskedLM
  draw, ours, compared = random.Random(1), {}, 0
  for _ in range(40):
    text = json.dumps(mutations.mutate(draw, fields, CHOICES))
    (tmp_path / "config.json").write_text(text)
    try:
      model, family = models.from_hf(json.loads(text))
      base = weights.load(tmp_path, family, model.config, jnp.float32)
    except errors.UserError:
      continue
    if model.config not in ours:
      mask = np.ones(tokens.shape, bool)
      variables = {"params": base}
      ours[model.config] = model.apply(variables, tokens, mask, method="logits")
    try:
      theirs = auto.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
      ).eval()
      with torch.no_grad():
        rows = torch.tensor(tokens, dtype=torch.int64)
        expected = theirs(rows, return_dict=True).logits
    except Exception:  # A harmless field of a type that is checked there.
      continue
    actual = ours[model.config]
    np.testing.assert_allclose(actual, expected, atol=2e-4, err_msg=text)
    compared += 1
  assert compared > 5
