"""adapter_config.json: what PEFT can write is read as PEFT does, or refused."""

import functools
import json
import random

import jax
import numpy as np
import pytest

from tests.models import recorded
from tests.models.hf import mutations, peft_test
from zofo_jax import adapters, errors
from zofo_jax.models.hf import peft as peft_folders
from zofo_jax.models.hf import peft_config, tensor_files

CHOICES = {
  "init_lora_weights": [
    *(True, False, "gaussian", "eva", "orthogonal", "pissa", "pissa_niter_4"),
    *("olora", "corda", "loftq", "lora_ga"),
  ],
  "target_modules": [
    *(["q_proj", "v_proj"], ["q_proj"], "all-linear", r".*\.(q|v)_proj", None),
    *(["self_attn.q_proj", "v_proj"], ["lm_head", "q_proj", "v_proj"], "("),
  ],
  "exclude_modules": [["v_proj"], r".*\.1\..*", ["k_proj"], "x"],
  "layers_to_transform": [0, 1, [0], [1], [0, 1], [5], []],
  "layers_pattern": ["layers", ["layers"], ["h", "layers"], "layers|h", "("],
  "rank_pattern": [
    *({"q_proj": 2}, {"v_proj": 2}, {r"layers\.0.*q_proj": 3}, {"(": 2}),
    *({"q_proj": "3"}, {"q_proj": 10**9}, {"^model.*": 3}),
  ],
  "alpha_pattern": [
    *({"q_proj": 2}, {"v_proj": 32.5}, {r"layers\.0\.self_attn.q_proj": 1}),
    *({".*proj": 7}, {"x": 1}, {"q_proj": 0}),
  ],
  "bias": ["none", "all", "lora_only"],
  "use_rslora": [True],
  "lora_alpha": [1, 2.5, 16],
  "r": [2, 3, 4],
  "task_type": ["CAUSAL_LM", "SEQ_CLS", None],
  "modules_to_save": [["lm_head"], []],
}
FIELDS = {
  "peft_type": "LORA",
  "task_type": "CAUSAL_LM",
  "r": 3,
  "lora_alpha": 5,
  "target_modules": ["q_proj", "v_proj"],
  "init_lora_weights": True,
}
# A LoRA of some layers with several ranks and scales, and one of all layers.
PATTERNS = {
  "layers_to_transform": [1],
  "rank_pattern": {"v_proj": 2},
  "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 9},
}
MORE = {"plain": {}, "patterns": PATTERNS}


@pytest.fixture(params=MORE)
def folder(request, tmp_path):
  """A folder for the recorded Llama, written by hand."""
  draw, tensors = np.random.default_rng(0), {}
  for layer in (1,) if request.param == "patterns" else (0, 1):
    for name, width in (("q_proj", 16), ("v_proj", 8)):
      rank = 2 if (request.param, name) == ("patterns", "v_proj") else 3
      path = f"base_model.model.model.layers.{layer}.self_attn.{name}"
      for which, shape in (("A", (rank, 16)), ("B", (width, rank))):
        value = draw.normal(size=shape).astype(np.float32)
        tensors[f"{path}.lora_{which}.weight"] = value
  tensor_files.write_safetensors(tmp_path / peft_folders.WEIGHTS, tensors)
  write(tmp_path, {**FIELDS, **MORE[request.param]})
  tmp_path.joinpath("kind").write_text(request.param)
  return tmp_path


def write(folder, fields):
  (folder / peft_folders.CONFIG).write_text(json.dumps(fields))


def read_fields(folder):
  return json.loads((folder / peft_folders.CONFIG).read_text())


def load(folder, name="llama"):
  model, family, *_ = recorded.load(name)
  return peft_folders.load(folder, family, model.config)


def refusal(folder, **fields):
  write(folder, {**read_fields(folder), **fields})
  with pytest.raises(errors.UserError) as caught:
    load(folder)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_patterns_become_one_rank_and_one_scale(folder):
  nodes = adapters.parts(load(folder))
  tensors = tensor_files.open_safetensors(folder / peft_folders.WEIGHTS)
  patterns = (folder / "kind").read_text() == "patterns"
  for path, node in nodes.items():
    name = {"query": "q_proj", "value": "v_proj"}[path.split("/")[-2]]
    assert node.a.shape[-1] == 3
    for layer in (0, 1):
      delta = node.scale * node.a[layer] @ node.b[layer]
      full = f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_"
      if patterns and layer == 0:
        assert not node.a[layer].any() and not node.b[layer].any()
        continue
      a, b = (tensors[f"{full}{which}.weight"].read() for which in "AB")
      alpha = 9 if patterns and name == "q_proj" else 5
      expected = alpha / len(a) * (b @ a).T
      np.testing.assert_allclose(delta, expected, rtol=1e-5, atol=1e-5)
  assert len({node.scale for node in nodes.values()}) == 1


def test_what_was_read_with_patterns_is_written_without(folder, tmp_path):
  model, family, *_ = recorded.load("llama")
  adapter = load(folder)
  peft_folders.save(tmp_path / "out", family, model.config, adapter)
  jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "out"), adapter)
  assert read_fields(tmp_path / "out")["rank_pattern"] == {}


@pytest.mark.parametrize(
  "init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"]
)
def test_initialisations_that_change_the_base_are_refused(folder, init):
  text = refusal(folder, init_lora_weights=init)
  assert f"init_lora_weights = '{init}'" in text and "plain LoRA" in text


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva"])
def test_other_initialisations_do_not_matter(folder, init):
  expected = load(folder)
  write(folder, {**read_fields(folder), "init_lora_weights": init})
  jax.tree.map(np.testing.assert_array_equal, load(folder), expected)


@pytest.mark.parametrize(
  "name, value",
  [
    ("alora_invocation_tokens", [1]),
    ("bias", "lora_only"),
    ("fan_in_fan_out", True),
    ("init_lora_weights", "mica"),
    ("kasa_config", {"beta": 0.1}),
    ("kasa_config", {}),
    ("layer_replication", [[0, 2]]),
    ("lora_bias", True),
    ("megatron_config", {"a": 1}),
    ("modules_to_save", ["lm_head"]),
    ("target_parameters", ["weight"]),
    ("task_type", "SEQ_CLS"),
    ("trainable_token_indices", [1]),
    ("use_dora", True),
    ("use_qalora", True),
    ("a_field_of_next_year", 0),
  ],
)
def test_features_that_are_not_supported_are_refused_by_name(
  folder, name, value
):
  assert f"has {name} = " in refusal(folder, **{name: value})


@pytest.mark.parametrize("name", ["use_dora", "kasa_config", "new_option"])
@pytest.mark.parametrize("value", [None, False, []])
def test_fields_that_are_unset_do_not_matter(folder, name, value):
  write(folder, {**read_fields(folder), name: value})
  load(folder)


@pytest.mark.parametrize(
  "fields, words",
  [
    ({"target_modules": ["q_proj"]}, "does not target model.layers"),
    ({"target_modules": "all-linear"}, "which has no tensor"),
    ({"target_modules": ["x"]}, "select no module"),
    ({"target_modules": ["q_proj", "lm_head"]}, "targets lm_head"),
    ({"target_modules": "("}, "no regular expression"),
    ({"layers_to_transform": 0}, "which has"),
    ({"layers_pattern": "h", "layers_to_transform": 1}, "select no module"),
    ({"rank_pattern": {"q_proj": 2}}, r"expected (2, 16), by r and rank"),
    ({"alpha_pattern": {"q_proj": "2"}}, "expected a number"),
    ({"alpha_pattern": {"q_proj": 0}}, "has lora_alpha = 0 for model.layers"),
    ({"lora_alpha": 0}, "has lora_alpha = 0 for model.layers"),
    ({"lora_alpha": None}, "has no 'lora_alpha'"),
    ({"r": 0}, "has r = 0; expected"),
  ],
)
@pytest.mark.parametrize("folder", ["plain"], indirect=True)
def test_config_and_tensors_must_agree(folder, fields, words):
  assert words in refusal(folder, **fields)


def test_mutations_are_read_or_refused(folder):
  plain = read_fields(folder)
  draw, refused = random.Random(0), 0
  for _ in range(500):
    write(folder, mutations.mutate(draw, plain, CHOICES))
    try:
      load(folder)
    except errors.UserError as error:
      assert "\n" not in str(error)
      refused += 1
  assert 150 < refused < 450


# Against the library itself.


def test_the_fields_of_peft_that_are_read_exist_there():
  peft = pytest.importorskip("peft")
  fields = set(peft.LoraConfig().to_dict())
  assert set(peft_config._READ["LORA"].split()) <= fields
  assert set(peft_config._VALUES) <= fields
  for name, value in peft.LoraConfig().to_dict().items():
    peft_config.check("", "LORA", {name: value})  # Every default is harmless.


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MORE)
@pytest.mark.parametrize(
  "name", ["llama", pytest.param("opt", marks=pytest.mark.slow)]
)
def test_what_is_read_gives_the_logits_of_peft(name, kind, tmp_path):
  peft = pytest.importorskip("peft")
  import torch

  model, _, base, tokens, *_ = recorded.load(name)
  tokens = tokens[:1]
  mask = np.ones(tokens.shape, bool)
  run = jax.jit(functools.partial(model.apply, method="logits"))
  theirs = peft_test.backbone(name)
  fields = {**FIELDS, **MORE[kind]}
  made = peft.get_peft_model(theirs, peft.LoraConfig(**fields))
  with torch.no_grad():
    for parameter in made.parameters():
      if parameter.requires_grad:
        parameter.normal_(0.0, 0.5)
  made.save_pretrained(tmp_path)
  theirs = made.unload()
  plain = read_fields(tmp_path)
  draw, compared = random.Random(0), 0
  for i in range(40):
    mutated = mutations.mutate(draw, plain, CHOICES) if i else plain
    write(tmp_path, mutated)
    try:
      adapter = load(tmp_path, name)
    except errors.UserError:
      assert i
      continue
    try:
      loaded = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    except Exception:  # A harmless field of a type that is checked there.
      theirs = peft_test.backbone(name)
      continue
    with torch.no_grad():
      expected = loaded(torch.tensor(tokens, dtype=torch.int64)).logits
    theirs = loaded.unload()
    merged = adapters.merge_lora(base, adapter)
    actual = run({"params": merged}, tokens, mask)
    np.testing.assert_allclose(
      actual, expected, atol=3e-4, err_msg=str(mutated)
    )
    compared += 1
  assert compared > 5
