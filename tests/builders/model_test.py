"""Checkpoints whose files disagree: heads, tokenizers, generation configs."""

import json
import logging
import random
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from tests import tiny
from tests.models.hf import mutations
from tests.models.reference import make_logits as hf
from zofo_jax import errors, tasks
from zofo_jax.builders import encoder as encoder_lib
from zofo_jax.builders import model as model_lib
from zofo_jax.data import tokenizer as tokenizer_lib
from zofo_jax.models.hf import weights


@pytest.fixture
def folder(tiny_model, tmp_path):
  """A copy of the tiny model, to be changed."""
  return shutil.copytree(tiny_model, tmp_path / "model")


def change(path, **fields):
  path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def logits(model, tokens):
  return model.module.apply(
    {"params": model_lib.load_base(model)},
    *(tokens, np.ones(tokens.shape, bool)),
    method="logits",
  )


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_head_of_its_own_is_used_though_the_config_ties_it(
  name, tiny_model, tmp_path, caplog
):
  fields, tensors, tokens, *_ = hf.load(name)
  head = np.random.default_rng(0).normal(size=(96, 16)).astype(np.float32)
  tensors = {**tensors, "lm_head.weight": head}
  safetensors.numpy.save_file(
    tensors, tmp_path / "model.safetensors", metadata={"format": "pt"}
  )
  for path in tiny_model.glob("tokenizer*"):
    shutil.copy(path, tmp_path)
  text = json.dumps({**fields, "tie_word_embeddings": True})
  (tmp_path / "config.json").write_text(text)
  with caplog.at_level(logging.WARNING, "zofo_jax"):
    model = model_lib.load_model(str(tmp_path))
  assert "a head of their own" in caplog.text
  assert not model.module.config.tied_head
  base = model_lib.load_base(model)
  np.testing.assert_array_equal(base["head"]["embedding"], head)
  actual = logits(model, tokens[:1])
  # What is exported says so, and is read without a warning.
  model_lib.save_base(tmp_path / "out", model, base)
  caplog.clear()
  again = model_lib.load_model(str(tmp_path / "out"))
  assert not caplog.records and not again.module.config.tied_head
  np.testing.assert_array_equal(logits(again, tokens[:1]), actual)

  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  for path in (tmp_path, tmp_path / "out"):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
      rows = torch.tensor(tokens[:1], dtype=torch.int64)
      expected = theirs(rows).logits
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def add_tokens(folder, count):
  """Adds tokens with ids from the model's vocab_size on; one has a gap."""
  path = folder / "tokenizer.json"
  fields = json.loads(path.read_text())
  size = 1 + max(
    *fields["model"]["vocab"].values(),
    *(token["id"] for token in fields["added_tokens"]),
  )
  change(folder / "config.json", vocab_size=size)
  options = dict.fromkeys(
    ("single_word", "lstrip", "rstrip", "normalized"), False
  )
  for i in range(count):
    token = {"id": size + i, "content": f"<pad{i}>", "special": True, **options}
    fields["added_tokens"].append(token)
  path.write_text(json.dumps(fields))
  change(folder / "tokenizer_config.json", pad_token="<pad0>")
  return size


def test_tokens_that_the_model_does_not_have_matter_only_in_texts(folder):
  size = add_tokens(folder, 2)
  model = model_lib.load_model(str(folder))
  assert len(model.tokenizer) == size + 2
  assert model.tokenizer.pad_token_id == size
  assert 0 <= model.pad < size
  config = tiny.base_config()
  config.model.name = str(folder)
  encoder = encoder_lib.make_encoder(config, model)
  task = tasks.custom("own", prompt="{text} It was", options=(" bad", " good"))
  story = tasks.custom("story", prompt="{text}", label="answer")
  rows = [{"text": "a film", "label": 1}, {"text": "a <pad1>", "label": 0}]
  rows = [
    tasks.Row({**row, "answer": "yes"}, f"rows.jsonl, row {i}")
    for i, row in enumerate(rows, 1)
  ]
  calls = {
    "train": lambda rows: encoder.encode_train(task, rows),
    "eval": lambda rows: encoder.encode_eval(task, rows),
    "prompt": lambda rows: encoder.encode_prompt(
      task, rows[-1], rows[-1].fields["text"]
    ),
    "generation": lambda rows: encoder.encode_eval(story, rows),
  }
  for call in calls.values():
    assert call(rows[:1])
    with pytest.raises(errors.UserError) as caught:
      call(rows)
    text = str(caught.value)
    assert "rows.jsonl, row 2: the text has the token '<pad1>'" in text
    assert f"id is {size + 1}; the model has {size} tokens" in text
  kept, refused = encoder.encode_unlabelled(task, rows)
  assert kept.source == rows[0].source
  assert isinstance(refused, errors.RowError) and "<pad1>" in str(refused)
  # Options too.
  task = tasks.custom("own", prompt="{text}", options=(" bad", "<pad1>"))
  with pytest.raises(errors.UserError, match="row 1: the text has"):
    encoder.encode_eval(task, rows[:1])
  model_lib.make_generate_fn(model, max_new_tokens=2, stop=("<pad1>",))


def test_broken_generation_configs_are_named(folder):
  path = folder / "generation_config.json"
  model = model_lib.load_model(str(folder))
  path.write_text('{"eos_token_id": [5, 10000, null]}')
  assert model_lib._end_ids(model) == sorted({5, model.tokenizer.eos_token_id})
  # The token that ends a turn of the assistant may be another one.
  model.tokenizer.chat_template = (
    "{% for m in messages %}{{ m.content }}<s>{% endfor %}"
  )
  chat_ids = {5, model.tokenizer.bos_token_id, model.tokenizer.eos_token_id}
  assert model_lib._end_ids(model, chat=True) == sorted(chat_ids)
  for text in ("{", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": [[1]]}'):
    path.write_text(text)
    with pytest.raises(errors.UserError, match=r"generation_config\.json"):
      model_lib._end_ids(model)


def test_mutated_tokenizers_work_or_are_refused(folder):
  path = folder / "tokenizer.json"
  plain = path.read_text()
  draw, refused = random.Random(0), 0
  for _ in range(100):
    fields = json.loads(plain)
    mutations.mutate_anywhere(draw, fields)
    path.write_text(json.dumps(fields))
    try:
      tokenizer = tokenizer_lib.load_tokenizer(folder)
      tokenizer_lib.tokenize(tokenizer, "a film by the sea")
    except errors.UserError as error:
      assert "\n" not in str(error)
      refused += 1
  assert 0 < refused < 100


def test_mutated_indices_are_read_or_refused(folder):
  model = model_lib.load_model(str(folder))
  family, config = model.family, model.module.config
  expected = weights.load(folder, family, config, jnp.float32)
  weights.save(folder, family, config, expected, shard_bytes=30000)
  path = folder / "model.safetensors.index.json"
  plain = path.read_text()
  draw, refused = random.Random(0), 0
  for i in range(200):
    fields = json.loads(plain)
    if i:
      mutations.mutate_anywhere(draw, fields)
    path.write_text(json.dumps(fields))
    try:
      actual = weights.load(folder, family, config, jnp.float32)
    except errors.UserError as error:
      assert i and "\n" not in str(error)
      refused += 1
      continue
    np.testing.assert_array_equal(
      actual["embed"]["embedding"], expected["embed"]["embedding"]
    )
  assert 0 < refused < 200
