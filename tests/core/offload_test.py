"""Weights in the host's memory: the same bits, and never all on the device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import SingleDeviceSharding

from zofo_jax.core import (
  bilevel,
  directions,
  es,
  factors,
  guided,
  mezo,
  offload,
  outer,
  perturbed,
  quantized,
  sampler,
  zeroth_order,
)
from zofo_jax.core.types import BilevelBatch

LAYERS, WIDTH = 5, 16
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, WIDTH)), jnp.float32)
SAMPLER = sampler.Sampler(
  directions.Rademacher(), stacked="(^|/)layers/", lazy=True
)


def on_host(tree):
  sharding = SingleDeviceSharding(
    jax.devices()[0], memory_kind=offload.MEMORY_KIND
  )
  return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding), tree)


def params(host=False, dtype=jnp.float32):
  kernel = np.random.default_rng(1).normal(size=(LAYERS, WIDTH, WIDTH))
  layers = {"kernel": jnp.asarray(kernel / 4, dtype)}
  if host:
    layers = on_host(layers)
  return {"layers": layers, "out": jnp.ones(WIDTH, dtype)}


def loss(base, adapter, batch, key=None):
  def layer(x, weights):
    kernel, down, up = weights
    change = ((x @ down) @ up).astype(x.dtype)
    return jnp.tanh(perturbed.dot(x, kernel) + change), None

  layers = (base["layers"]["kernel"], adapter["down"], adapter["up"])
  x, _ = jax.lax.scan(layer, batch.astype(base["out"].dtype), layers)
  return jnp.mean(
    (x @ perturbed.read(base["out"]) - 1).astype(jnp.float32) ** 2
  )


def adapter():
  down = np.random.default_rng(2).normal(size=(LAYERS, WIDTH, 1))
  return {
    "down": jnp.asarray(down, jnp.float32),
    "up": jnp.zeros((LAYERS, 1, WIDTH)),
  }


def assert_same_bits(actual, expected):
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)),
    actual,
    expected,
  )


def stays_on_host(base):
  kernel = base["layers"]["kernel"]
  return all(map(offload.is_on_host, jax.tree.leaves(kernel))) and (
    not offload.is_on_host(base["out"])
  )


def test_steps_of_mezo_have_the_bits_of_weights_on_the_device():
  algorithm = mezo.make_mezo_step(
    lambda params, batch: loss(params, adapter(), batch),
    outer.sgd(1e-2, weight_decay=0.1),
    zeroth_order.ZerothOrder(SAMPLER),
  )
  step = jax.jit(algorithm.step, donate_argnums=0)
  states = []
  for host in (False, True):
    state = algorithm.init(jax.random.key(0), params(host, jnp.bfloat16))
    for _ in range(2):
      state, info = step(state, X)
    states.append((state.params, info))
    assert stays_on_host(state.params) == host
  assert_same_bits(*states)
  assert np.any(
    np.asarray(states[1][0]["layers"]["kernel"], np.float32)
    != np.asarray(params(dtype=jnp.bfloat16)["layers"]["kernel"], np.float32)
  )


@pytest.mark.parametrize("kind", ["", "int8"])
def test_a_guided_iteration_has_the_bits_of_weights_on_the_device(kind):
  guide = guided.Guide(
    lambda s: {"layers/kernel": factors.Factors(s["down"], s["up"])},
    guided.constant(0.5),
    stacked="(^|/)layers/",
  )
  algorithm = bilevel.make_bilevel_step(
    loss,
    lower_tx=optax.adam(1e-2),
    upper_tx=optax.adam(1e-2),
    base_tx=outer.sgd(1e-2),
    guide=guide,
  )
  step = jax.jit(algorithm.step, donate_argnums=0)
  batch = BilevelBatch(lower=jnp.stack([X, -X]), penalty=X, upper=X + 1)
  results = []
  for host in (False, True):
    base = params(host)
    if kind:
      node = quantized.quantize(np.asarray(base["layers"]["kernel"]), kind)
      node = jax.tree.map(jnp.asarray, node)
      base["layers"]["kernel"] = on_host(node) if host else node
    before = np.asarray(jax.tree.leaves(base["layers"])[0])
    state = algorithm.init(jax.random.key(0), base, adapter())
    state, info = step(state, batch)
    results.append((state._replace(key=()), info))
    assert stays_on_host(state.base) == host
    assert np.any(
      before != np.asarray(jax.tree.leaves(state.base["layers"])[0])
    )
  assert_same_bits(*results)


@pytest.mark.parametrize("kind", quantized.KINDS)
def test_integers_may_be_on_the_host(kind):
  node = quantized.quantize(np.asarray(params()["layers"]["kernel"]), kind)
  node = jax.tree.map(jnp.asarray, node)
  read = jax.jit(
    lambda node: jax.lax.scan(
      lambda x, layer: (perturbed.dot(x, layer), None), X, node
    )[0]
  )
  assert_same_bits(read(on_host(node)), read(node))


def test_what_forgets_to_fetch_is_an_error():
  base = params(host=True)
  with pytest.raises(ValueError, match="memory"):
    jax.jit(lambda w, x: x @ w)(base["layers"]["kernel"][0], X)


def test_updates_that_wait_have_the_bits_of_those_written_at_once():
  zo = zeroth_order.ZerothOrder(
    dataclasses.replace(SAMPLER, layers=(1, 3)), num_directions=2
  )
  sgd = outer.sgd(1e-2, weight_decay=0.1)
  kernels = []
  for tx in (sgd, outer.write_every(3, sgd, num_directions=2)):
    algorithm = mezo.make_mezo_step(
      lambda params, batch: loss(params, adapter(), batch), tx, zo
    )
    step = jax.jit(algorithm.step, donate_argnums=0)
    flush = jax.jit(lambda *trees, tx=tx: tx.flush(*trees, zo.sampler))
    state = algorithm.init(jax.random.key(0), params(True, jnp.bfloat16))
    stored = []
    for _ in range(4):
      state, info = step(state, X)
      stored.append(np.asarray(state.params["layers"]["kernel"], np.float32))
    kernels.append([*stored, flush(state.params, state.opt_state)[0], info])
    assert stays_on_host(state.params)
  at_once, waited = kernels
  before = params(dtype=jnp.bfloat16)["layers"]["kernel"]
  for i in (0, 1):
    np.testing.assert_array_equal(waited[i], before)
    assert np.any(at_once[i] != waited[i])
  np.testing.assert_array_equal(waited[2], at_once[2])
  np.testing.assert_array_equal(waited[3], at_once[2])
  assert_same_bits(waited[4:], at_once[4:])


@pytest.mark.slow
def test_adapters_are_trained_on_weights_whose_updates_wait():
  batch = BilevelBatch(lower=X[None], penalty=X, upper=X + 1)
  results = []
  for tx in (outer.sgd(1.0), outer.write_every(2, outer.sgd(1.0))):
    algorithm = bilevel.make_bilevel_step(
      loss,
      lower_tx=optax.adam(1e-2),
      upper_tx=optax.adam(1e-2),
      base_tx=tx,
      zo=zeroth_order.ZerothOrder(SAMPLER),
    )
    step = jax.jit(algorithm.step, donate_argnums=0)
    state = algorithm.init(jax.random.key(0), params(host=True), adapter())
    for _ in range(2):
      state, info = step(state, batch)
    results.append(((state.base, state.upper, state.lower), info))
  assert_same_bits(*results)


def test_what_reads_the_weights_itself_is_refused():
  tx = outer.write_every(2, outer.sgd(1e-2))
  with pytest.raises(ValueError, match="the weights in every step"):
    es.make_es_step(lambda params, batch, key: 0.0, tx).update(None, None)
  with pytest.raises(ValueError, match="expected a transformation in place"):
    outer.write_every(2, outer.from_optax(optax.sgd(1e-2)))
  with pytest.raises(ValueError, match="num_steps=0; expected at least 1"):
    outer.write_every(0, outer.sgd(1e-2))
