"""PEFT's folders and ours: each reads the other's, with the same logits."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.recorded import load
from tests.models.reference import make_logits as hf
from zofo_jax import adapters, errors, models
from zofo_jax.models.hf import peft as peft_folders

CASES = ["llama", "opt"]
# Length of rows in an OPT of 20 positions with 3 virtual ones: 12.


def recorded(name):
  return load(name)[:5]


@functools.partial(jax.jit, static_argnums=0)
def run(model, base, adapter, tokens, mask):
  variables = {"params": base, "adapter": adapter}
  return model.apply(variables, tokens, mask, method="logits")


def noisy(adapter, seed=0):
  draw = np.random.default_rng(seed)
  return jax.tree.map(
    lambda w: w + 0.3 * draw.normal(size=w.shape).astype(np.float32), adapter
  )


@functools.partial(jax.jit, static_argnums=(0, 1))
def make(kind, name):
  """An adapter of a recorded model, noise on every leaf."""
  model, _, base, *_ = recorded(name)
  key = jax.random.key(1)
  if kind == "lora":
    return noisy(adapters.init_lora(key, base, rank=3, alpha=6.0, dropout=0.1))
  if kind == "rslora":
    return noisy(
      adapters.init_lora(
        key,
        base,
        rank=3,
        alpha=2.0,
        targets="^layers",
        rank_stabilized=True,
      )
    )
  if kind == "prefix":
    return noisy(adapters.init_prefix(key, model, base, length=3))
  if kind == "projected":
    return adapters.init_prefix(
      key, model, base, length=3, init="random", projection=5
    )
  return noisy(adapters.init_prompt(key, base, length=3))


KINDS = ["lora", "rslora", "prefix", "projected", "prompt"]
# One matrix for query, key and value, stored as [in, out] or not; embeddings
# that are scaled.
MORE = [("gpt2", "lora"), ("falcon", "lora"), ("gemma3_text", "prompt")]
PAIRS = [(name, kind) for kind in KINDS for name in CASES] + MORE
MASKED = ("roberta", "lora")
# The other families, every night.
OTHERS = [
  pytest.param(name, kind, marks=pytest.mark.slow)
  for kind in ("lora", "prefix", "prompt")
  for name in models.FAMILIES
  if (name, kind) not in [*PAIRS, MASKED]
]


@pytest.mark.parametrize("name, kind", PAIRS)
def test_what_is_written_is_read(name, kind, tmp_path):
  model, family, *_ = recorded(name)
  adapter = make(kind, name)
  peft_folders.save(tmp_path, family, model.config, adapter)
  again = peft_folders.load(tmp_path, family, model.config)
  jax.tree.map(np.testing.assert_array_equal, again, adapters.expand(adapter))
  fields = json.loads((tmp_path / peft_folders.CONFIG).read_text())
  assert fields["task_type"] == "CAUSAL_LM"


def test_several_kinds_are_a_folder_each(tmp_path):
  model, family, *_ = recorded("llama")
  kinds = ("lora", "prefix", "prompt")
  adapter = adapters.join(*(make(kind, "llama") for kind in kinds))
  peft_folders.save(tmp_path, family, model.config, adapter)
  assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kinds)
  again = peft_folders.load(tmp_path, family, model.config)
  jax.tree.map(np.testing.assert_array_equal, again, adapter)


# Against the library itself.


def backbone(name):
  """The recorded model in transformers."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  fields, tensors, *_ = hf.load(name)
  config = transformers.AutoConfig.for_model(**fields)
  config._attn_implementation = "eager"
  auto = transformers.AutoModelForCausalLM
  if name in hf.MASKED:
    auto = transformers.AutoModelForMaskedLM
  model = auto.from_config(config).float().eval()
  # In files, GPT-NeoX's head has another name.
  state = {
    name.replace("embed_out", "lm_head"): torch.tensor(tensor)
    for name, tensor in tensors.items()
  }
  missing, unexpected = model.load_state_dict(state, strict=False)
  tied = ("lm_head.weight", "decoder.weight", "decoder.bias")
  assert all(name.endswith(tied) for name in missing) and not unexpected
  return model


def logits_there(model, name, kind, tokens, mask):
  """Their logits; OPT counts positions itself, Llama by what it is given."""
  import torch

  if name == "phi3" and len(tokens) > 1:
    # Transformers stretches the angles of all rows by the longest.
    rows = [slice(row, row + 1) for row in range(len(tokens))]
    each = [logits_there(model, name, kind, tokens[r], mask[r]) for r in rows]
    return torch.cat(each)
  inputs = {"input_ids": tokens.astype(np.int64), "attention_mask": mask * 1}
  if not name.startswith(("opt", *hf.ROBERTAS)) and kind != "prompt":
    inputs["position_ids"] = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
  out = model(**{k: torch.tensor(v) for k, v in inputs.items()})
  return out.logits[:, -tokens.shape[1] :]


def rows(name, kind):
  """Rows without padding, padded left and padded right."""
  *_, tokens, mask = recorded(name)
  windowed = recorded(name)[0].config.windows is not None
  virtual = {"prefix": windowed, "prompt": not name.startswith("opt")}
  if virtual.get(kind):
    # There padding stands between a Llama's prompt and its text, and counts;
    # so it does between a prefix and the end of a window.
    return tokens[[0, 2]], mask[[0, 2]]
  return tokens, mask


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, kind", [*PAIRS, MASKED, *OTHERS])
def test_ours_acts_there_as_here(name, kind, tmp_path):
  peft = pytest.importorskip("peft")
  reference = backbone(name)
  model, family, base, *_ = recorded(name)
  adapter = make(kind, name)
  tokens, mask = rows(name, kind)
  peft_folders.save(tmp_path, family, model.config, adapter)
  loaded = peft.PeftModel.from_pretrained(reference, tmp_path).eval()
  expected = logits_there(loaded, name, kind, tokens, mask).detach().numpy()
  actual = run(model, base, adapter, tokens, mask)
  np.testing.assert_allclose(actual[mask], expected[mask], atol=1e-4)
  plain = run(model, base, {}, tokens, mask)
  assert np.abs(actual - plain)[mask].max() > 1e-2


def made_there(kind, name):
  """A model of PEFT with random adapters, on the recorded backbone."""
  import peft
  import torch

  lora = dict(
    r=3,
    lora_alpha=5,
    lora_dropout=0.25,
    use_rslora=kind == "rslora",
    target_modules={
      "opt": ["k_proj", "v_proj", "fc2"],
      "gpt2": ["c_attn", "c_proj"],
      "gpt_neox": ["query_key_value", "dense_4h_to_h"],
      "falcon": ["query_key_value", "dense_4h_to_h"],
      "phi3": ["qkv_proj", "gate_up_proj"],
      "starcoder2": ["k_proj", "v_proj", "c_proj"],
      **{key: ["key", "value", "intermediate.dense"] for key in hf.MASKED},
    }.get(name, ["k_proj", "v_proj", "down_proj"]),
  )
  virtual = dict(num_virtual_tokens=3)
  if name == "falcon" and kind == "prefix":
    # It does not find out that Falcon has one kv head, of width 4.
    virtual |= dict(num_attention_heads=1, token_dim=4)
  config = {
    "lora": lambda: peft.LoraConfig(**lora),
    "rslora": lambda: peft.LoraConfig(**lora),
    "prefix": lambda: peft.PrefixTuningConfig(**virtual),
    "projected": lambda: peft.PrefixTuningConfig(
      **virtual, prefix_projection=True, encoder_hidden_size=7
    ),
    "prompt": lambda: peft.PromptTuningConfig(**virtual),
  }[kind]()
  if name not in hf.MASKED:
    config.task_type = "CAUSAL_LM"
  elif kind != "lora":
    # The one by which PEFT puts virtual tokens in front of a masked model's.
    config.task_type = "FEATURE_EXTRACTION"
  torch.manual_seed(0)
  model = peft.get_peft_model(backbone(name), config)
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.requires_grad and "lora" in kind:
        parameter.normal_(0.0, 0.5)
  return model.eval()


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, kind", [*PAIRS, MASKED, *OTHERS])
def test_theirs_acts_here_as_there(name, kind, tmp_path):
  pytest.importorskip("peft")
  reference = made_there(kind, name)
  reference.save_pretrained(tmp_path)
  model, family, base, *_ = recorded(name)
  adapter = peft_folders.load(tmp_path, family, model.config)
  tokens, mask = rows(name, kind)
  expected = logits_there(reference, name, kind, tokens, mask).detach().numpy()
  actual = run(model, base, adapter, tokens, mask)
  np.testing.assert_allclose(actual[mask], expected[mask], atol=1e-4)
  plain = run(model, base, {}, tokens, mask)
  assert np.abs(actual - plain)[mask].max() > 1e-2
  if "lora" in kind:
    for node in adapters.parts(adapter).values():
      assert node.scale == pytest.approx(5 / (3**0.5 if kind[0] == "r" else 3))
      assert node.dropout == 0.25


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
# Every kind and both models; the other pairs read and act the same.
@pytest.mark.parametrize(
  "name, kind",
  [
    *(("opt", "lora"), ("llama", "prefix"), ("opt", "prompt")),
    *(
      pytest.param(*pair, marks=pytest.mark.slow)
      for pair in (("llama", "lora"), ("opt", "prefix"), ("llama", "prompt"))
    ),
    *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (*MORE, MASKED)),
    *OTHERS,
  ],
)
def test_gradients_are_theirs(name, kind, tmp_path):
  pytest.importorskip("peft")
  import torch

  reference = made_there(kind, name)
  reference.save_pretrained(tmp_path)
  model, family, base, *_ = recorded(name)
  adapter = peft_folders.load(tmp_path, family, model.config)
  tokens, mask = rows(name, kind)
  weight = np.random.default_rng(0).normal(size=(*tokens.shape, 96)) / 100
  weight = (weight * mask[..., None]).astype(np.float32)
  out = logits_there(reference, name, kind, tokens, mask)
  (out * torch.tensor(weight)).sum().backward()

  def loss(adapter):
    return jnp.sum(run(model, base, adapter, tokens, mask) * weight)

  gradient = jax.jit(jax.grad(loss))(adapter)
  # Gradients take the way of the weights: set there, saved, and read here.
  with torch.no_grad():
    for parameter in reference.parameters():
      if parameter.requires_grad:
        parameter.copy_(parameter.grad)
  reference.save_pretrained(tmp_path / "gradient")
  expected = peft_folders.load(tmp_path / "gradient", family, model.config)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
    gradient,
    expected,
  )


# Mistakes.


def test_mistakes_are_named(tmp_path):
  model, family, *_ = recorded("llama")
  config = model.config
  load = lambda: peft_folders.load(tmp_path, family, config)
  with pytest.raises(errors.UserError, match=r"no adapter_config.json"):
    load()
  with pytest.raises(errors.UserError, match="no adapter to write"):
    peft_folders.save(tmp_path, family, config, {})
  peft_folders.save(tmp_path, family, config, make("lora", "llama"))
  path = tmp_path / peft_folders.CONFIG
  fields = json.loads(path.read_text())

  def broken(words, **changes):
    path.write_text(json.dumps({**fields, **changes}))
    with pytest.raises(errors.UserError, match=words):
      load()

  broken("peft_type 'LOHA'", peft_type="LOHA")
  broken("use_dora = True", use_dora=True)
  broken("bias = 'all'", bias="all")
  broken("rank_pattern", rank_pattern={"q_proj": 2})
  broken("no 'r'", r=None)
  broken(r"lora_A of layers/attention/.*\(3, 16\); expected \(4, 16\)", r=4)
  broken("prompt_embeddings", peft_type="PROMPT_TUNING", num_virtual_tokens=3)
  path.write_text("{")
  with pytest.raises(errors.UserError, match="not a JSON file"):
    load()
  path.write_text(json.dumps(fields))
  other, opt, *_ = recorded("opt")
  with pytest.raises(errors.UserError, match="no place for"):
    peft_folders.load(tmp_path, opt, other.config)
  (tmp_path / peft_folders.WEIGHTS).unlink()
  with pytest.raises(errors.UserError, match=r"no adapter_model.safetensors"):
    load()
  two = make("lora", "llama")
  node = two["layers"]["attention"]["query"]
  node["lora"] = adapters.Lora(node["lora"].a, node["lora"].b, scale=1.0)
  with pytest.raises(errors.UserError, match="differ in"):
    peft_folders.save(tmp_path, family, config, two)
