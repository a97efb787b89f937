"""Checkpoint folders in every format, and everything that can be wrong."""

import json
import types

import flax.serialization
import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from tests.models.reference import make_logits as hf
from zofo_jax import errors, models
from zofo_jax.models import llama, opt
from zofo_jax.models.hf import tensor_files, weights

LLAMA = {
  "model_type": "llama",
  "vocab_size": 17,
  "hidden_size": 8,
  "intermediate_size": 12,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 16,
  "rms_norm_eps": 1e-5,
  "hidden_act": "silu",
  "rope_theta": 10000.0,
  "tie_word_embeddings": True,
}
OPT = {
  "model_type": "opt",
  "vocab_size": 17,
  "hidden_size": 8,
  "word_embed_proj_dim": 6,
  "ffn_dim": 12,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "max_position_embeddings": 16,
  "do_layer_norm_before": True,
}
CASES = {
  "llama": (llama, LLAMA),
  "untied": (llama, {**LLAMA, "tie_word_embeddings": False}),
  "qwen2": (llama, {**LLAMA, "model_type": "qwen2"}),
  "opt": (opt, OPT),
}

MORE = {
  name: (models.FAMILIES[hf.CASES[name]["model_type"]], hf.CASES[name])
  for name in ("gpt2", "gpt_neox", "qwen3", "olmo2", "smollm3", "granite")
  + ("phi3", "gemma", "gemma2", "gemma3_text", "starcoder2", "falcon")
  + ("bert", "roberta", "xlm-roberta")
}


def random_base(family, config, dtype=np.float32):
  rng = np.random.default_rng(0)
  flat = {
    path: rng.normal(size=shape).astype(dtype)
    for path, shape in weights.shapes(family, config).items()
  }
  return flax.traverse_util.unflatten_dict(flat, sep="/")


def hf_tensors(family, config, base):
  """The checkpoint written out by hand, without `weights.save`."""
  flat = flax.traverse_util.flatten_dict(base, sep="/")
  tensors = {}
  for path, (name, transpose) in family.hf_parameters(config).items():
    leaf = flat[path]
    layers = enumerate(leaf) if "{layer}" in name else [(None, leaf)]
    for i, value in layers:
      value = value.T if transpose else value
      tensors[name.replace("{layer}", str(i))] = np.ascontiguousarray(value)
  return tensors


def assert_same(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.fixture(params=CASES)
def case(request):
  family, hf_config = CASES[request.param]
  config = family.config_from_hf(hf_config)
  return family, config, random_base(family, config)


@pytest.fixture
def checkpoint(tmp_path):
  """A small Llama whose tensors a test may spoil and write."""
  config = llama.config_from_hf(LLAMA)
  base = random_base(llama, config)
  return types.SimpleNamespace(
    folder=tmp_path,
    base=base,
    tensors=hf_tensors(llama, config, base),
    write=lambda tensors, name="model.safetensors": safetensors.numpy.save_file(
      tensors, tmp_path / name
    ),
    load=lambda dtype=np.float32: weights.load(
      tmp_path, llama, config, dtype, pickle=True
    ),
  )


def error_of(call):
  with pytest.raises(errors.UserError) as caught:
    call()
  text = str(caught.value)
  assert "\n" not in text
  return text


def test_safetensors(case, tmp_path):
  family, config, base = case
  tensors = hf_tensors(family, config, base)
  safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
  assert_same(weights.load(tmp_path, family, config, np.float32), base)


@pytest.mark.parametrize("shard_bytes", [10**9, 1000])
def test_save_load(case, tmp_path, shard_bytes):
  family, config, base = case
  # Leaves may be jax arrays, and a folder may be written to again.
  on_device = jax.tree.map(jax.numpy.asarray, base)
  weights.save(tmp_path, family, config, base, 10**9 + 1000 - shard_bytes)
  weights.save(tmp_path, family, config, on_device, shard_bytes)
  single = (tmp_path / "model.safetensors").exists()
  index = (tmp_path / "model.safetensors.index.json").exists()
  assert (single, index) == (shard_bytes > 1000, shard_bytes == 1000)
  if index:
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    content = json.loads(
      (tmp_path / "model.safetensors.index.json").read_text()
    )
    tensors = hf_tensors(family, config, base)
    assert set(content["weight_map"]) == set(tensors)
    size = sum(t.nbytes for t in tensors.values())
    assert content["metadata"]["total_size"] == size
  assert_same(weights.load(tmp_path, family, config, np.float32), base)


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("wanted", [ml_dtypes.bfloat16, np.float32])
def test_dtypes(checkpoint, stored, wanted):
  tensors = {k: v.astype(stored) for k, v in checkpoint.tensors.items()}
  checkpoint.write(tensors)
  expected = jax.tree.map(
    lambda x: x.astype(stored).astype(wanted), checkpoint.base
  )
  actual = checkpoint.load(wanted)
  assert {x.dtype for x in jax.tree.leaves(actual)} == {np.dtype(wanted)}
  assert_same(actual, expected)


def test_bfloat16_saves(tmp_path):
  config = llama.config_from_hf(LLAMA)
  base = random_base(llama, config, ml_dtypes.bfloat16)
  weights.save(tmp_path, llama, config, base)
  assert_same(weights.load(tmp_path, llama, config, ml_dtypes.bfloat16), base)


def test_a_file_may_be_read_by_whom_any_file_may(tmp_path):
  written, other = tmp_path / "a.safetensors", tmp_path / "other"
  tensor_files.write_safetensors(written, {"x": np.zeros(3)})
  other.touch()
  assert written.stat().st_mode == other.stat().st_mode
  assert set(tmp_path.iterdir()) == {written, other}


@pytest.mark.parametrize("extra_root", [(), ("params",)])
@pytest.mark.parametrize("sharded", [False, True])
def test_msgpack(case, tmp_path, extra_root, sharded):
  family, config, base = case
  flat = {}
  for name, value in hf_tensors(family, config, base).items():
    *module, leaf = name.split(".")
    if leaf == "weight":
      if "embed" in module[-1]:
        leaf = "embedding"
      elif value.ndim == 1:
        # Flax's Llama called it weight, its OPT scale.
        leaf = "weight" if family is llama else "scale"
      else:
        leaf, value = "kernel", value.T
    flat[(*extra_root, *module, leaf)] = value
  items = list(flat.items())
  parts = [items[::2], items[1::2]] if sharded else [items]
  weight_map = {}
  for i, part in enumerate(parts):
    name = f"flax_model-{i}.msgpack" if sharded else "flax_model.msgpack"
    tree = flax.traverse_util.unflatten_dict(dict(part))
    data = flax.serialization.msgpack_serialize(tree)
    (tmp_path / name).write_bytes(data)
    weight_map.update({"/".join(path): name for path, _ in part})
  if sharded:
    index = tmp_path / "flax_model.msgpack.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
  assert_same(weights.load(tmp_path, family, config, np.float32), base)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch_bin(checkpoint, legacy, dtype):
  torch = pytest.importorskip("torch")
  tensors = {
    name: torch.tensor(value).to(getattr(torch, dtype))
    for name, value in checkpoint.tensors.items()
  }
  torch.save(
    tensors,
    checkpoint.folder / "pytorch_model.bin",
    _use_new_zipfile_serialization=not legacy,
  )
  expected = jax.tree.map(
    lambda x: x.astype(jax.numpy.dtype(dtype)).astype(np.float32),
    checkpoint.base,
  )
  assert_same(checkpoint.load(), expected)


def test_torch_bin_sharded(checkpoint):
  torch = pytest.importorskip("torch")
  names = list(checkpoint.tensors)
  weight_map = {}
  for i in range(2):
    part = {n: torch.tensor(checkpoint.tensors[n]) for n in names[i::2]}
    torch.save(part, checkpoint.folder / f"pytorch_model-{i}.bin")
    weight_map.update(dict.fromkeys(part, f"pytorch_model-{i}.bin"))
  index = checkpoint.folder / "pytorch_model.bin.index.json"
  index.write_text(json.dumps({"weight_map": weight_map}))
  assert_same(checkpoint.load(), checkpoint.base)


def test_torch_bin_runs_no_code(checkpoint):
  torch = pytest.importorskip("torch")

  class Evil:
    def __reduce__(self):
      return (exec, (f"open({str(checkpoint.folder / 'ran')!r}, 'w')",))

  path = checkpoint.folder / "pytorch_model.bin"
  torch.save({"model.norm.weight": Evil()}, path)
  assert "pytorch_model.bin is truncated or broken" in error_of(checkpoint.load)
  assert not (checkpoint.folder / "ran").exists()


@pytest.mark.parametrize(
  "name, max_shard_size",
  [
    *((name, size) for size in ("1GB", "1KB") for name in CASES),
    *((name, "1GB") for name in MORE),
  ],
)
def test_as_transformers_saves(name, max_shard_size, tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  family, hf_config = (CASES | MORE)[name]
  torch.manual_seed(0)
  auto = transformers.AutoModelForCausalLM
  if name in hf.MASKED:
    auto = transformers.AutoModelForMaskedLM
  model = auto.from_config(transformers.AutoConfig.for_model(**hf_config))
  model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
  hf_config = json.loads((tmp_path / "config.json").read_text())
  config = family.config_from_hf(hf_config)
  base = weights.load(tmp_path, family, config, np.float32)
  state = model.state_dict()
  for key, value in hf_tensors(family, config, base).items():
    np.testing.assert_array_equal(value, state[in_memory(key)].numpy())
  # And back: transformers reads what we save, nothing missing or left over.
  changed = jax.tree.map(lambda x: x + 1, base)
  weights.save(tmp_path / "out", family, config, changed, 1000)
  model.config.save_pretrained(tmp_path / "out")
  again, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
  assert not info["missing_keys"] and not info["unexpected_keys"]
  state = again.state_dict()
  for key, value in hf_tensors(family, config, changed).items():
    np.testing.assert_array_equal(value, state[in_memory(key)].numpy())


def in_memory(name):
  """A tensor's name in transformers 5, where GPT-NeoX's head is one of all."""
  return name.replace("embed_out", "lm_head")


@pytest.mark.parametrize(
  "old, new",
  [("model.decoder.", "decoder."), ("model.decoder.", ""), ("model.", "")],
)
def test_prefixes(old, new, tmp_path):
  family = opt if "decoder" in old else llama
  config = family.config_from_hf(OPT if family is opt else LLAMA)
  base = random_base(family, config)
  tensors = {
    name.replace(old, new): value
    for name, value in hf_tensors(family, config, base).items()
  }
  safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
  assert_same(weights.load(tmp_path, family, config, np.float32), base)


def test_ignores_buffers_and_the_tied_head(checkpoint):
  checkpoint.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(
    1
  )
  embedding = checkpoint.tensors["model.embed_tokens.weight"]
  checkpoint.tensors["lm_head.weight"] = embedding.copy()
  checkpoint.write(checkpoint.tensors)
  assert_same(checkpoint.load(), checkpoint.base)


def test_a_tied_matrix_may_be_stored_as_the_head(checkpoint):
  embedding = checkpoint.tensors.pop("model.embed_tokens.weight")
  checkpoint.tensors["lm_head.weight"] = embedding
  checkpoint.write(checkpoint.tensors)
  assert_same(checkpoint.load(), checkpoint.base)


@pytest.mark.parametrize("rows", [weights._ROWS, 5])
def test_a_head_that_differs_from_the_tied_embedding(
  checkpoint, rows, monkeypatch
):
  monkeypatch.setattr(weights, "_ROWS", rows)
  config = llama.config_from_hf(LLAMA)
  has_own_head = lambda: weights.has_own_head(checkpoint.folder, llama, config)
  head = checkpoint.tensors["model.embed_tokens.weight"].copy()
  checkpoint.write(checkpoint.tensors)
  assert not has_own_head()
  checkpoint.tensors["lm_head.weight"] = head
  checkpoint.write(checkpoint.tensors)
  assert not has_own_head()
  head[-1, -1] += 1e-3
  checkpoint.write(checkpoint.tensors)
  assert has_own_head()
  text = error_of(checkpoint.load)
  assert "ties the head" in text and "lm_head.weight" in text


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated(checkpoint, keep):
  checkpoint.write(checkpoint.tensors)
  path = checkpoint.folder / "model.safetensors"
  data = path.read_bytes()
  path.write_bytes(data[: int(keep * len(data)) if keep == 0.5 else keep])
  text = error_of(checkpoint.load)
  assert f"{path} is truncated or broken" in text


@pytest.mark.parametrize("name", ["model.safetensors", "flax_model.msgpack"])
@pytest.mark.parametrize("content", [b"<!DOCTYPE html> no weights", b"\x81"])
def test_corrupt(checkpoint, name, content):
  (checkpoint.folder / name).write_bytes(content)
  assert f"{name} is truncated or broken" in error_of(checkpoint.load)


def test_corrupt_torch_bin(checkpoint):
  pytest.importorskip("torch")
  (checkpoint.folder / "pytorch_model.bin").write_bytes(b"no weights")
  text = error_of(checkpoint.load)
  assert "pytorch_model.bin is truncated or broken" in text


def test_missing_tensor(checkpoint):
  name = "model.layers.1.mlp.gate_proj.weight"
  value = checkpoint.tensors.pop(name)
  checkpoint.tensors["model.layers.1.mlp.gate_proj.wieght"] = value
  checkpoint.write(checkpoint.tensors)
  text = error_of(checkpoint.load)
  assert f"no tensor {name}" in text
  assert "mean 'model.layers.1.mlp.gate_proj.wieght'" in text


def test_wrong_shape(checkpoint):
  name = "model.layers.1.self_attn.k_proj.weight"
  checkpoint.tensors[name] = np.zeros((8, 8), np.float32)
  checkpoint.write(checkpoint.tensors)
  text = error_of(checkpoint.load)
  assert name in text and "(8, 8)" in text and "(4, 8)" in text


def test_leftover_tensors(checkpoint):
  for i in range(5):
    checkpoint.tensors[f"model.layers.{3 + i}.x"] = np.zeros(1, np.float32)
  checkpoint.write(checkpoint.tensors)
  text = error_of(checkpoint.load)
  assert "model.layers.3.x, model.layers.4.x, model.layers.5.x and 2 mo" in text


@pytest.mark.parametrize(
  "content, complaint",
  [
    ('{"weight_map": {"a": "gone.safetensors"}}', "not in that folder"),
    ('{"weight_map": {"a": "../x.safetensors"}}', "not a plain file name"),
    ('{"weight_map": {"a": "/etc/passwd"}}', "not a plain file name"),
    ('{"weight_map": {"a": ".."}}', "not a plain file name"),
    ('{"weight_map": {"a": "C:\\\\x"}}', "not a plain file name"),
    ('{"weight_map": {"a": 3}}', "not a plain file name"),
    ('{"weight_map": {"a": ["b"]}}', "not an index of weights"),
    ('{"weight_map": ["a"]}', "not an index of weights"),
    ("[]", "not an index of weights"),
    ("{", "not an index of weights"),
  ],
)
def test_bad_index(checkpoint, content, complaint):
  path = checkpoint.folder / "model.safetensors.index.json"
  path.write_text(content)
  text = error_of(checkpoint.load)
  assert complaint in text and str(path) in text


def test_digests(tmp_path):
  """A small file counts whole; of a large one, its size and its blocks."""
  path = tmp_path / "model.safetensors"
  small, large = bytearray(b"weights" * 10), bytearray(20 * 2**20)

  def digest(content, flip=None):
    changed = bytearray(content)
    if flip is not None:
      changed[flip] ^= 1
    path.write_bytes(changed)
    return tensor_files.digests(tmp_path)["model.safetensors"]

  places = (0, 23, len(small) - 1)
  assert len({digest(small), *(digest(small, flip) for flip in places)}) == 4
  places = (0, 2**20 - 1, len(large) - 1)
  assert len({digest(large), *(digest(large, flip) for flip in places)}) == 4
  between = (20 - 1) * 2**20 // 15 - 1  # after the first block, before the next
  assert digest(large, between) == digest(large) != digest(large[1:])


def test_no_weights(checkpoint):
  assert "has no weights" in error_of(checkpoint.load)
