"""Packed rows: every token learned once, the same loss, no attention across."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zofo_jax.core import losses
from zofo_jax.data import batching, encode_options, packing
from zofo_jax.models import apply, llama


def _example(draw, length, name="row"):
  """An example of which two thirds of the tokens are learned."""
  tokens = draw.randint(1, 30, length + 1).tolist()
  learned = [i for i in range(1, length + 1) if i % 3]
  row = encode_options.EncodedRow(
    tokens=tuple(tokens[:-1]),
    positions=tuple(i - 1 for i in learned),
    targets=tuple((slot, tokens[i], 0) for slot, i in enumerate(learned)),
  )
  return encode_options.Example((row,), 0, (0,), (True,), name)


@pytest.fixture(scope="module")
def examples():
  draw = np.random.RandomState(0)
  return [_example(draw, n, f"row {n}") for n in (5, 11, 3, 7, 9, 2, 4)]


def _pairs(examples):
  """Returns (token, next token) of every target, sorted."""
  return sorted(
    (row.tokens[row.positions[slot]], token)
    for example in examples
    for row in example.rows
    for slot, token, _ in row.targets
  )


def test_every_target_is_kept(examples):
  packed = packing.pack(examples, 16)
  assert len(packed) < len(examples)
  assert _pairs(packed) == _pairs(examples)
  assert all(len(e.rows[0].tokens) <= 16 for e in packed)
  assert sum(len(e.rows[0].tokens) for e in packed) == 41
  assert packed[0].source == "row 5 + row 11"
  assert packed[0].rows[0].documents == (1,) * 5 + (2,) * 11


def test_long_rows_are_split(examples):
  packed = packing.pack(examples, 4)
  assert _pairs(packed) == _pairs(examples)
  assert all(len(e.rows[0].tokens) <= 4 for e in packed)
  pieces = packing.split(examples, 4)
  assert _pairs(pieces) == _pairs(examples)
  assert [e.source for e in pieces[:3]] == ["row 5", "row 5", "row 11"]


def test_a_long_row_is_read_once():
  class Watched(tuple):
    reads = 0

    def __iter__(self):
      Watched.reads += 1
      return super().__iter__()

  example = _example(np.random.RandomState(0), 200)
  row = example.rows[0]._replace(targets=Watched(example.rows[0].targets))
  pieces = packing.split([example._replace(rows=(row,))], 8)
  assert len(pieces) == 25 and Watched.reads == 1


@pytest.fixture(scope="module")
def model():
  config = llama.config_from_hf(
    {
      "model_type": "llama",
      "vocab_size": 32,
      "hidden_size": 16,
      "intermediate_size": 32,
      "num_hidden_layers": 2,
      "num_attention_heads": 2,
      "num_key_value_heads": 2,
      "max_position_embeddings": 64,
    }
  )
  module = llama.Model(config)
  ids = jnp.zeros((1, 4), jnp.int32)
  base = module.init(jax.random.key(0), ids, ids > -1, ids, ids, ids)["params"]
  return module, jax.tree.map(lambda w: 8 * w if w.ndim > 1 else w, base)


def _batch(examples):
  return batching.collate(examples, batching.shape_of(examples), pad=0)


def test_the_loss_is_that_of_rows_of_their_own(model, examples):
  module, base = model
  loss_fn = jax.jit(
    losses.make_loss_fn(apply.make_log_probs_fn(module), losses.likelihood)
  )
  packed = packing.pack(examples, 16)
  actual = loss_fn(base, {}, _batch(packed), None)
  expected = loss_fn(base, {}, _batch(examples), None)
  np.testing.assert_allclose(actual, expected, rtol=1e-5)
  batch = _batch(packed)
  across = loss_fn(base, {}, batch._replace(mask=batch.mask > 0), None)
  assert abs(across - expected) > 1e-3


def test_no_token_attends_to_another_document(model, examples):
  module, base = model
  (packed, *_) = packing.pack(examples, 16)
  row = packed.rows[0]
  documents = np.array(row.documents)
  tokens, mask = jnp.array([row.tokens]), jnp.array([documents])
  table = jnp.array(base["embed"]["embedding"])[tokens[0]]

  def hidden(inputs, mask):
    # The table has a row for each place instead of one for each token.
    filled = jnp.zeros((32, 16)).at[: len(documents)].set(inputs)
    out = module.apply(
      {"params": {**base, "embed": {"embedding": filled}}},
      jnp.arange(len(documents))[None],
      mask,
      method="hidden",
    )
    return out[0].sum(axis=-1)

  jacobian = jax.jacobian(hidden)(table, mask)  # [L, L, D]
  reads = np.abs(np.array(jacobian)).max(axis=-1) > 0
  same = documents[:, None] == documents[None]
  assert not reads[~same].any()
  assert reads[same & np.tri(len(documents), dtype=bool)].all()
  one = np.abs(np.array(jax.jacobian(hidden)(table, mask > 0))).max(axis=-1)
  assert (one > 0)[~same].any()
