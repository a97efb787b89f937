"""Scores without a derivative, as what the step on theta measures."""

import collections
import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zofo_jax as zofo
from tests import tiny as tiny_files
from zofo_jax import errors
from zofo_jax.builders import data, encoder
from zofo_jax.builders import model as model_lib
from zofo_jax.builders import run as run_lib
from zofo_jax.builders import task as task_lib
from zofo_jax.core import losses
from zofo_jax.core import tree as tree_lib
from zofo_jax.data import batching
from zofo_jax.evaluation import objectives, user_function
from zofo_jax.models import apply
from zofo_jax.training import train


def exact(predicted, answer):
  """A score of one's own."""
  return float(predicted == answer)


@pytest.fixture(scope="module")
def tiny(tiny_model, tiny_rows):
  """Module, weights, tokenizer, a batch with every option, and none padded."""
  config = tiny_files.base_config()
  config.model.name = str(tiny_model)
  config.data.dir = str(tiny_rows)
  config.data.task = "rotten_tomatoes"
  config.loss = "classification"
  model = model_lib.load_model(**config.model)
  task = task_lib.load_task(config)
  examples = data.load_examples(
    task, data.make_row_source(config), encoder.make_encoder(config, model)
  ).lower[:6]
  batch = batching.collate(
    examples, batching.shape_of(examples), pad=model.pad, batch_size=8
  )
  base = model_lib.load_base(model)
  return model.module, base, model.tokenizer, batch


def batch_of(target_token, option, label):
  """A batch of one row an example that has targets only."""
  token = jnp.asarray(target_token)[:, None]
  empty = jnp.zeros(token.shape, jnp.int32)
  size = token.shape[0]
  return losses.Batch(
    tokens=empty,
    mask=empty > -1,
    positions=empty,
    target_slot=empty,
    target_token=token,
    target_option=jnp.asarray(option)[:, None],
    target_weight=jnp.ones(token.shape),
    label=jnp.asarray(label),
    option_mask=jnp.ones((size, 2), bool),
    example_weight=jnp.ones(size),
  )


def test_token_f1_is_that_of_bags():
  draw = np.random.RandomState(0)
  truth, guess = draw.randint(4, size=(2, 50, 6))
  option = draw.randint(2, size=(50, 6))
  option[:, 0] = 0
  actual = objectives.token_f1(
    jnp.asarray(guess)[:, None], batch_of(truth, option, np.zeros(50, int))
  )
  for n in range(50):
    bags = [
      collections.Counter(line[n][option[n] == 0].tolist())
      for line in (truth, guess)
    ]
    same = sum((bags[0] & bags[1]).values())
    assert actual[n] == pytest.approx(same / sum(bags[0].values()))


def test_accuracy_of_options(tiny):
  module, base, tokenizer, batch = tiny
  loss_fn = objectives.make_probe_loss_fn("accuracy", module, tokenizer)
  log_probs_fn = jax.jit(apply.make_log_probs_fn(module))
  log_probs = log_probs_fn(base, {}, batch, None)
  best = np.asarray(losses.option_scores(log_probs, batch)).argmax(-1)
  expected = np.mean(best[:6] != batch.label[:6])
  assert jax.jit(loss_fn)(base, {}, batch, None) == pytest.approx(expected)


def test_python_score_sees_what_the_model_would_write(tiny, monkeypatch):
  module, base, tokenizer, batch = tiny
  own_scores = types.ModuleType("own_scores")
  own_scores.exact = exact
  monkeypatch.setitem(sys.modules, "own_scores", own_scores)
  loss_fn = objectives.make_probe_loss_fn("own_scores:exact", module, tokenizer)
  logits = jax.jit(functools.partial(module.apply, method="logits"))(
    {"params": base, "adapter": {}}, batch.tokens[:, 0], batch.mask[:, 0]
  )
  last = batch.positions[:, 0, 0]
  best = np.asarray(logits).argmax(-1)[np.arange(8), last]
  right = np.where(
    batch.target_option[:, 0] == batch.label[:, None],
    batch.target_token[:, 0],
    0,
  ).sum(-1)
  expected = np.mean(best[:6] != right[:6])
  assert jax.jit(loss_fn)(base, {}, batch, None) == pytest.approx(expected)
  # Both signs and the three losses are batch axes of one call.
  twice = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), batch)
  both = jax.jit(jax.vmap(lambda b: loss_fn(base, {}, b, None)))(twice)
  np.testing.assert_allclose(both, [expected, expected], rtol=1e-6)


@pytest.mark.parametrize(
  "name, sentence",
  [
    ("no_such_module:score", "cannot import.*no_such_module"),
    (
      "zofo_jax.evaluation.metrics:token_f2",
      "module.*no function 'token_f2'.*mean 'token_f1'",
    ),
  ],
)
def test_scores_that_are_not_there(name, sentence):
  with pytest.raises(errors.UserError, match=f"zo.objective: {sentence}"):
    user_function.load(name, "config.zo.objective")


def test_step_measures_the_probe_s_loss_alone():
  """Theta follows the sign that it measures; p and s follow the loss."""

  def loss(base, adapter, batch, key):
    del key
    return jnp.mean((base["w"] + adapter - batch) ** 2)

  def steps(base, adapter, batch, key):
    del key, batch, adapter
    return jnp.sum(jnp.sign(base["w"] - 0.01))

  def run(probe_loss_fn):
    algorithm = zofo.make_bilevel_step(
      loss,
      probe_loss_fn=probe_loss_fn,
      lower_tx=optax.sgd(0.1),
      upper_tx=optax.sgd(0.1),
      base_tx=zofo.outer.sgd(1e-2),
    )
    state = algorithm.init(
      jax.random.key(0), {"w": jnp.zeros(4)}, jnp.zeros(4), jnp.zeros(4)
    )
    batch = zofo.BilevelBatch(
      lower=jnp.ones((3, 4)), penalty=jnp.ones(4), upper=jnp.ones(4)
    )
    hparams = zofo.BilevelHParams(zo_eps=0.5, penalty=10.0)
    return jax.jit(algorithm.step)(state, batch, hparams)

  usual, _ = run(None)
  other, info = run(steps)
  for name in ("upper", "lower"):
    np.testing.assert_array_equal(getattr(usual, name), getattr(other, name))
  assert np.any(usual.base["w"] != other.base["w"])
  # Penalty terms cancel: G is the probe's loss, whole numbers from -4 to 4.
  assert float(info.objective) * 2 == round(float(info.objective) * 2)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["accuracy", "operator:gt"])
def test_run_on_a_part_of_the_weights(tiny_model, tiny_rows, objective):
  """The config's objective moves the chosen layers' chosen weights alone."""
  config = tiny_files.base_config()
  config.model.name = str(tiny_model)
  config.data.dir = str(tiny_rows)
  config.data.task = "rotten_tomatoes"
  config.zo.objective = objective
  config.zo.select = "mlp/.*kernel|^head"
  config.zo.layers = (1,)
  config.zo.eps = 1.0  # far enough for some answer to change
  config.zo.learning_rate = 1e-2
  config.zo.num_directions = 4
  run = run_lib.make_run(config)
  examples = run.load_examples()
  before = model_lib.load_base(run.model)
  state, info = jax.jit(run.algorithm.step)(
    run.init(before),
    train.iteration_batch(
      config, examples, data.train_shape(examples), run.model.pad, 0
    ),
    zofo.BilevelHParams(zo_eps=config.zo.eps, penalty=1.0),
  )
  assert np.any(info.coefficients) and np.all(np.isfinite(info.coefficients))
  for path, old in jax.tree.leaves_with_path(before):
    name = tree_lib.path_name(path)
    new = functools.reduce(
      lambda tree, part: tree[part], name.split("/"), state.base
    )
    moved = np.asarray(old != new).reshape(len(old), -1).any(-1)
    if name.startswith("head"):
      assert moved.any(), name
    elif name.startswith("layers/mlp/"):
      assert moved.tolist() == [False, True], name
    else:
      assert not moved.any(), name
