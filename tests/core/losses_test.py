"""Losses against slow loops over examples, options and tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics

from zofo_jax.core import losses

B, R, L, P, K = 5, 3, 6, 2, 4
OPTIONS = 3


def _batch():
  """Ragged options of one to three tokens; the last example is filler."""
  rng = np.random.default_rng(0)
  # Per example, per option: the (row, target) cells of its tokens.
  options = [
    [[(0, 0)], [(0, 1)]],  # two single tokens at one position
    [[(0, 0), (0, 1)], [(1, 0)], [(2, 0), (2, 1), (2, 2)]],
    [[(0, 0), (1, 3)], [(0, 2), (0, 1)]],
    [[(2, 3)], [(1, 1)], [(0, 0), (0, 3)]],
    [],
  ]
  labels = [1, 2, 0, 0, 0]
  target_option = np.zeros((B, R, K), np.int32)
  target_weight = np.zeros((B, R, K), np.float32)
  option_mask = np.zeros((B, OPTIONS), bool)
  for b, example in enumerate(options):
    for o, cells in enumerate(example):
      option_mask[b, o] = True
      for r, k in cells:
        target_option[b, r, k] = o
        target_weight[b, r, k] = 1.0
  batch = losses.Batch(
    tokens=rng.integers(9, size=(B, R, L), dtype=np.int32),
    mask=np.ones((B, R, L), bool),
    positions=rng.integers(L, size=(B, R, P), dtype=np.int32),
    target_slot=rng.integers(P, size=(B, R, K), dtype=np.int32),
    target_token=rng.integers(9, size=(B, R, K), dtype=np.int32),
    target_option=target_option,
    target_weight=target_weight,
    label=np.array(labels, np.int32),
    option_mask=option_mask,
    example_weight=np.array([1, 1, 1, 1, 0], np.float32),
  )
  log_probs = -rng.uniform(0.1, 5.0, size=(B, R, K)).astype(np.float32)
  return jax.tree.map(jnp.asarray, batch), jnp.asarray(log_probs), options


def _scores(options, log_probs):
  log_probs = np.array(log_probs, np.float64)
  return [
    [np.mean([log_probs[b, r, k] for r, k in cells]) for cells in example]
    for b, example in enumerate(options)
  ]


def test_option_scores():
  batch, log_probs, options = _batch()
  got = np.array(jax.jit(losses.option_scores)(log_probs, batch))
  assert got.shape == (B, OPTIONS) and got.dtype == np.float32
  assert np.all(np.isfinite(got))
  for b, example in enumerate(_scores(options, log_probs)):
    np.testing.assert_allclose(got[b, : len(example)], example, rtol=1e-6)
    # An option that is not there never wins.
    assert np.all(got[b, len(example) :] < -1e30)


def test_likelihood():
  batch, log_probs, options = _batch()
  tokens = [
    float(log_probs[b, r, k])
    for b, example in enumerate(options[:-1])
    for r, k in example[int(batch.label[b])]
  ]
  got = jax.jit(losses.likelihood)(log_probs, batch)
  np.testing.assert_allclose(got, -np.mean(tokens), rtol=1e-6)


def test_classification():
  batch, log_probs, options = _batch()
  terms = []
  for example, label in zip(_scores(options, log_probs)[:-1], batch.label):
    terms.append(np.log(np.sum(np.exp(example))) - example[int(label)])
  got = jax.jit(losses.classification)(log_probs, batch)
  np.testing.assert_allclose(got, np.mean(terms), rtol=1e-6)


@pytest.mark.parametrize("loss", [losses.likelihood, losses.classification])
def test_filler_changes_nothing(loss):
  batch, log_probs, _ = _batch()
  real = jax.tree.map(lambda leaf: leaf[:-1], batch)
  np.testing.assert_allclose(
    loss(log_probs, batch), loss(log_probs[:-1], real), rtol=1e-6
  )
  # Nor do the values at padded targets, however large.
  noisy = jnp.where(batch.target_weight > 0, log_probs, -1e4)
  noisy = noisy.at[-1].set(-1e4)
  np.testing.assert_allclose(
    loss(noisy, batch), loss(log_probs, batch), rtol=1e-6
  )


@pytest.mark.parametrize("loss", [losses.likelihood, losses.classification])
def test_gradients(loss):
  batch, log_probs, _ = _batch()
  grads = np.array(jax.jit(jax.grad(loss))(log_probs, batch))
  assert np.all(np.isfinite(grads))
  padded = np.array(batch.target_weight) == 0
  assert not grads[padded].any()
  assert np.abs(grads).sum() > 0
  # A batch of nothing but filler: a loss of zero and no gradient.
  empty = batch._replace(
    example_weight=jnp.zeros(B), target_weight=jnp.zeros((B, R, K))
  )
  value, grads = jax.value_and_grad(loss)(log_probs, empty)
  assert float(value) == 0.0 and not np.any(grads)


def test_macro_f1_is_scikit_learn_s():
  rng, size, options = np.random.RandomState(0), 40, 4
  label = rng.choice(options, size, p=(0.7, 0.2, 0.1, 0.0))
  log_probs = rng.normal(size=(size, 1, options)).astype(np.float32)
  log_probs[:, 0, 3] = -9.0  # neither right nor chosen
  batch, _, _ = _batch()
  batch = batch._replace(
    target_option=jnp.broadcast_to(jnp.arange(options), log_probs.shape),
    target_weight=jnp.ones(log_probs.shape),
    label=jnp.asarray(label),
    option_mask=jnp.ones((size, options), bool),
    example_weight=jnp.arange(size) < 35.0,
  )
  chosen = log_probs[:, 0].argmax(-1)
  expected = metrics.f1_score(label[:35], chosen[:35], average="macro")
  error = jax.jit(losses.macro_f1_error)(log_probs, batch)
  assert error == pytest.approx(1 - expected)


def test_make_loss_fn():
  batch, log_probs, _ = _batch()
  seen = []

  def log_probs_fn(base, adapter, batch, key):
    seen.append(key)
    return base * log_probs + adapter

  loss_fn = losses.make_loss_fn(log_probs_fn, losses.likelihood)
  np.testing.assert_allclose(
    loss_fn(2.0, 0.5, batch, None),
    losses.likelihood(2.0 * log_probs + 0.5, batch),
    rtol=1e-6,
  )
  assert seen == [None]


def test_transformations():
  batch, log_probs, _ = _batch()
  many = jnp.stack([log_probs, 2 * log_probs])
  for loss in (losses.likelihood, losses.classification):
    both = jax.vmap(functools.partial(loss, batch=batch))(many)
    np.testing.assert_allclose(
      both, [loss(log_probs, batch), loss(2 * log_probs, batch)], rtol=1e-6
    )
