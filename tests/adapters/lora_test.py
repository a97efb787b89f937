import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zofo_jax import adapters, errors
from zofo_jax.models import decoder, layers, transformer

MODEL = transformer.Transformer(transformer.Config(96, 16, 24, 2, 4, 2, 4))
TOKENS = jnp.arange(14, dtype=jnp.int32).reshape(2, 7) + 4
MASK = jnp.ones((2, 7), bool)


@pytest.fixture(scope="module")
def base():
  init = jax.jit(lambda key: MODEL.init(key, TOKENS, MASK, method="logits"))
  params = init(jax.random.key(0))["params"]
  return jax.tree.map(lambda w: w * 10.0 if w.ndim > 2 else w, params)


@jax.jit
def logits(base, adapter):
  variables = {"params": base, "adapter": adapter}
  return MODEL.apply(variables, TOKENS, MASK, method="logits")


def make(key, base, targets=adapters.QUERY_VALUE):
  """An adapter whose B is not zero."""
  adapter = adapters.init_lora(key, base, rank=3, alpha=6.0, targets=targets)
  leaves, tree = jax.tree.flatten(adapter)
  keys = jax.random.split(key, len(leaves))
  noise = [0.3 * jax.random.normal(k, w.shape) for k, w in zip(keys, leaves)]
  return jax.tree.unflatten(tree, [w + n for w, n in zip(leaves, noise)])


def test_a_new_adapter_changes_nothing(base):
  adapter = adapters.init_lora(jax.random.key(1), base, rank=3, alpha=6.0)
  np.testing.assert_array_equal(logits(base, adapter), logits(base, {}))


def test_init_is_that_of_peft(base):
  adapter = adapters.init_lora(jax.random.key(1), base, rank=3, alpha=6.0)
  assert set(adapter) == {"layers"}
  assert set(adapter["layers"]["attention"]) == {"query", "value"}
  lora = adapter["layers"]["attention"]["value"]["lora"]
  assert lora.a.shape == (2, 16, 3) and lora.b.shape == (2, 3, 8)
  assert lora.scale == 2.0
  bound = 16**-0.5  # kaiming_uniform_(a=sqrt(5)) of a matrix with 16 inputs
  assert 0.9 * bound < np.abs(lora.a).max() <= bound
  other = adapter["layers"]["attention"]["query"]["lora"]
  assert not np.array_equal(lora.a, other.a)
  assert not np.array_equal(lora.a[0], lora.a[1])
  sizes = [leaf.size for leaf in jax.tree.leaves(adapter)]
  assert sum(sizes) == 2 * 3 * (16 + 16 + 16 + 8)


def test_init_works_from_shapes(base):
  shapes = jax.eval_shape(lambda: base)
  init = lambda tree: adapters.init_lora(
    jax.random.key(1), tree, rank=3, alpha=6.0
  )
  jax.tree.map(np.testing.assert_array_equal, init(shapes), init(base))


def test_product_is_the_formula():
  rng = np.random.default_rng(0)
  x, a, b = (rng.normal(size=s) for s in [(2, 5, 4), (4, 3), (3, 6)])
  lora = adapters.Lora(jnp.asarray(a), jnp.asarray(b), scale=0.5)
  actual = adapters.lora_product(jnp.asarray(x, jnp.float32), lora)
  np.testing.assert_allclose(actual, 0.5 * x @ a @ b, atol=1e-5)


def test_rank_stabilized_scale(base):
  adapter = adapters.init_lora(
    jax.random.key(1), base, rank=4, alpha=6.0, rank_stabilized=True
  )
  assert adapter["layers"]["attention"]["query"]["lora"].scale == 3.0


def test_dropout_is_off_without_a_key_and_unbiased_with_one():
  rng = np.random.default_rng(0)
  x, a, b = (rng.normal(size=s) for s in [(2, 5, 4), (4, 3), (3, 6)])
  x, a, b = (jnp.asarray(v, jnp.float32) for v in (x, a, b))
  drops = adapters.Lora(a, b, scale=0.5, dropout=0.25)
  exact = adapters.lora_product(x, adapters.Lora(a, b, scale=0.5))
  np.testing.assert_array_equal(adapters.lora_product(x, drops), exact)
  keys = jax.random.split(jax.random.key(0), 20_000)
  each = jax.vmap(lambda key: adapters.lora_product(x, drops, key))(keys)
  error = each.std(axis=0) / np.sqrt(len(keys))
  assert (np.abs(each.mean(axis=0) - exact) < 4.5 * error).all()
  # A quarter of the inputs is dropped: all four of them in 1 case of 256.
  share = np.mean(np.abs(each).max(axis=-1) == 0)
  assert abs(share - 0.25**4) < 5e-4


def test_dropout_of_a_model_follows_the_key(base):
  adapter = make(jax.random.key(2), base)
  drops = jax.tree.map(
    lambda lora: dataclasses.replace(lora, dropout=0.5),
    adapter,
    is_leaf=lambda node: isinstance(node, adapters.Lora),
  )
  assert adapters.has_dropout(drops) and not adapters.has_dropout(adapter)

  @jax.jit
  def run(adapter, key):
    rngs = None if key is None else {"dropout": key}
    variables = {"params": base, "adapter": adapter}
    return MODEL.apply(variables, TOKENS, MASK, method="logits", rngs=rngs)

  exact = run(adapter, None)
  np.testing.assert_array_equal(run(drops, None), exact)
  np.testing.assert_array_equal(run(adapter, jax.random.key(0)), exact)
  one, two, again = (run(drops, jax.random.key(seed)) for seed in (0, 1, 0))
  np.testing.assert_array_equal(one, again)
  assert np.abs(one - two).max() > 1e-3 and np.abs(one - exact).max() > 1e-3


def test_every_layer_and_module_drops_other_inputs(base):
  """With all kernels zero, only one adapter's product is left to look at."""
  ones = lambda shape: jnp.ones(shape, jnp.float32)
  lora = adapters.Lora(ones((2, 16, 1)), ones((2, 1, 16)), 1.0, 0.5)
  module = decoder.stack_layers(Two, 2, False, ())()
  adapter = {"one": {"lora": lora}, "two": {"lora": lora}}
  zeros = {name: {"kernel": jnp.zeros((2, 16, 16))} for name in adapter}
  _, (one, two) = module.apply(
    {"params": zeros, "adapter": adapter},
    jnp.ones((1, 30, 16)),
    rngs={"dropout": jax.random.key(0)},
  )
  counts = [np.asarray(y[..., 0]).ravel() for y in (*one, *two)]
  for i, left in enumerate(counts):
    for right in counts[:i]:
      assert not np.array_equal(left, right)


class Two(nn.Module):
  """Two adapted matrices that read the same."""

  @nn.compact
  def __call__(self, x):
    make = lambda name: layers.Linear(16, use_bias=False, name=name)(x)
    return x, (make("one"), make("two"))


@pytest.mark.parametrize("targets", [adapters.QUERY_VALUE, "^layers/"])
def test_merged_weights_act_as_the_adapter(base, targets):
  adapter = make(jax.random.key(2), base, targets)
  merged = adapters.merge_lora(base, adapter)
  assert jax.tree.structure(merged) == jax.tree.structure(base)
  apart = logits(base, adapter)
  np.testing.assert_allclose(logits(merged, {}), apart, atol=1e-4)
  assert np.abs(apart - logits(base, {})).max() > 1e-2
  changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), base, merged)
  assert sum(jax.tree.leaves(changed)) == len(jax.tree.leaves(adapter)) // 2


def test_a_batch_of_adapters_acts_one_by_one(base):
  each = [make(jax.random.key(seed), base) for seed in range(3)]
  batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
  together = jax.jit(jax.vmap(logits, (None, 0)))(base, batch)
  for adapter, actual in zip(each, together):
    np.testing.assert_allclose(actual, logits(base, adapter), atol=1e-5)


def test_gradient_has_the_adapter_s_leaves_only(base):
  adapter = adapters.init_lora(jax.random.key(1), base, rank=3, alpha=6.0)
  gradient = jax.jit(jax.grad(lambda p: logits(base, p)[0, -1, 5]))(adapter)
  assert jax.tree.structure(gradient) == jax.tree.structure(adapter)
  query = gradient["layers"]["attention"]["query"]["lora"]
  assert np.abs(query.b).max() > 0  # B moves first,
  assert np.abs(query.a).max() == 0  # A only once B is not zero


def test_bfloat16_weights_keep_a_float32_adapter(base):
  adapter = make(jax.random.key(2), base)
  small = jax.tree.map(lambda w: w.astype(jnp.bfloat16), base)
  actual, exact = logits(small, adapter), logits(base, adapter)
  assert np.abs(actual - exact).mean() < 0.05 * np.std(exact)
  kernel = adapters.merge_lora(small, adapter)["layers"]["attention"]["query"]
  assert kernel["kernel"].dtype == jnp.bfloat16


def test_mistakes_are_named(base):
  with pytest.raises(errors.UserError, match="rank is 0"):
    adapters.init_lora(jax.random.key(1), base, rank=0, alpha=1.0)
  with pytest.raises(errors.UserError, match=r"dropout is 1\.0"):
    adapters.init_lora(jax.random.key(1), base, rank=1, alpha=1.0, dropout=1.0)
  with pytest.raises(errors.UserError, match=r"'q_proj'.*attention/query"):
    adapters.init_lora(
      jax.random.key(1), base, rank=1, alpha=1.0, targets="q_proj"
    )
