"""Baselines, against transcriptions and as runs."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from zofo_jax import report
from zofo_jax.builders import run as run_lib
from zofo_jax.commands import evaluate
from zofo_jax.config import methods
from zofo_jax.core import (
  baselines,
  directions,
  outer,
  sampler,
)
from zofo_jax.core import keys as keys_lib
from zofo_jax.core.types import BilevelBatch, BilevelHParams
from zofo_jax.core.zeroth_order import ZerothOrder

LLAMA = pathlib.Path(__file__).parents[2] / "configs" / "llama.py"
D, ROWS, T = 5, 4, 3
HPARAMS = BilevelHParams(1e-2)
LR = 0.05


def _loss(base, adapter, batch, key):
  x, y = batch
  return jnp.mean(((x @ (base["w"] + adapter["a"])) @ base["v"] - y) ** 2)


def _start():
  draw = np.random.default_rng(0).normal
  base = {"w": draw(size=(D, 3)), "v": draw(size=3)}
  adapter = {"a": draw(size=(D, 3))}
  return jax.tree.map(
    lambda leaf: jnp.asarray(leaf, jnp.float32), (base, adapter)
  )


def _batch(seed=1):
  draw = np.random.default_rng(seed).normal
  make = lambda *lead: (
    jnp.asarray(draw(size=(*lead, D)), jnp.float32),
    jnp.asarray(draw(size=lead), jnp.float32),
  )
  return BilevelBatch(make(T, ROWS), (), make(ROWS))


def _close(actual, expected, rtol=1e-4):
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=rtol, atol=1e-5),
    actual,
    expected,
  )


def _mezo(whole):
  return baselines.make_zeroth_order_step(
    _loss,
    outer.sgd(LR),
    ZerothOrder(directions.Gaussian(), num_directions=2),
    train_base=whole,
  )


@pytest.mark.parametrize("whole", [True, False])
def test_mezo_is_its_algorithm(whole):
  algorithm, (base, adapter) = _mezo(whole), _start()
  state = algorithm.init(jax.random.key(7), base, adapter)
  batch = _batch()
  after, info = jax.jit(algorithm.step)(state, batch, HPARAMS)
  # z of each direction: what one unit of it adds to zeros.
  keys = keys_lib.step_keys(state.key, 0)
  both = keys_lib.direction_keys(keys.direction, keys.subspace, 2)
  moved = base if whole else adapter
  expected = moved
  draw = jax.jit(sampler.Sampler(directions.Gaussian()).perturb)
  for q in range(2):
    key = both._replace(direction=both.direction[q])
    zeros = jax.tree.map(jnp.zeros_like, moved)
    z = draw(zeros, key, 1.0)

    def at(sign, z=z):
      tree = jax.tree.map(lambda w, d: w + sign * 1e-2 * d, moved, z)
      pair = (tree, adapter) if whole else (base, tree)
      return float(_loss(*pair, batch.upper, None))

    slope = (at(1) - at(-1)) / 2e-2
    np.testing.assert_allclose(info.coefficients[q], slope, rtol=2e-3)
    expected = jax.tree.map(
      lambda w, d, c=slope: w - LR * c * d / 2, expected, z
    )
  _close(after.base if whole else after.upper, expected, 1e-3)
  still, before = (after.upper, adapter) if whole else (after.base, base)
  jax.tree.map(np.testing.assert_array_equal, still, before)
  assert (info.move is None) == (not whole)


@pytest.mark.parametrize("whole", [True, False])
def test_first_order_is_optax(whole):
  tx = optax.adam(LR)
  algorithm = baselines.make_first_order_step(_loss, tx, train_base=whole)
  base, adapter = _start()
  batch = _batch()
  after, info = jax.jit(algorithm.step)(
    algorithm.init(jax.random.key(0), base, adapter), batch, HPARAMS
  )
  moved = base if whole else adapter
  opt = tx.init(moved)
  for t in range(T):
    rows = jax.tree.map(lambda leaf, t=t: leaf[t], batch.lower)

    def loss(tree, rows=rows):
      return _loss(*((tree, adapter) if whole else (base, tree)), rows, None)

    value, grads = jax.value_and_grad(loss)(moved)
    np.testing.assert_allclose(info.upper_loss[t], value, rtol=1e-4)
    updates, opt = tx.update(grads, opt)
    moved = optax.apply_updates(moved, updates)
  _close(after.base if whole else after.upper, moved)


@pytest.mark.parametrize("adapter_first", [True, False])
def test_one_after_the_other_is_each_in_its_time(adapter_first):
  peft = baselines.make_first_order_step(_loss, optax.adam(LR))
  pair = (peft, _mezo(True)) if adapter_first else (_mezo(True), peft)
  joined = baselines.two_stage(*pair, 2)
  state = joined.init(jax.random.key(3), *_start())
  step = jax.jit(joined.step)
  alone = state
  stages = [jax.jit(stage.step) for stage in pair]
  for number in range(4):
    batch = _batch(number)
    state, info = step(state, batch, HPARAMS)
    alone, stage_info = stages[number >= 2](alone, batch, HPARAMS)
    _close((state.base, state.upper), (alone.base, alone.upper))
    np.testing.assert_allclose(
      info.upper_loss, stage_info.upper_loss.mean(), 1e-4
    )
    zeroth_order = adapter_first == (number >= 2)
    assert info.coefficients.shape == (2,)
    assert bool(np.any(info.coefficients)) == zeroth_order
    assert bool(np.any(info.move.weights)) == zeroth_order
  assert int(state.step) == 4


# Of those by rewards, which need a task without options: tests/training.
METHODS = [
  # Parts or the reverse of mezo_then_peft, or like it.
  pytest.param(name, marks=pytest.mark.slow)
  if name in ("peft", "mezo", "mezo_peft", "peft_then_mezo")
  else name
  for name, method in methods.METHODS.items()
  if name != "bilevel" and not method.by_reward
]


def start(command_line, folder, model, rows, method, *more):
  return command_line(
    f"--config={LLAMA}:task=rotten_tomatoes,method={method}",
    f"--workdir={folder}",
    f"--config.model.name={model}",
    f"--config.data.dir={rows}",
    *(f"--config.data.num_{part}=40" for part in ("lower", "upper")),
    *("--config.data.num_selection=20", "--config.data.num_test=32"),
    *("--config.lower.num_steps=2", "--config.lower.learning_rate=1e-2"),
    *("--config.train.num_steps=8", "--config.train.eval_every_steps=4"),
    *("--config.train.num_first_steps=4", "--config.zo.learning_rate=1e-4"),
    "--config.loss=classification",
    *more,
  )


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_every_method(
  command_line, tmp_path, tiny_model, tiny_rows, method
):
  folder = tmp_path / "run"
  assert start(command_line, folder, tiny_model, tiny_rows, method) == 0
  lines = [
    line
    for line in report.read_jsonl(folder / "metrics.jsonl")
    if "upper_loss" in line
  ]
  assert [line["step"] for line in lines] == list(range(1, 9))
  # A pass of 8 rows: 2 points, or 2 steps forward and back (twice the cost with
  # all weights).
  mezo, peft, full = (2, 0, 16), (2, 2, 32), (2, 2, 48)
  spent_by_step = {
    "mezo": [mezo] * 8,
    "mezo_peft": [mezo] * 8,
    "peft": [peft] * 8,
    "full": [full] * 8,
    "peft_then_mezo": [peft] * 4 + [mezo] * 4,
    "mezo_then_peft": [mezo] * 4 + [peft] * 4,
  }[method]
  names = ("forward_passes", "backward_passes", "forward_equivalents")
  for line, expected in zip(
    lines, np.cumsum(spent_by_step, axis=0), strict=True
  ):
    assert [line[name] for name in names] == expected.tolist()
    assert line["peak_rss_bytes"] >= line["rss_bytes"] > 0
  ratios = {line["flops"] / line["forward_equivalents"] for line in lines}
  assert len({round(ratio) for ratio in ratios}) == 1
  summary = json.loads((folder / "summary.json").read_text())
  assert summary["method"] == method
  assert "test_accuracy" in summary and "test_accuracy_s" not in summary
  # The best state answers again as the run said.
  run = evaluate.load_run(epath.Path(folder))
  state = evaluate.restore(run, epath.Path(folder))
  assert bool(state.upper) == (method not in ("mezo", "full"))
  result = evaluate.evaluate_run(str(folder))
  assert result["accuracy"] == summary["test_accuracy"]


@pytest.mark.slow
def test_a_resumed_run_of_two_parts_is_the_uninterrupted_one(
  command_line, tmp_path, tiny_model, tiny_rows
):
  states = []
  for steps in ((8,), (4, 8)):
    folder = tmp_path / str(len(steps))
    for count in steps:
      code = start(
        *(command_line, folder, tiny_model, tiny_rows, "peft_then_mezo"),
        f"--config.train.num_steps={count}",
        "--config.train.num_first_steps=3",
        "--config.ckpt.may_change=('train.num_steps',)",
      )
      assert code == 0
    run = run_lib.make_run(run_lib.read_config(epath.Path(folder)))
    with evaluate.state_store.open_store(run, epath.Path(folder)) as store:
      states.append(store.restore(8)[0])
  keys = [state.key for state in states]
  assert jax.random.key_data(keys[0]).tolist() == (
    jax.random.key_data(keys[1]).tolist()
  )
  jax.tree.map(
    np.testing.assert_array_equal, *(s._replace(key=()) for s in states)
  )


@pytest.mark.parametrize(
  "method, change, expected",
  [
    ("mezzo", "seed=0", ["method", "Did you mean 'mezo'"]),
    ("mezo_peft", "zo.select=mlp", ["zo.select", "moves an adapter"]),
    ("peft", "ckpt.base_every_steps=4", ["base_every_steps", "'peft'"]),
    (
      "mezo_then_peft",
      "train.num_first_steps=8",
      ["train.num_first_steps", "fewer than train.num_steps, 8"],
    ),
  ],
)
def test_mistakes(
  command_line,
  tmp_path,
  tiny_model,
  tiny_rows,
  capsys,
  method,
  change,
  expected,
):
  given = (command_line, tmp_path, tiny_model, tiny_rows, method)
  assert start(*given, f"--config.{change}") == 2
  stderr = capsys.readouterr().err
  assert stderr.count("\n") == 1
  for part in expected:
    assert part in stderr
