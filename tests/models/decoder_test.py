"""Decoders of every family, against recorded and live logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.recorded import Waves, build, load
from tests.models.recorded import logits as logits_of
from tests.models.reference import make_logits as hf
from zofo_jax import errors, models
from zofo_jax.core import keys as keys_lib
from zofo_jax.core import perturbed, sampler
from zofo_jax.core import tree as tree_lib
from zofo_jax.models.decoder import STACKED
from zofo_jax.sharding import mesh as mesh_lib
from zofo_jax.sharding import rules

CASES = list(hf.CASES)


def recorded(name, **options):
  model, _, *rest = load(name, **options)
  return model, *rest


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_recorded_ones(name):
  model, base, tokens, mask, logits = recorded(name)
  actual = logits_of(model, base, tokens, mask)
  assert actual.dtype == jnp.float32
  np.testing.assert_allclose(actual[mask], logits[mask], atol=1e-4)


# Those of `hf.VARIANTS` with a branch of their own; the rest are other values.
BRANCHES = ["gpt2_unlike", "neox_serial", "qwen3_window", "smollm3_window"]
BRANCHES += ["phi3_partial", "gemma2_low_caps", "gemma3_types", "falcon_new"]
BRANCHES += ["falcon_serial", "starcoder2_window", "roberta_unlike"]


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
  "name",
  [
    *("llama", *BRANCHES),
    *(  # Those of CASES are recorded.
      pytest.param(name, marks=pytest.mark.slow)
      for name in (*CASES, *hf.VARIANTS)
      if name not in ("llama", *BRANCHES)
    ),
  ],
)
def test_logits_equal_those_of_transformers(name):
  pytest.importorskip("torch")
  fields = (hf.CASES | hf.VARIANTS)[name]
  config, tensors, tokens, mask, logits = hf.reference(fields, seed=1)
  model, _, base = build(config, tensors)
  actual = logits_of(model, base, tokens, mask)
  np.testing.assert_allclose(actual[mask], logits[mask], atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_all_named(name):
  model, family = models.from_hf(hf.load(name)[0])
  shapes = jax.eval_shape(
    lambda key: model.init(
      key, jnp.ones((1, 2), int), jnp.ones((1, 2), bool), method="logits"
    ),
    jax.random.key(0),
  )["params"]
  paths = jax.tree.leaves_with_path(shapes)
  names = {tree_lib.path_name(path) for path, _ in paths}
  assert names == set(family.hf_parameters(model.config))
  base = load(name).base
  assert jax.tree.map(jnp.shape, base) == jax.tree.map(jnp.shape, shapes)
  mesh = mesh_lib.abstract({"pert": 1, "data": 1, "fsdp": 2, "model": 2}, 4)
  for sharding in jax.tree.leaves(
    rules.shardings(mesh, shapes, family.SHARDINGS)
  ):
    assert sharding.mesh is mesh


@pytest.mark.parametrize(
  "name", ["llama_dynamic", "qwen2_window", "opt", "opt_350m"]
)
def test_both_paddings_are_one_and_empty_rows_are_finite(name):
  model, base, tokens, _, _ = recorded(name)
  real = tokens[:1, :9]
  pad = np.ones((1, 3), np.int32)
  rows = np.concatenate(
    [
      np.concatenate([pad, real], axis=1),
      np.concatenate([real, pad], axis=1),
      np.ones((1, 12), np.int32),
    ]
  )
  logits = logits_of(model, base, rows, rows != 1)
  np.testing.assert_allclose(logits[0, 3:], logits[1, :9], atol=1e-5)
  assert np.isfinite(logits).all()


@pytest.mark.parametrize("name", ["gpt2", "gemma3_text", "falcon"])
def test_a_cache_gives_the_same_logits(name):
  model, base, tokens, mask, logits = recorded(name)
  tokens, mask, start = tokens[:2], mask[:2], 8  # the second is padded left

  @jax.jit
  def continue_rows(base):
    variables = {"params": base}
    first, cache = model.apply(
      variables, tokens[:, :start], mask[:, :start], 4, method="prefill"
    )

    def step(cache, token):
      logits, cache = model.apply(variables, token, cache, method="decode")
      return cache, logits

    rest = jnp.asarray(tokens[:, start:].T)
    return first, jax.lax.scan(step, cache, rest)[1]

  first, rest = continue_rows(base)
  np.testing.assert_allclose(first, logits[:2, start - 1], atol=1e-4)
  np.testing.assert_allclose(
    jnp.swapaxes(rest, 0, 1), logits[:2, start:], atol=1e-4
  )


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_later_tokens_do_not_change_earlier_logits(name):
  model, base, tokens, _, _ = recorded(name)
  mask = np.ones_like(tokens, bool)
  changed = tokens.copy()
  changed[:, 7] = (changed[:, 7] + 1) % 96
  before = logits_of(model, base, tokens, mask)
  after = logits_of(model, base, changed, mask)
  np.testing.assert_array_equal(before[:, :7], after[:, :7])
  assert (np.abs(before - after)[:, 7:].max(axis=-1) > 1e-4).all()


def targets():
  positions = jnp.array([[3, 11], [8, 6], [0, 7]], jnp.int32)
  slot = jnp.array([[0, 1, 1], [1, 0, 0], [1, 1, 0]], jnp.int32)
  token = jnp.array([[5, 6, 7], [95, 4, 4], [50, 51, 52]], jnp.int32)
  return positions, slot, token


@pytest.mark.parametrize("name", ["llama_tied", "opt_350m", "gemma2", "bert"])
def test_target_log_probs_are_those_of_the_logits(name):
  model, base, tokens, mask, logits = recorded(name)
  positions, slot, token = targets()
  actual = jax.jit(model.apply)({"params": base}, tokens, mask, *targets())
  shifted = logits.astype(np.float64)
  log_probs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
  for row in range(3):
    for k in range(3):
      place = positions[row, slot[row, k]]
      expected = log_probs[row, place, token[row, k]]
      np.testing.assert_allclose(actual[row, k], expected, atol=1e-4)


@pytest.mark.parametrize("name", ["llama_biases", "opt_350m", "gemma2"])
def test_perturbed_weights_act_as_their_values(name):
  model, base, tokens, mask, _ = recorded(name)
  key = keys_lib.DirectionKey(jax.random.key(3), jax.random.key(4))
  lazy = sampler.Sampler(Waves(), stacked=STACKED, lazy=True)
  nodes = jax.jit(lambda base: lazy.perturb(base, key, 1.0))(base)

  def scaled(scale):
    step = lambda w: dataclasses.replace(w, scale=w.scale * scale)
    is_leaf = lambda w: isinstance(w, perturbed.Perturbed)
    return jax.tree.map(step, nodes, is_leaf=is_leaf)

  values = jax.jit(lambda scale: perturbed.materialize(scaled(scale)))
  score = lambda scale: logits_of(model, scaled(scale), tokens, mask)
  both = jax.jit(jax.vmap(score))(jnp.array([1e-2, -1e-2]))
  for scale, actual in zip((1e-2, -1e-2), both):
    whole = logits_of(model, values(scale), tokens, mask)
    np.testing.assert_allclose(actual, whole, atol=1e-4)
  assert np.abs(both[0] - both[1])[mask].max() > 1e-2


# Of each family one; the mean error is less than 2 % of the logits' spread.
BFLOAT16 = ["llama_llama3", "opt", "gemma2", "bert"]


@pytest.mark.parametrize(
  "name",
  [
    *BFLOAT16,
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in models.FAMILIES
      if name not in (*BFLOAT16, "llama")
    ),
  ],
)
def test_bfloat16_runs_and_is_near_float32(name):
  model, base, tokens, mask, logits = recorded(name)
  small = jax.tree.map(lambda w: w.astype(jnp.bfloat16), base)
  hidden = lambda base: model.apply(
    {"params": base}, tokens, mask, method="hidden"
  )
  assert jax.eval_shape(hidden, small).dtype == jnp.bfloat16
  actual = logits_of(model, small, tokens, mask)
  assert actual.dtype == jnp.float32
  spread = np.std(logits[mask])
  assert np.abs(actual[mask] - logits[mask]).mean() < 0.02 * spread


@pytest.mark.parametrize(
  "model_type, words",
  [
    ("olmo3", "mean 'olmo2'.*Read as olmo2: .*layer_types"),
    ("qwen3_moe", "is like qwen3 but has mixtures of experts in place of MLPs"),
    ("mixtral", "is like mistral but has mixtures of experts in place of MLPs"),
    ("gemma3", "is like gemma3_text but reads images as well"),
    ("bloom", "is like gpt2 but has ALiBi, .* in place of positions"),
    ("deberta-v2", "is like bert but attends by relative positions"),
    ("mamba2", "which is a state-space model"),
    ("xyz", "supported are opt, gpt2, gpt_neox, llama"),
  ],
)
def test_an_unknown_model_type_names_the_nearest(model_type, words):
  fields = hf.CASES["llama"] | {"model_type": model_type, "layer_types": ["a"]}
  with pytest.raises(errors.UserError, match=words):
    models.from_hf(fields)


@pytest.mark.parametrize(
  "fields, words",
  [
    (
      {"vision_config": {}, "text_config": {"model_type": "qwen3"}},
      "is like qwen3 but reads images as well",
    ),
    (
      {"model_type": "llama_moe", "num_local_experts": 8},
      "is like llama but has mixtures of experts",
    ),
    ({"model_type": "falcon", "alibi": True}, "alibi = True; Falcon is"),
    ({"model_type": "qwen3", "num_experts": 8}, "num_experts = 8"),
  ],
)
def test_images_experts_and_alibi_are_refused_by_their_fields(fields, words):
  with pytest.raises(errors.UserError, match=words):
    models.from_hf(hf.CASES["llama"] | {"model_type": "new"} | fields)


def test_remat_gives_the_same_gradients():
  gradients = []
  for remat in (False, True):
    model, base, tokens, mask, _ = recorded("mistral", remat=remat)

    def loss(base, model=model, tokens=tokens, mask=mask):
      return model.apply({"params": base}, tokens, mask, *targets()).mean()

    # Without it the products are kept, by a policy.
    assert ("policy=None" in str(jax.make_jaxpr(loss)(base))) is remat
    gradients.append(jax.jit(jax.grad(loss))(base))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *gradients
  )
