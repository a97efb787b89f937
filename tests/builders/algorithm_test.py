"""What a config can ask for: every choice of an algorithm and of a loss."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zofo_jax import adapters, errors
from zofo_jax.builders import algorithm as algorithm_lib
from zofo_jax.builders import base_update, data, encoder, model
from zofo_jax.builders import run as run_lib
from zofo_jax.config import defaults, validate
from zofo_jax.core import perturbed, zo
from zofo_jax.core.types import BilevelBatch, BilevelHParams
from zofo_jax.training import train


def choices(name):
  return defaults.FIELDS[name].check.choices


def test_estimators_are_those_of_configs_and_of_the_public_module():
  assert tuple(base_update.ESTIMATORS) == choices("zo.estimator")
  line, eps = lambda t: (t**2, ()), jnp.float32(0.1)
  for name, estimator in base_update.ESTIMATORS.items():
    assert getattr(zo, name) is estimator
    values = estimator.derivative(line, eps, line(0.0 * eps)).values
    assert (len(values) == 1) == (name in validate.ONE_POINT)


@pytest.mark.parametrize(
  "schedule, expected", [("constant", [4.0] * 3), ("linear", [1.0, 2.0, 4.0])]
)
def test_numbers_of_an_iteration(schedule, expected):
  hparams_fn = algorithm_lib.make_hparams_fn(
    eps=1e-3, penalty=4.0, penalty_schedule=schedule, num_steps=4
  )
  numbers = [hparams_fn(i) for i in (0, 1, 3)]
  assert [one.penalty for one in numbers] == expected
  assert {one.zo_eps for one in numbers} == {1e-3}


# Every optimizer with every kind, and each pair with the next estimator.
PAIRS = itertools.product(choices("zo.direction"), choices("zo.optimizer"))


@pytest.mark.parametrize(
  "direction, optimizer, estimator",
  [
    (*pair, estimator)
    for pair, estimator in zip(
      PAIRS, itertools.cycle(choices("zo.estimator")), strict=False
    )
  ],
)
def test_every_choice_takes_a_step(direction, optimizer, estimator):
  config = defaults.base_config()
  config.zo.direction = direction
  config.zo.estimator = estimator
  config.zo.optimizer = optimizer
  if optimizer in defaults.OPTIMIZERS:
    config.lower.optimizer = config.upper.optimizer = optimizer

  def loss_fn(base, adapter, batch, key):
    out = perturbed.dot(batch, base["kernel"])
    return jnp.mean((out + adapters.lora_product(batch, adapter["lora"])) ** 2)

  if (direction, optimizer) == ("per_example", "conservative"):
    with pytest.raises(errors.UserError, match="one direction"):
      validate.check(config)
    return
  update = base_update.make_base_update(config)
  algorithm = algorithm_lib.make_algorithm(config, update, loss_fn)
  x = jnp.ones((3, 4))
  lora = adapters.Lora(jnp.ones((4, 1)), jnp.ones((1, 2)), scale=1.0)
  state = jax.eval_shape(
    algorithm.init,
    jax.random.key(0),
    {"kernel": jnp.ones((4, 2))},
    {"lora": lora},
  )
  batch = BilevelBatch(lower=x[None], penalty=x, upper=x)
  after, info = jax.eval_shape(
    algorithm.step, state, batch, BilevelHParams(penalty=1.0)
  )
  assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
  assert info.upper_loss.shape == ()
  trees = {"momentum": 1, "adam": 2, "adamw": 2}.get(optimizer, 0)
  held = sum(leaf.shape == (4, 2) for leaf in jax.tree.leaves(after.base_opt))
  assert held == trees


@pytest.mark.parametrize(
  "loss, dtype, rtol",
  [("likelihood", "float32", 1e-5), ("classification", "bfloat16", 0.02)],
)
def test_losses_of_a_model(tiny_model, tiny_rows, loss, dtype, rtol):
  config = defaults.base_config()
  config.model.name = str(tiny_model)
  config.model.dtype = dtype
  config.data.dir = str(tiny_rows)
  config.data.task = "rotten_tomatoes"
  config.data.num_selection = config.data.num_test = 8
  config.mesh.data = 1
  run = run_lib.make_run(config)

  def first_batch(config):
    examples = data.load_examples(
      run.task, run.row_source, encoder.make_encoder(config, run.model)
    )
    shape = data.train_shape(examples)
    return train.iteration_batch(config, examples, shape, run.model.pad, 0)

  config.loss = "classification"  # the same rows, with every option
  scored = first_batch(config).upper
  config.loss = loss
  batch = first_batch(config)

  before = run.abstract_state()
  after, info = jax.eval_shape(
    run_lib.make_run(config).algorithm.step,
    before,
    batch,
    BilevelHParams(),
  )
  assert info.lower_loss.shape == (config.lower.num_steps,)
  kinds = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (before, after))
  assert kinds[0] == kinds[1]

  # Every option is one token, so that its score is its log-probability.
  base = model.load_base(run.model)
  loss_fn = model.make_loss_fn(loss, run.model.module)
  value = jax.jit(loss_fn)(base, {}, batch.upper, None)
  scores = np.asarray(run.score_fn(base, {}, scored), np.float64)
  if loss == "classification":
    scores = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
  picked = scores[np.arange(len(scores)), scored.label]
  np.testing.assert_allclose(value, -picked.mean(), rtol=rtol)
