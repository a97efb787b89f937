"""Prefix and prompt: what they are in a model, alone and with LoRA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.recorded import load
from zofo_jax import adapters, errors
from zofo_jax.core import directions, perturbed, sampler
from zofo_jax.core import keys as keys_lib
from zofo_jax.models.decoder import STACKED


def recorded(name):
  model, _, base, tokens, mask, _ = load(name)
  return model, base, tokens, mask


@functools.partial(jax.jit, static_argnums=0)
def run(model, base, adapter, tokens, mask):
  variables = {"params": base, "adapter": adapter}
  return model.apply(variables, tokens, mask, method="logits")


def num_positions(adapter):
  return adapters.prefix_length(adapter) + adapters.prompt_length(adapter)


# Jitted, as op by op every op is compiled.
@functools.partial(jax.jit, static_argnums=(0, 1))
def make(kind, model, base, seed=1):
  """An adapter that matters, of one kind or all three."""
  key = jax.random.key(seed)
  if kind == "prefix":
    return adapters.init_prefix(key, model, base, length=3)
  if kind == "projected":
    return adapters.init_prefix(
      key, model, base, length=3, init="random", projection=5
    )
  if kind == "prompt":
    return adapters.init_prompt(key, base, length=2)
  if kind == "lora":
    lora = adapters.init_lora(key, base, rank=2, alpha=4.0)
    return jax.tree.map(
      lambda w: w + 0.2 * jnp.cos(jnp.arange(w.size) * 1.0).reshape(w.shape),
      lora,
    )
  return adapters.join(
    *(make(one, model, base, seed) for one in ("lora", "prefix", "prompt"))
  )


# Every model, and either kind in both families.
@pytest.mark.parametrize(
  "kind, name",
  [
    *(("prefix", "llama_dynamic"), ("prefix", "opt_350m")),
    ("prefix", "mistral"),  # with a window
    *(("prompt", "llama"), ("prompt", "opt")),
    *(
      pytest.param(*pair, marks=pytest.mark.slow)
      for pair in (
        *(("prefix", "llama"), ("prefix", "opt")),
        *(("prompt", "llama_dynamic"), ("prompt", "opt_350m")),
      )
    ),
  ],
)
def test_tokens_as_adapter_are_those_tokens_in_front(name, kind):
  model, base, tokens, mask = recorded(name)
  start = np.array([7, 80, 9], np.int32)
  if kind == "prefix":
    adapter = adapters.prefix_of_tokens(model, base, jnp.asarray(start))
  else:
    adapter = adapters.init_prompt(
      jax.random.key(0), base, length=3, init="text", tokens=start
    )
  if name == "llama_dynamic" and kind == "prefix":
    # Longer rows turn their keys by other angles than the prefix's own.
    tokens, mask = tokens[:, :5], mask[:, :5]
  front = np.broadcast_to(start, (len(tokens), 3))
  rows = np.concatenate([front, tokens], axis=1)
  seen = np.concatenate([np.ones_like(front, bool), mask], axis=1)
  expected = run(model, base, {}, rows, seen)[:, 3:]
  actual = run(model, base, adapter, tokens, mask)
  np.testing.assert_allclose(actual[mask], expected[mask], atol=1e-4)
  plain = run(model, base, {}, tokens, mask)
  assert np.abs(actual - plain)[mask].max() > 1e-2


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("kind", ["all", "projected"])
def test_both_paddings_are_one_and_empty_rows_are_finite(name, kind):
  model, base, tokens, _ = recorded(name)
  adapter = make(kind, model, base)
  real, pad = tokens[:1, :8], np.ones((1, 3), np.int32)
  sides = [np.concatenate(row, axis=1) for row in ([pad, real], [real, pad])]
  rows = np.concatenate([*sides, np.ones((1, 11), np.int32)])
  logits = run(model, base, adapter, rows, rows != 1)
  np.testing.assert_allclose(logits[0, 3:], logits[1, :8], atol=1e-4)
  assert np.isfinite(logits).all()


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_targets_are_scored_where_the_caller_says(name):
  model, base, tokens, mask = recorded(name)
  adapter = make("all", model, base)
  positions = jnp.array([[3, 11], [8, 6], [0, 7]], jnp.int32)
  slot = jnp.array([[0, 1], [1, 0], [1, 1]], jnp.int32)
  token = jnp.array([[5, 6], [95, 4], [50, 51]], jnp.int32)
  actual = jax.jit(model.apply)(
    {"params": base, "adapter": adapter}, tokens, mask, positions, slot, token
  )
  logits = run(model, base, adapter, tokens, mask)
  log_probs = jax.nn.log_softmax(logits)
  for row in range(3):
    for k in range(2):
      place = positions[row, slot[row, k]]
      np.testing.assert_allclose(
        actual[row, k], log_probs[row, place, token[row, k]], atol=1e-4
      )


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_all_kinds_together_act_as_all(name):
  model, base, tokens, mask = recorded(name)
  kinds = ("lora", "prefix", "prompt")
  together = run(model, base, make("all", model, base), tokens, mask)
  for kind in kinds:
    rest = [make(k, model, base) for k in kinds if k != kind]
    without = run(model, base, adapters.join(*rest), tokens, mask)
    assert np.abs(together - without)[mask].max() > 1e-2, kind


@pytest.mark.parametrize(
  "kind",
  [
    "projected",
    "all",
    *(
      pytest.param(kind, marks=pytest.mark.slow)
      for kind in ("lora", "prefix", "prompt")
    ),
  ],
)
def test_gradients_are_finite_differences(kind):
  model, base, tokens, mask = recorded("llama")
  adapter = make(kind, model, base)
  weight = jnp.asarray(np.random.default_rng(0).normal(size=(3, 12, 96)))

  @jax.jit
  def loss(adapter):
    logits = run(model, base, adapter, tokens, mask)
    return jnp.mean(jax.nn.log_softmax(logits) * weight * mask[..., None])

  gradient = jax.jit(jax.grad(loss))(adapter)
  assert jax.tree.structure(gradient) == jax.tree.structure(adapter)
  leaves, structure = jax.tree.flatten(adapter)
  for i, leaf in enumerate(leaves):
    z = np.random.default_rng(i).normal(size=leaf.shape).astype(np.float32)

    def at(step, i=i, moved=leaf, z=z):
      moved = [*leaves[:i], moved + step * z, *leaves[i + 1 :]]
      return loss(jax.tree.unflatten(structure, moved))

    slope = (at(1e-2) - at(-1e-2)) / 2e-2
    actual = float(jnp.vdot(jax.tree.leaves(gradient)[i], z))
    np.testing.assert_allclose(actual, slope, rtol=2e-2, atol=3e-4)
    assert np.abs(jax.tree.leaves(gradient)[i]).max() > 0


@pytest.mark.parametrize("kind", ["all", "projected"])
def test_perturbed_weights_act_as_their_values(kind):
  model, base, tokens, mask = recorded("llama")
  adapter = make(kind, model, base)
  key = keys_lib.DirectionKey(jax.random.key(3), jax.random.key(4))
  lazy = sampler.Sampler(directions.Rademacher(), stacked=STACKED, lazy=True)
  nodes = jax.jit(lambda base: lazy.perturb(base, key, 1e-2))(base)
  values = jax.jit(perturbed.materialize)(nodes)
  actual = run(model, nodes, adapter, tokens, mask)
  whole = run(model, values, adapter, tokens, mask)
  np.testing.assert_allclose(actual, whole, atol=1e-4)
  assert np.abs(actual - run(model, base, adapter, tokens, mask)).max() > 1e-2


@pytest.mark.parametrize("kind", ["all", "projected"])
def test_a_batch_of_adapters_acts_one_by_one(kind):
  model, base, tokens, mask = recorded("opt")
  each = [make(kind, model, base, seed) for seed in (1, 2)]
  batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
  together = jax.vmap(lambda a: run(model, base, a, tokens, mask))(batch)
  for adapter, actual in zip(each, together):
    alone = run(model, base, adapter, tokens, mask)
    np.testing.assert_allclose(actual, alone, atol=1e-4)
  assert num_positions(batch) == num_positions(each[0])


def test_a_projected_prefix_acts_as_its_keys_and_values():
  model, base, tokens, mask = recorded("llama")
  adapter = make("projected", model, base)
  expanded = adapters.expand(adapter)
  node = expanded["layers"]["attention"]["prefix"]
  assert node.key.shape == node.value.shape == (2, 3, 2, 4)
  inside = adapter["layers"]["attention"]["prefix"]
  hidden = np.tanh(
    inside.embedding @ inside.hidden_kernel + inside.hidden_bias[None]
  )
  expected = hidden[2] @ inside.out_kernel[:, 1, 0, 1]
  expected += inside.out_bias[1, 0, 1]
  np.testing.assert_allclose(node.key[1, 2, 1], expected, atol=1e-5)
  actual = run(model, base, adapter, tokens, mask)
  alone = run(model, base, expanded, tokens, mask)
  np.testing.assert_allclose(actual, alone, atol=1e-5)


def test_bfloat16_weights_keep_a_float32_adapter():
  model, base, tokens, mask = recorded("llama")
  small = jax.tree.map(lambda w: w.astype(jnp.bfloat16), base)
  adapter = make("all", model, small)
  assert {w.dtype for w in jax.tree.leaves(adapter)} == {jnp.dtype("float32")}
  hidden = lambda: model.apply(
    {"params": small, "adapter": adapter}, tokens, mask, method="hidden"
  )
  assert jax.eval_shape(hidden).dtype == jnp.bfloat16
  actual = run(model, small, adapter, tokens, mask)
  exact = run(model, base, adapter, tokens, mask)
  assert np.abs(actual - exact)[mask].mean() < 0.05 * np.std(exact)


@pytest.mark.parametrize("name", ["llama_gelu_head_dim", "opt"])
def test_starts_differ_by_key_and_know_their_shapes(name):
  model, base, *_ = recorded(name)
  shapes = jax.eval_shape(lambda: base)
  for kind in ("prefix", "projected", "prompt"):
    one, two = (make(kind, model, base, seed) for seed in (1, 2))
    abstract = jax.eval_shape(lambda kind=kind: make(kind, model, base))
    assert jax.tree.map(jnp.shape, one) == jax.tree.map(
      lambda leaf: leaf.shape, abstract
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two)):
      assert not np.array_equal(a, b)
  assert num_positions(make("all", model, base)) == 5
  assert num_positions(make("projected", model, base)) == 3
  assert num_positions(make("lora", model, base)) == 0
  prompt = adapters.init_prompt(
    jax.random.key(1), shapes, length=4, init="random"
  )["embed"]["prompt"]
  assert 0.7 < np.std(prompt.embedding) < 1.3
  rows = make("prompt", model, base)["embed"]["prompt"].embedding
  table = np.asarray(base["embed"]["embedding"])
  assert all((table == row).all(axis=1).any() for row in np.asarray(rows))


def test_mistakes_are_named():
  model, base, *_ = recorded("opt")
  key = jax.random.key(0)
  with pytest.raises(errors.UserError, match="prefix's length is 0"):
    adapters.init_prefix(key, model, base, length=0)
  with pytest.raises(errors.UserError, match=r"'token'.*mean 'tokens'"):
    adapters.init_prefix(key, model, base, length=1, init="token")
  with pytest.raises(errors.UserError, match="'tokens' with projection 4"):
    adapters.init_prefix(key, model, base, length=1, projection=4)
  with pytest.raises(errors.UserError, match="prompt's length is 0"):
    adapters.init_prompt(key, base, length=0)
  with pytest.raises(errors.UserError, match=r"'txt'.*mean 'text'"):
    adapters.init_prompt(key, base, length=1, init="txt")
  with pytest.raises(errors.UserError, match="text is empty"):
    adapters.init_prompt(key, base, length=1, init="text", tokens=[])
  for kind in ("prefix", "prompt"):
    with pytest.raises(errors.UserError, match=f"has a {kind}, which cannot"):
      adapters.merge_lora(base, make(kind, model, base))
  with pytest.raises(ValueError, match="two adapters have a 'prompt'"):
    adapters.join(*2 * [make("prompt", model, base)])
