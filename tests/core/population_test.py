"""Estimates from scores that are computed outside, against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zofo_jax as zofo
from zofo_jax.core import factors, perturbed
from zofo_jax.evaluation import generation
from zofo_jax.sharding import dispatch, mesh

EPS = 0.1
AT_ONCE = functools.partial(jax.lax.map, batch_size=64)
SHAPINGS = {
  "none": zofo.population.unshaped,
  "ranks": zofo.population.centered_ranks,
  "z_score": zofo.population.z_scores,
}


def step_keys(step=0):
  return zofo.keys.step_keys(zofo.keys.seed_key(3), step)


def test_ranks_share_the_mean_of_ties():
  scores = jnp.array([[3.0, 1.0], [1.0, 7.0], [1.0, -2.0]])
  # Sorted: -2, 1, 1, 1, 3, 7.
  expected = np.array([[4, 2], [2, 5], [2, 0]]) / 5 - 0.5
  np.testing.assert_allclose(zofo.population.centered_ranks(scores), expected)


@pytest.mark.parametrize("name", SHAPINGS)
def test_equal_scores_move_nothing(name):
  # Their mean is not 0.1 in float32.
  scores = jnp.full((3, 2), 0.1)
  e = zofo.population.estimate(scores, step_keys(), EPS, SHAPINGS[name])
  assert e.coefficients.tolist() == [0, 0, 0] and e.num_nonfinite == 0


def test_z_scores_are_the_scores_over_their_deviation():
  scores = np.random.RandomState(0).normal(size=(4, 2)).astype(np.float32)
  shaped, plain = (
    zofo.population.estimate(scores, step_keys(), EPS, shaping).coefficients
    for shaping in (SHAPINGS["z_score"], SHAPINGS["none"])
  )
  np.testing.assert_allclose(shaped * scores.std(), plain, rtol=1e-5)


def test_pairs_that_are_not_finite_count_as_zero():
  scores = np.array([[1.0, 2.0], [np.nan, 5.0], [0.0, 4.0]])
  for shaping in SHAPINGS.values():
    e = zofo.population.estimate(scores, step_keys(), EPS, shaping)
    assert e.num_nonfinite == 1 and e.coefficients[1] == 0
    assert np.all(np.sign(e.coefficients[jnp.array([0, 2])]) == 1)


@pytest.mark.parametrize(
  "direction",
  [zofo.directions.Rademacher(), zofo.directions.LowRank(2)],
  ids=lambda kind: type(kind).__name__,
)
def test_members_are_both_sides_of_each_direction(direction):
  tree = {
    "layers": {"w": jnp.ones((2, 5, 3)), "b": jnp.zeros((2, 3))},
    "table": jnp.ones((7, 3)),
  }
  sampler = zofo.Sampler(direction, stacked="layers", lazy=True)
  zo = zofo.ZerothOrder(sampler, num_directions=3, map_fn=AT_ONCE)

  def write(tree, key):
    del key
    return perturbed.materialize(tree), perturbed.take(
      tree["table"], jnp.array([6, 0])
    )

  keys = step_keys()
  whole, rows = jax.jit(
    lambda tree: zofo.population.evaluate(write, tree, keys, EPS, zo)
  )(tree)
  e = zofo.population.estimate(jnp.zeros((3, 2)), keys, EPS)
  written_out = jax.jit(
    lambda weights: sampler.apply_directions(tree, e.keys, weights)
  )
  for q in range(3):
    for side, sign in enumerate((1, -1)):
      weights = jnp.zeros(3).at[q].set(sign * EPS)
      expected = written_out(weights)
      member = jax.tree.map(lambda leaf, at=(q, side): leaf[at], whole)
      jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-6),
        member,
        expected,
      )
      np.testing.assert_allclose(
        rows[q, side], expected["table"][jnp.array([6, 0])], atol=1e-6
      )


def test_low_rank_directions_are_drawn_once():
  """Factors take the place of keys: nothing is drawn where weights are read."""
  sampler = zofo.Sampler(zofo.directions.LowRank(2), stacked="w", lazy=True)
  tree = {"w": jnp.ones((2, 64, 48)), "v": jnp.ones(5)}
  key = zofo.keys.DirectionKey(*jax.random.split(jax.random.key(0)))
  nodes = sampler.perturb(tree, key, 1.0)
  drawn = factors.draw(nodes)
  assert drawn["w"].key.left.shape == (2, 2, 64)
  assert drawn["w"].key.right.shape == (2, 2, 48)
  read = str(jax.make_jaxpr(perturbed.materialize)(drawn))
  assert "uint32" not in read and "u32" not in read


@pytest.mark.parametrize("rank", [2, 12], ids=["fused", "a product"])
def test_products_with_drawn_factors(rank):
  sampler = zofo.Sampler(zofo.directions.LowRank(rank), lazy=True)
  key = zofo.keys.DirectionKey(*jax.random.split(jax.random.key(0)))
  node = factors.draw(sampler.perturb({"w": jnp.ones((24, 7))}, key, 0.5))["w"]
  whole = perturbed.read(node)
  assert np.ptp(whole) > 1
  draw = np.random.RandomState(0)
  x, y = (draw.normal(size=(2, 3, n)).astype(np.float32) for n in (24, 7))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  close(perturbed.dot(jnp.asarray(x), node), x @ whole)
  close(perturbed.dot_transposed(jnp.asarray(y), node), y @ whole.T)
  rows = jnp.array([[5, 0], [23, 5]])
  close(perturbed.take(node, rows), whole[rows])


def test_a_hidden_state_is_stored_once():
  """Two products read it; XLA would compute it for each, and keep its parts."""
  width, inside, rows, count, rank = 64, 512, 32, 8, 2
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, "float32")
  base = {
    "gate": shape(width, inside),
    "up": shape(width, inside),
    "down": shape(inside, width),
  }
  left = {k: shape(count, rank, w.shape[0]) for k, w in base.items()}
  right = {k: shape(rank, w.shape[1]) for k, w in base.items()}

  def layer(tree, x):
    gate = jax.nn.silu(perturbed.dot(x, tree["gate"]))
    inner = gate * perturbed.dot(x, tree["up"])
    return x + perturbed.dot(inner, tree["down"])

  def members(base, left, right, x):
    def member(left, scale, x):
      nodes = {}
      for name, value in base.items():
        key = factors.DrawnFactors(left[name], right[name])
        kind = factors._Drawn()
        nodes[name] = perturbed.Perturbed(value, key, scale, kind)
      return layer(nodes, x)

    pair = jax.vmap(member, (None, 0, 0))
    return jax.vmap(pair, (0, None, 0))(left, jnp.array([EPS, -EPS]), x)

  def temporaries(fn, *arguments):
    options = dispatch.compiler_options(mesh.make(dict.fromkeys(mesh.AXES, 1)))
    program = jax.jit(fn, compiler_options=options).lower(*arguments).compile()
    return program.memory_analysis().temp_size_in_bytes

  plain = temporaries(layer, base, shape(2 * count * rows, width))
  states = shape(count, 2, rows, width)
  extra = temporaries(members, base, left, right, states) - plain
  assert extra < 1.25 * (2 * count * rows * inside * 4)


# A categorical toy: theta are logits, token k is worth reward[k].

REWARD = np.array([0.0, 1.0, 3.0, -1.0], np.float32)
LOGITS = np.array([0.3, -0.2, 0.1, 0.5], np.float32)


def expected_gradient():
  p = np.exp(LOGITS) / np.exp(LOGITS).sum()
  return p * (REWARD - p @ REWARD)


@functools.cache
def toy_estimates():
  """Estimates of many steps, by each shaping; [shapings, steps, 4]."""
  zo = zofo.ZerothOrder(num_directions=8, map_fn=AT_ONCE)

  def write(logits, key):
    keys = jax.random.split(key, 16)
    return generation.choose(
      jnp.broadcast_to(logits, (16, 4)), keys, temperature=1.0
    )

  def estimates(step):
    keys = step_keys(step)
    answers = zofo.population.evaluate(
      write, jnp.asarray(LOGITS), keys, 0.3, zo
    )
    scores = jnp.mean(jnp.asarray(REWARD)[answers], axis=-1)
    return jnp.stack(
      [
        zofo.zo.gradient(
          jnp.asarray(LOGITS),
          zofo.population.estimate(scores, keys, 0.3, shaping),
        )
        for shaping in SHAPINGS.values()
      ]
    )

  return np.asarray(
    jax.jit(lambda steps: jax.lax.map(estimates, steps, batch_size=500))(
      jnp.arange(4000)
    )
  ).swapaxes(0, 1)


def test_the_estimate_is_unbiased():
  estimates = toy_estimates()[0]
  error = estimates.mean(axis=0) + expected_gradient()  # descent: minus
  deviation = estimates.std(axis=0) / len(estimates) ** 0.5
  assert np.all(np.abs(error) < 4 * deviation)
  assert np.all(deviation < 0.05 * np.linalg.norm(expected_gradient()))


@pytest.mark.parametrize("index", range(3), ids=SHAPINGS)
def test_shaped_estimates_have_the_gradient_s_direction(index):
  mean = -toy_estimates()[index].mean(axis=0)
  norms = np.linalg.norm(mean) * np.linalg.norm(expected_gradient())
  assert mean @ expected_gradient() > 0.99 * norms


def test_common_random_numbers_reduce_the_variance_as_computed():
  """Of two tokens, the second is drawn where a logistic number is below x."""
  rows, x, eps = 20_000, 0.4, 0.3
  zo = zofo.ZerothOrder(zofo.directions.Rademacher())

  def write(x, key):
    logits = jnp.broadcast_to(jnp.stack([jnp.zeros([]), x[0]]), (rows, 2))
    return generation.choose(
      logits, jax.random.split(key, rows), temperature=1.0
    )

  ((above, below),) = np.asarray(
    zofo.population.evaluate(write, jnp.array([x]), step_keys(), eps, zo)
  )
  high, low = 1 / (1 + np.exp(-x - eps)), 1 / (1 + np.exp(-x + eps))
  difference = np.abs(above - below)
  assert difference.mean() == pytest.approx(high - low, rel=0.05)
  shared = (high - low) * (1 - (high - low))
  assert difference.var() == pytest.approx(shared, rel=0.05)
  apart = high * (1 - high) + low * (1 - low)
  assert (above - below[::-1]).var() == pytest.approx(apart, rel=0.05)
  assert shared < 0.3 * apart


def test_mistakes_are_named():
  one_sided = zofo.ZerothOrder(estimator=zofo.zo.forward)
  with pytest.raises(ValueError, match=r"estimator zo\.central"):
    zofo.population.evaluate(
      lambda x, key: x, jnp.zeros(2), step_keys(), EPS, one_sided
    )
  with pytest.raises(ValueError, match=r"shape \[Q, 2\].*found \(4,\)"):
    zofo.population.estimate(jnp.zeros(4), step_keys(), EPS)
