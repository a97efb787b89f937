"""Steps by scores from outside, against steps by a loss inside."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zofo_jax as zofo

TARGET = np.arange(6, dtype=np.float32).reshape(2, 3)
HPARAMS = zofo.BilevelHParams(zo_eps=0.1)


def loss(params, batch):
  return jnp.mean((params["w"] - batch) ** 2)


@pytest.mark.parametrize("tx", [zofo.outer.sgd(0.1), optax.adam(0.1)])
def test_a_step_by_minus_the_loss_is_mezo_s(tx):
  zo = zofo.ZerothOrder(num_directions=3)
  es = zofo.make_es_step(lambda params, batch, key: loss(params, batch), tx, zo)
  mezo = zofo.make_mezo_step(loss, tx, zo)
  params = {"w": jnp.ones((2, 3))}
  states = [a.init(zofo.keys.seed_key(0), params) for a in (es, mezo)]
  for _ in range(2):
    values = jax.jit(es.evaluate)(states[0], TARGET, HPARAMS)
    by_scores, info = jax.jit(es.update)(
      states[0], -np.asarray(values), HPARAMS
    )
    by_loss, expected = jax.jit(mezo.step)(states[1], TARGET, HPARAMS)
    np.testing.assert_allclose(info.values, expected.values, rtol=1e-6)
    np.testing.assert_allclose(
      by_scores.params["w"], by_loss.params["w"], rtol=1e-4
    )
    states = [by_scores, by_loss]
  assert int(states[0].step) == 2


def test_an_update_that_evaluates_is_refused():
  es = zofo.make_es_step(
    lambda params, batch, key: params["w"], zofo.outer.conservative(0.1)
  )
  state = es.init(zofo.keys.seed_key(0), {"w": jnp.ones(3)})
  with pytest.raises(ValueError, match=r"outer\.conservative"):
    es.update(state, jnp.ones((1, 2)))


def test_the_bilevel_step_follows_scores_where_there_are_any():
  """p and s move as ever, theta by the scores."""

  def bilevel_loss(base, adapter, batch, key):
    del key
    return jnp.mean((base["w"] + adapter - batch) ** 2)

  algorithm = zofo.make_bilevel_step(
    bilevel_loss,
    lower_tx=optax.sgd(0.1),
    upper_tx=optax.sgd(0.1),
    base_tx=zofo.outer.sgd(1.0),
    shaping=zofo.population.z_scores,
  )
  key = zofo.keys.seed_key(0)
  state = algorithm.init(key, {"w": jnp.zeros(3)}, jnp.zeros(3))
  batch = zofo.BilevelBatch(
    lower=jnp.ones((2, 3)), penalty=jnp.ones(3), upper=jnp.ones(3)
  )
  step = jax.jit(algorithm.step)
  by_loss, _ = step(state, batch, HPARAMS)
  scores = np.array([[3.0, 1.0]])
  by_scores, info = step(state, batch._replace(scores=scores), HPARAMS)
  for name in ("upper", "lower"):
    np.testing.assert_array_equal(
      getattr(by_scores, name), getattr(by_loss, name)
    )
  # z-scores 1 and -1, over 2 eps; descent moves towards the first member.
  np.testing.assert_allclose(info.coefficients, [-10.0], rtol=1e-5)
  z = zofo.Sampler().apply_directions(
    {"w": jnp.zeros(3)},
    zofo.population.estimate(scores, zofo.keys.step_keys(key, 0), 0.1).keys,
    jnp.ones(1),
  )
  np.testing.assert_allclose(by_scores.base["w"], 10 * z["w"], rtol=1e-5)
