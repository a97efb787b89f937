"""RoBERTa and MeZO on it, against a slow transcription in NumPy, float64."""

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

import zofo_jax as zofo
from tests.models.recorded import Waves, load
from zofo_jax.builders import model as model_lib
from zofo_jax.core import keys as keys_lib
from zofo_jax.core import losses
from zofo_jax.models.decoder import STACKED

EPS, RATE = 1e-2, 0.1
# Of each row: where its mask is, and which of the label words is right.
MASKS, LABELS = np.array([11, 7, 3]), np.array([1, 0, 1])
WORDS = np.array([40, 41])


def flat(tree):
  """The weights by path, float64."""
  flat = flax.traverse_util.flatten_dict(tree, sep="/")
  return {path: np.asarray(leaf, np.float64) for path, leaf in flat.items()}


def gelu(x):
  return x * 0.5 * (1 + scipy.special.erf(x / np.sqrt(2)))


def roberta(w, tokens, mask, num_heads=4, pad=1, epsilon=1e-12):
  """The logits of one row [L]; padding is at its ends."""

  def linear(x, name, layer=...):
    return x @ w[f"{name}/kernel"][layer] + w[f"{name}/bias"][layer]

  def norm(x, name, layer=...):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
    return x * w[f"{name}/scale"][layer] + w[f"{name}/bias"][layer]

  positions = np.where(mask, pad + np.cumsum(mask), pad)
  x = w["embed/embedding"][tokens] + w["position_embed/embedding"][positions]
  x = norm(x + w["type_embed/embedding"][0], "embed_norm")
  for layer in range(len(w["layers/mlp/up/kernel"])):
    query, key, value = (
      np.split(linear(x, f"layers/attention/{name}", layer), num_heads, axis=1)
      for name in ("query", "key", "value")
    )
    heads = []
    for q, k, v in zip(query, key, value):
      scores = np.where(mask, q @ k.T / np.sqrt(q.shape[1]), -np.inf)
      heads.append(scipy.special.softmax(scores, axis=1) @ v)
    out = linear(np.concatenate(heads, axis=1), "layers/attention/out", layer)
    x = norm(x + out, "layers/attention_norm", layer)
    hidden = gelu(linear(x, "layers/mlp/up", layer))
    out = linear(hidden, "layers/mlp/down", layer)
    x = norm(x + out, "layers/mlp_norm", layer)
  x = norm(gelu(linear(x, "head_transform")), "head_norm")
  return x @ w["embed/embedding"].T + w["head_bias/bias"]


def mean_loss(w, tokens, mask):
  """Cross-entropy over the label words, at the masks."""
  logits = [
    roberta(w, *row)[place, WORDS]
    for row, place in zip(zip(tokens, mask), MASKS)
  ]
  log_probs = scipy.special.log_softmax(logits, axis=1)
  return -log_probs[np.arange(3), LABELS].mean()


def make_batch(tokens, mask):
  count = len(tokens)
  zeros = np.zeros((count, 1, 2), np.int32)
  return losses.Batch(
    tokens=tokens[:, None],
    mask=mask[:, None],
    positions=MASKS[:, None, None],
    target_slot=zeros,
    target_token=zeros + WORDS,
    target_option=zeros + np.arange(2),
    target_weight=np.ones(zeros.shape, np.float32),
    label=LABELS,
    option_mask=np.ones((count, 2), bool),
    example_weight=np.ones(count, np.float32),
  )


def test_two_steps_of_mezo_are_the_slow_ones():
  case = load("roberta")
  tokens, mask = case.tokens, case.mask
  slow = flat(case.base)
  for row in range(3):
    logits = roberta(slow, tokens[row], mask[row])
    np.testing.assert_allclose(
      logits[mask[row]], case.logits[row][mask[row]], atol=1e-4
    )

  sampler = zofo.Sampler(Waves(), stacked=STACKED)
  loss_fn = model_lib.make_loss_fn("classification", case.model)
  algorithm = zofo.make_mezo_step(
    lambda base, batch: loss_fn(base, {}, batch, None),
    zofo.outer.sgd(RATE),
    zofo.ZerothOrder(sampler),
  )
  step = jax.jit(algorithm.step)
  write = jax.jit(
    lambda keys: sampler.weighted_sum(case.base, keys, jnp.ones(1))
  )
  state = algorithm.init(zofo.keys.seed_key(3), case.base)
  batch, hparams = make_batch(tokens, mask), zofo.BilevelHParams(zo_eps=EPS)
  for i in range(2):
    step_keys = keys_lib.step_keys(state.key, i)
    z = flat(
      write(keys_lib.direction_keys(step_keys.direction, step_keys.subspace, 1))
    )
    assert all(np.abs(leaf).max() > 0.5 for leaf in z.values())
    state, info = step(state, batch, hparams)
    up, down = (
      mean_loss(
        {p: w + sign * EPS * z[p] for p, w in slow.items()}, tokens, mask
      )
      for sign in (1, -1)
    )
    slope = (up - down) / (2 * EPS)
    np.testing.assert_allclose(info.values[0], [up, down], atol=1e-5)
    np.testing.assert_allclose(info.coefficients, [slope], rtol=1e-2)
    assert abs(slope) > 0.1
    slow = {path: w - RATE * slope * z[path] for path, w in slow.items()}
  actual = flat(state.params)
  for path, w in slow.items():
    np.testing.assert_allclose(actual[path], w, atol=1e-3, err_msg=path)
