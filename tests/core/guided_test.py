"""Steps along what an adapter has learned: exact, at the best length."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zofo_jax as zofo
from zofo_jax import adapters
from zofo_jax.core import factors as factors_lib
from zofo_jax.core import guided
from zofo_jax.models import decoder, transformer

MODEL = transformer.Transformer(transformer.Config(96, 16, 24, 2, 4, 2, 4))
TOKENS = jnp.arange(14, dtype=jnp.int32).reshape(2, 7) + 4
MASK = jnp.ones((2, 7), bool)
TARGETS = r"attention/(query|value)$|mlp/"


@jax.jit
def logits(base, adapter):
  variables = {"params": base, "adapter": adapter}
  return MODEL.apply(variables, TOKENS, MASK, method="logits")


def random_adapter(base, seed):
  adapter = adapters.init_lora(
    jax.random.key(seed), base, rank=2, alpha=4.0, targets=TARGETS
  )
  leaves, structure = jax.tree.flatten(adapter)
  keys = jax.random.split(jax.random.key(seed + 100), len(leaves))
  return jax.tree.unflatten(
    structure,
    [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)],
  )


@pytest.fixture(scope="module")
def trees():
  """Returns theta, s_0 and s_T."""
  init = jax.jit(lambda key: MODEL.init(key, TOKENS, MASK, method="logits"))
  base = init(jax.random.key(0))["params"]
  base = jax.tree.map(lambda w: w * 10.0 if w.ndim > 2 else w, base)
  before = random_adapter(base, 0)
  change = jax.tree.map(lambda x: 0.1 * x, random_adapter(base, 1))
  return base, before, jax.tree.map(jnp.add, before, change)


def guide_of(rule=None, **options):
  rule = rule or guided.constant()
  return guided.Guide(
    adapters.fold_lora, rule, stacked=decoder.STACKED, **options
  )


def lengths_of(adapter, seed=0):
  ones = guide_of(per_matrix=True).unit_lengths(adapter)
  rng = np.random.default_rng(seed)
  return {
    name: jnp.asarray(rng.uniform(0.0, 1.5, one.shape), jnp.float32)
    for name, one in ones.items()
  }


def moved_factors(before, after, lengths):
  back = guided.retreat(before, after, lengths)
  fold = adapters.fold_lora
  return factors_lib.difference(fold(after), fold(back)), back


def dense(base, factors, sign=1.0):
  """Adds the products to the weights, by NumPy in float64."""
  base = jax.tree.map(lambda w: np.asarray(w, np.float64), base)
  for path, (left, right) in factors.items():
    *modules, name = path.split("/")
    node = functools.reduce(lambda tree, key: tree[key], modules, base)
    left, right = (np.asarray(x, np.float64) for x in (left, right))
    node[name] = node[name] + sign * left @ right
  return jax.tree.map(lambda w: w.astype(np.float32), base)


def test_a_length_for_each_matrix_and_layer(trees):
  before = trees[1]
  lengths = guide_of(per_matrix=True).unit_lengths(before)
  modules = {
    path.removesuffix("/kernel") for path in adapters.fold_lora(before)
  }
  assert {name.removesuffix("/lora") for name in lengths} == modules
  assert {one.shape for one in lengths.values()} == {(2,)}  # layers
  assert guide_of().unit_lengths(before).shape == ()


def test_the_product_path_equals_folded_matrices(trees):
  base, before, after = trees
  factors, _ = moved_factors(before, after, lengths_of(after))
  lazy = logits(factors_lib.displace(base, factors), {})
  np.testing.assert_allclose(lazy, logits(dense(base, factors), {}), atol=2e-6)
  # By LoRA's own way of merging.
  factors, back = moved_factors(before, after, jnp.float32(1.0))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), back, before
  )
  merged = adapters.merge_lora(base, after)
  unmerged = dense(merged, adapters.fold_lora(before), sign=-1.0)
  lazy = logits(factors_lib.displace(base, factors), {})
  np.testing.assert_allclose(lazy, logits(unmerged, {}), atol=2e-6)


@pytest.mark.parametrize("length", [0.0, 0.25, 1.0, "each"])
def test_theta_takes_what_s_gives_up(trees, length):
  base, before, after = trees
  lengths = lengths_of(after) if length == "each" else jnp.float32(length)
  factors, back = moved_factors(before, after, lengths)
  moved = factors_lib.add_in_place(base, factors, jax.random.key(0))
  expected = logits(base, after)
  np.testing.assert_allclose(logits(moved, back), expected, atol=5e-6)
  # Which is no small thing: s alone does change.
  if length:
    assert np.abs(logits(base, back) - expected).max() > 1e-2


def test_writes_in_bfloat16_are_exact_on_average(trees):
  base, before, after = trees
  half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), base)
  factors, _ = moved_factors(before, after, jnp.float32(0.01))
  expected = dense(half, factors)
  write = jax.jit(factors_lib.add_in_place)
  total = jax.tree.map(jnp.zeros_like, base)
  for seed in range(64):
    moved = write(half, factors, jax.random.key(seed))
    assert all(w.dtype == jnp.bfloat16 for w in jax.tree.leaves(moved))
    total = jax.tree.map(lambda t, w: t + w / 64, total, moved)
  kernel = lambda tree: np.asarray(
    tree["layers"]["attention"]["query"]["kernel"], np.float32
  )
  step = kernel(expected) - kernel(half)
  taken = kernel(total) - kernel(half)
  slope = np.sum(taken * step) / np.sum(step * step)
  assert slope == pytest.approx(1.0, abs=0.1)
  jax.tree.map(np.testing.assert_array_equal, moved["embed"], half["embed"])


def test_factors_that_fit_nowhere(trees):
  base, before, after = trees
  factors, _ = moved_factors(before, after, jnp.float32(1.0))
  with pytest.raises(ValueError, match="the backbone has no 'other/kernel'"):
    factors_lib.displace(base, {"other/kernel": next(iter(factors.values()))})
  path = "layers/attention/query/kernel"
  left, right = factors[path]
  wrong = {path: factors_lib.Factors(left, right[..., :-1])}
  with pytest.raises(ValueError, match="the factors' product has"):
    factors_lib.add_in_place(base, wrong, jax.random.key(0))


def test_the_estimate_is_the_projected_gradient(trees):
  """d L(theta(eta)) / d eta_m = <grad L, d theta_m / d eta_m>."""
  base, before, after = trees
  weights = jax.random.normal(jax.random.key(5), (2, 7, 96))
  loss = lambda base: jnp.mean(logits(base, {}) * weights)
  lengths = jax.tree.map(jnp.zeros_like, lengths_of(after))

  def objective(lengths):
    return loss(
      factors_lib.displace(base, moved_factors(before, after, lengths)[0])
    )

  gradient = jax.grad(loss)(base)
  # At eta = 0 theta moves along dA B_T + A_T dB, B and A those of s_T.
  fold = adapters.fold_lora
  start, end = fold(before), fold(after)
  for exact in (zofo.zo.exact, zofo.zo.central):
    zo = zofo.ZerothOrder(
      zofo.directions.Rademacher(), estimator=exact, num_directions=4
    )
    estimate = zofo.zo.estimate(objective, lengths, jax.random.key(1), 1e-2, zo)
    for q in range(4):
      key = zofo.keys.DirectionKey(
        estimate.keys.direction[q], estimate.keys.subspace
      )
      xi = zo.sampler.perturb(lengths, key, 1.0)
      slope = 0.0
      for path, (left, right) in end.items():
        module = path.removesuffix("/kernel")
        tangent = (left - start[path].left) @ right + left @ (
          right - start[path].right
        )
        node = functools.reduce(lambda t, k: t[k], path.split("/"), gradient)
        each = jnp.sum(node * tangent, axis=(1, 2))
        slope += jnp.sum(xi[f"{module}/lora"] * each)
      np.testing.assert_allclose(
        estimate.coefficients[q], slope, rtol=2e-3, atol=1e-5
      )


@pytest.mark.parametrize("per_task", [False, True], ids=["shared", "own"])
def test_tasks_give_their_shares(trees, per_task):
  base = trees[0]
  starts = [random_adapter(base, seed) for seed in (2, 3, 4)]
  ends = [
    jax.tree.map(lambda x, d: x + 0.1 * d, start, random_adapter(base, seed))
    for seed, start in zip((5, 6, 7), starts, strict=True)
  ]
  stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
  shares = jnp.array([0.5, 0.3, 0.2])
  rule, lengths = guided.constant(0.7), [0.7, 0.7, 0.7]
  if per_task:
    lengths = [0.7, 0.2, 1.0]

    def choose(objective, units, key):
      chosen = guided.constant().choose(objective, units, key)
      return chosen._replace(lengths=jnp.array(lengths) * units)

    rule = guided.Rule(choose, num_updates=0, evaluations=0)
  followed = guided.follow(
    guide_of(rule, per_task=per_task),
    lambda base, index: jnp.float32(0.0),
    base,
    stack(starts),
    stack(ends),
    jax.random.key(0),
    allowed=jnp.array(True),
    shares=shares,
  )
  expected = base
  for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
    factors, back = moved_factors(start, end, lengths[i] * shares[i])
    expected = dense(expected, factors)
    jax.tree.map(
      lambda stacked, one, i=i: np.testing.assert_allclose(
        stacked[i], one, atol=1e-6
      ),
      followed.lower,
      back,
    )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6),
    followed.base,
    expected,
  )


def toy_loss(base, adapter, batch, key):
  del key
  out = batch["x"] @ (base["w"] + adapter["a"] @ adapter["b"])
  return jnp.mean((out - batch["y"]) ** 2)


def toy_fold(adapter):
  return {"w": factors_lib.Factors(adapter["a"], adapter["b"])}


def toy(num_tasks=None, updates=3, rows=8):
  rng = np.random.default_rng(0)
  lead = () if num_tasks is None else (num_tasks,)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  adapter = lambda: {"a": draw(*lead, 6, 2), "b": draw(*lead, 2, 4)}

  def batch(*more):
    return {"x": draw(*lead, *more, rows, 6), "y": draw(*lead, *more, rows, 4)}

  base = {"w": draw(6, 4), "bias": draw(4)}
  batches = zofo.BilevelBatch(
    lower=batch(5), penalty=batch(), upper=batch(), probe=batch(updates)
  )
  return base, adapter(), adapter(), batches


ESTIMATE = zofo.ZerothOrder(zofo.directions.Rademacher(), num_directions=2)
RULES = {
  "all": guided.constant(),
  "parabola": guided.parabola(),
  "descend": guided.descend(ESTIMATE, num_updates=3),
}


def toy_step(guide, **options):
  tx = optax.adam(1e-2)
  return zofo.make_bilevel_step(
    toy_loss,
    lower_tx=tx,
    upper_tx=tx,
    base_tx=zofo.outer.sgd(1e-2),
    guide=guide,
    **options,
  )


def slow_steps(base, s, opt, rows):
  for t in range(5):
    grads = jax.grad(toy_loss, argnums=1)(
      base, s, jax.tree.map(lambda leaf, t=t: leaf[t], rows), None
    )
    updates, opt = optax.adam(1e-2).update(grads, opt)
    s = optax.apply_updates(s, updates)
  return s, opt


@pytest.mark.parametrize("penalty", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_a_step_is_its_slow_transcription(rule, penalty):
  base, upper, lower, batch = toy()
  guide = guided.Guide(toy_fold, RULES[rule], penalty=penalty)
  algorithm = toy_step(guide)
  state = algorithm.init(jax.random.key(3), base, upper, lower)
  hparams = zofo.BilevelHParams(penalty=0.5)
  new, info = jax.jit(algorithm.step)(state, batch, hparams)

  s, _ = slow_steps(base, lower, optax.adam(1e-2).init(lower), batch.lower)

  def moved(length):
    back = jax.tree.map(lambda a, b: b - length * (b - a), lower, s)
    w = base["w"] + s["a"] @ s["b"] - back["a"] @ back["b"]
    return {**base, "w": w}, back

  def objective(length, index):
    rows = jax.tree.map(lambda leaf: leaf[index], batch.probe)
    theta, _ = moved(length)
    value = toy_loss(theta, upper, rows, None)
    return value + penalty * 0.5 * toy_loss(theta, upper, batch.penalty, None)

  if rule == "all":
    length = 1.0
  elif rule == "parabola":
    points = np.array([0.0, 0.5, 1.0])
    values = [float(objective(x, 0)) for x in points]
    square, linear, _ = np.polyfit(points, values, 2)
    best = -linear / (2 * square) if square > 0 else points[np.argmin(values)]
    length = float(np.clip(best, 0.0, 1.0))
  else:  # one length: every estimate is a sign, with a step of 0.3
    length = 1.0
    for index in range(3):
      up, down = (
        objective(length + 0.25, index),
        objective(length - 0.25, index),
      )
      length = float(np.clip(length - 0.3 * np.sign(up - down), 0.0, 2.0))
  np.testing.assert_allclose(info.lengths, length, atol=2e-3)
  theta, back = moved(length)
  close = functools.partial(np.testing.assert_allclose, atol=2e-3)
  jax.tree.map(close, new.base, theta)
  jax.tree.map(close, new.lower, back)
  # p takes its own step, whatever theta does.
  still, _ = jax.jit(toy_step(None).step)(state, batch, hparams)
  jax.tree.map(np.testing.assert_array_equal, new.upper, still.upper)
  assert info.coefficients.shape == (0,) and info.move is None


def test_theta_moves_along_random_directions_as_well():
  base, upper, lower, batch = toy()
  both = guided.Guide(toy_fold, random=True)
  states = {}
  for name, guide in (("both", both), ("random", None)):
    algorithm = toy_step(guide)
    state = algorithm.init(jax.random.key(3), base, upper, lower)
    states[name], info = jax.jit(algorithm.step)(state, batch)
    assert info.coefficients.shape == (1,)
  random, both = states["random"], states["both"]
  expected = random.base["w"] + (
    random.lower["a"] @ random.lower["b"] - lower["a"] @ lower["b"]
  )
  np.testing.assert_allclose(both.base["w"], expected, atol=1e-5)
  np.testing.assert_array_equal(both.base["bias"], random.base["bias"])


def test_one_task_is_the_step_without_the_axis():
  base, upper, lower, batch = toy()
  guide = guided.Guide(toy_fold, RULES["descend"])
  add_axis = lambda tree: jax.tree.map(lambda leaf: leaf[None], tree)
  results = []
  for over_tasks in (False, True):
    lift = add_axis if over_tasks else (lambda tree: tree)
    algorithm = toy_step(guide, over_tasks=over_tasks)
    state = algorithm.init(jax.random.key(3), base, lift(upper), lift(lower))
    new, info = jax.jit(algorithm.step)(state, lift(batch))
    results.append((new.base, new.lower, info.lengths))
  single, tasks = results
  np.testing.assert_allclose(single[2], tasks[2], atol=1e-6)
  close = functools.partial(np.testing.assert_allclose, atol=1e-6)
  jax.tree.map(close, single[0], tasks[0])
  jax.tree.map(lambda a, b: close(a, b[0]), single[1], tasks[1])


def test_a_step_that_is_not_finite_moves_neither_theta_nor_s():
  base, upper, lower, batch = toy()
  broken = jax.tree.map(lambda leaf: leaf * jnp.nan, batch.upper)
  algorithm = toy_step(guided.Guide(toy_fold, RULES["parabola"]))
  state = algorithm.init(jax.random.key(3), base, upper, lower)
  step = jax.jit(algorithm.step)
  new, info = step(state, batch._replace(upper=broken))
  jax.tree.map(np.testing.assert_array_equal, new.base, base)
  jax.tree.map(np.testing.assert_array_equal, new.upper, upper)
  assert float(info.lengths) == 0.0
  # Nor do rows of the probe that are not.
  probe = jax.tree.map(lambda leaf: leaf * jnp.nan, batch.probe)
  new, info = step(state, batch._replace(probe=probe))
  jax.tree.map(np.testing.assert_array_equal, new.base, base)
  assert float(info.lengths) == 0.0 and int(info.num_nonfinite) == 3


def given(lengths):
  """Returns the rule of these lengths; its value is the objective at them."""

  def choose(objective, units, key):
    del key
    assert jax.tree.structure(units) == jax.tree.structure(lengths)
    value = objective(lengths, 0)[None]
    return guided.ChosenLengths(lengths, value, jnp.zeros([], jnp.int32))

  return guided.Rule(choose, num_updates=1, evaluations=1)


def product(adapter):
  return adapter["a"] @ adapter["b"]


def test_steps_with_a_history_are_their_slow_transcription():
  theta, upper, s, batch = toy(updates=1)
  lengths = (jnp.float32(0.7), jnp.array([-0.4]))
  guide = guided.Guide(toy_fold, given(lengths), penalty=False, history=2)
  algorithm = toy_step(guide)
  state = algorithm.init(jax.random.key(3), theta, upper, s)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.history))
  step = jax.jit(algorithm.step)
  opt, last = optax.adam(1e-2).init(s), None
  rows = jax.tree.map(lambda leaf: leaf[0], batch.probe)
  for _ in range(3):
    start = s
    end, opt = slow_steps(theta, start, opt, batch.lower)
    s = jax.tree.map(lambda a, b: b - 0.7 * (b - a), start, end)
    moved = theta["w"] + product(end) - product(s)
    if last is not None:
      moved = moved - 0.4 * last
    theta = {**theta, "w": moved}
    value = toy_loss(theta, state.upper, rows, None)
    state, info = step(state, batch)
    close = functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-5)
    jax.tree.map(close, state.base, theta)
    jax.tree.map(close, state.lower, s)
    close(info.objective, value)
    assert float(info.lengths) == np.float32(0.7)
    # A displacement of zero, before there is another, has a length of zero.
    assert float(info.earlier[0]) == np.float32(0.0 if last is None else -0.4)
    last = product(end) - product(start)
    left, right = state.history["w"]
    assert left.shape == (1, 6, 4) and right.shape == (1, 4, 4)  # of rank 2r
    close(left[0] @ right[0], last)


def test_a_history_is_that_of_steps_that_were_taken():
  base, upper, lower, batch = toy(updates=1)
  algorithm = toy_step(guided.Guide(toy_fold, RULES["descend"], history=3))
  state = algorithm.init(jax.random.key(3), base, upper, lower)
  step = jax.jit(algorithm.step)
  first, _ = step(state, batch._replace(probe=None))
  same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
  # Neither p's gradient nor a displacement of zero adds to it.
  broken = jax.tree.map(lambda leaf: leaf * jnp.nan, batch)._replace(probe=None)
  for rows in (broken, batch._replace(lower=broken.lower, probe=None)):
    state, info = step(first, rows)
    same(state.history, first.history)
  state, info = step(first, broken)
  same(state.base, first.base)
  assert not np.any(info.earlier)
  state, info = step(first, batch._replace(probe=None))
  assert info.earlier[0] and not info.earlier[1]
  pair = state.history["w"]
  same(pair.left[1], first.history["w"].left[0])


def test_the_estimate_on_a_span_is_the_projected_gradient():
  base, upper, start, batch = toy(updates=1)
  end = jax.tree.map(lambda a, b: 0.8 * a + 0.2 * b, start, upper)
  rows = jax.tree.map(lambda leaf: leaf[0], batch.probe)
  rng = np.random.default_rng(1)
  pair = factors_lib.Factors(
    rng.normal(size=(2, 6, 4)), rng.normal(size=(2, 4, 4))
  )

  def choose(objective, units, key):
    of = lambda lengths: objective(lengths, 0)
    estimate = zofo.zo.estimate(of, units, key, 1e-3, zo)
    return guided.ChosenLengths(units, estimate, estimate.num_nonfinite)

  zo = zofo.ZerothOrder(
    zofo.directions.Gaussian(), estimator=zofo.zo.exact, num_directions=4
  )
  guide = guided.Guide(toy_fold, guided.Rule(choose, 1, 4), history=3)

  @jax.jit
  def estimate_of(base, history):
    return guided.follow(
      guide,
      lambda theta, index: toy_loss(theta, upper, rows, None),
      *(base, start, end, jax.random.key(0)),
      allowed=jnp.array(True),
      history=history,
    ).values

  estimate = estimate_of(base, {"w": jax.tree.map(jnp.float32, pair)})
  # At lengths of 1 and 0; d W(s') / d eta is then that at s_0.
  change = jax.tree.map(jnp.subtract, end, start)
  span = [change["a"] @ start["b"] + start["a"] @ change["b"]]
  span += [pair.left[j] @ pair.right[j] for j in range(2)]
  moved = {**base, "w": base["w"] + product(end) - product(start)}
  gradient = jax.grad(toy_loss)(moved, upper, rows, None)["w"]
  slopes = np.array([np.sum(np.asarray(z) * gradient) for z in span])
  ones = (jnp.zeros([]), jnp.zeros([2]))
  for q in range(4):
    key = zofo.keys.DirectionKey(
      estimate.keys.direction[q], estimate.keys.subspace
    )
    xi = jax.tree.leaves(zo.sampler.perturb(ones, key, 1.0))
    expected = np.concatenate([np.ravel(x) for x in xi]) @ slopes
    np.testing.assert_allclose(estimate.coefficients[q], expected, rtol=1e-4)


def test_a_history_belongs_to_one_adapter():
  base, upper, lower, batch = toy(2)
  guide = guided.Guide(toy_fold, RULES["descend"], history=2)
  algorithm = toy_step(guide, over_tasks=True)
  state = algorithm.init(jax.random.key(3), base, upper, lower)
  with pytest.raises(ValueError, match=r"over tasks, .* expected 1"):
    jax.eval_shape(algorithm.step, state, batch)


@pytest.mark.many_devices
@pytest.mark.parametrize(
  "rule, history",
  [
    (guided.parabola(largest=9.0), 1),
    pytest.param(RULES["descend"], 3, marks=pytest.mark.slow),
  ],
  ids=["parabola", "history"],
)
def test_a_mesh_changes_nothing(rule, history):
  base, upper, lower, batch = toy(updates=rule.num_updates)
  guide = guided.Guide(
    toy_fold, rule, penalty=True, random=True, history=history
  )
  algorithm = toy_step(guide)
  mesh = jax.make_mesh((4, 2), ("data", "model"))

  def place(tree, *axes):
    spec = jax.sharding.PartitionSpec(*axes)
    return jax.device_put(tree, jax.NamedSharding(mesh, spec))

  step = jax.jit(algorithm.step)
  start = algorithm.init(jax.random.key(3), base, upper, lower)
  for _ in range(history - 1):
    start, _ = step(start, batch)
  expected, info = step(start, batch)
  sharded = {**start.base, "w": place(start.base["w"], None, "model")}
  start = place(start)._replace(base=sharded)
  rows = batch._replace(
    lower=place(batch.lower, None, "data"),
    penalty=place(batch.penalty, "data"),
    upper=place(batch.upper, "data"),
    probe=place(batch.probe, None, "data"),
  )
  actual, other = step(start, rows)
  close = functools.partial(np.testing.assert_allclose, atol=5e-5, rtol=1e-4)
  expected, actual = (
    state._replace(key=jax.random.key_data(state.key))
    for state in (expected, actual)
  )
  jax.tree.map(close, actual, expected)
  jax.tree.map(
    close, (other.lengths, other.earlier), (info.lengths, info.earlier)
  )
  assert 0 < info.lengths < 9


def test_moments_start_anew():
  base, upper, lower, batch = toy()
  algorithm = toy_step(guided.Guide(toy_fold, reset=True))
  state = algorithm.init(jax.random.key(3), base, upper, lower)
  new, _ = jax.jit(algorithm.step)(state, batch)
  adam = new.lower_opt[0]
  assert int(adam.count) == 5
  assert not any(np.any(leaf) for leaf in jax.tree.leaves((adam.mu, adam.nu)))
  assert any(np.any(leaf) for leaf in jax.tree.leaves(new.upper_opt[0].mu))
