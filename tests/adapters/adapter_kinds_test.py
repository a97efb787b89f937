"""Every kind of adapter as p and as s: a bilevel step, and whole runs."""

import functools
import json
import pathlib

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

import zofo_jax as zofo
from zofo_jax import adapters
from zofo_jax.builders import model
from zofo_jax.builders import run as run_lib
from zofo_jax.core import directions, losses
from zofo_jax.models import transformer
from zofo_jax.models.decoder import STACKED

LLAMA = pathlib.Path(__file__).parents[2] / "configs" / "llama.py"
MODEL = transformer.Transformer(transformer.Config(96, 16, 24, 2, 4, 2, 4))
ROWS, LENGTH, T = 2, 7, 2


@pytest.fixture(scope="module")
def base():
  ids = jnp.ones((1, 4), jnp.int32)
  init = jax.jit(lambda key: MODEL.init(key, ids, ids > 0, method="logits"))
  return jax.tree.map(
    lambda w: w * 10.0 if w.ndim > 2 else w, init(jax.random.key(0))["params"]
  )


@functools.partial(jax.jit, static_argnums=(0, 3))
def make(kind, base, seed, dropout=0.0):
  key = jax.random.key(seed)
  if kind == "lora":
    lora = adapters.init_lora(key, base, rank=2, alpha=4.0, dropout=dropout)
    return jax.tree.map(lambda w: w + 0.1, lora)
  if kind == "prefix":
    return adapters.init_prefix(key, MODEL, base, length=3)
  if kind == "projected":
    return adapters.init_prefix(
      key, MODEL, base, length=3, init="random", projection=4
    )
  if kind == "prompt":
    return adapters.init_prompt(key, base, length=2)
  kinds = kind.split("+")
  return adapters.join(*(make(one, base, seed, dropout) for one in kinds))


def make_batch(seed, *lead):
  draw = np.random.default_rng(seed)
  shape = (*lead, ROWS, 1)
  ids = lambda *size: jnp.asarray(draw.integers(4, 96, (*shape, *size)))
  return losses.Batch(
    tokens=ids(LENGTH).astype(jnp.int32),
    mask=jnp.ones((*shape, LENGTH), bool),
    positions=jnp.full((*shape, 1), LENGTH - 1, jnp.int32),
    target_slot=jnp.zeros((*shape, 2), jnp.int32),
    target_token=ids(2).astype(jnp.int32),
    target_option=jnp.broadcast_to(jnp.arange(2), (*shape, 2)),
    target_weight=jnp.ones((*shape, 2)),
    label=jnp.asarray(draw.integers(0, 2, (*lead, ROWS)), jnp.int32),
    option_mask=jnp.ones((*lead, ROWS, 2), bool),
    example_weight=jnp.ones((*lead, ROWS)),
  )


def moves(path):
  """Selects some weights: each is more to compile."""
  return path in ("embed/embedding", "layers/attention/query/kernel")


def take_step(base, upper, lower, rate=1e-2):
  algorithm = zofo.make_bilevel_step(
    model.make_loss_fn("classification", MODEL),
    lower_tx=optax.adam(rate),
    upper_tx=optax.adam(rate),
    base_tx=zofo.outer.sgd(1e-3),
    zo=zofo.ZerothOrder(
      zofo.Sampler(
        directions.Rademacher(), select=moves, stacked=STACKED, lazy=True
      )
    ),
  )
  state = algorithm.init(jax.random.key(5), base, upper, lower)
  batch = zofo.BilevelBatch(make_batch(0, T), make_batch(1), make_batch(2))
  hparams = zofo.BilevelHParams(zo_eps=1e-2, penalty=2.0)
  return state, *jax.jit(algorithm.step)(state, batch, hparams)


@pytest.mark.parametrize(
  "upper, lower",
  [
    ("lora+prefix+prompt", "lora+prefix+prompt"),
    *(
      pytest.param(*kinds, marks=pytest.mark.slow)
      for kinds in (("prompt", "projected"), ("projected", "lora"))
    ),
  ],
)
def test_bilevel_step_of_every_kind(base, upper, lower):
  before, after, info = take_step(
    base, make(upper, base, 1), make(lower, base, 2)
  )
  for value in jax.tree.leaves(info):
    assert np.isfinite(value).all()
  assert int(info.num_nonfinite) == 0
  for part in ("upper", "lower", "base"):
    old, new = (
      flax.traverse_util.flatten_dict(getattr(state, part), sep="/")
      for state in (before, after)
    )
    for path, value in old.items():
      should = part != "base" or moves(path)
      changed = jax.tree.map(np.array_equal, value, new[path])
      assert set(jax.tree.leaves(changed)) == {not should}, path


@pytest.mark.slow
def test_dropout_is_never_in_theta_s_losses(base):
  infos = []
  for dropout in (0.0, 0.5):
    upper, lower = (make("lora", base, seed, dropout) for seed in (1, 2))
    infos.append(take_step(base, upper, lower, rate=0.0)[2])
  for name in ("coefficients", "objective"):
    np.testing.assert_array_equal(*(getattr(info, name) for info in infos))
  for name in ("lower_loss", "upper_loss", "penalty_loss"):
    one, two = (getattr(info, name) for info in infos)
    assert np.all(np.abs(one - two) > 1e-6), name
  # The same batch, other inputs dropped.
  assert np.unique(infos[1].lower_loss).size == T


# Whole runs.

RUNS = {
  "prefix": [],
  "lora+prompt": [
    "--config.lora.dropout=0.1",
    "--config.lora.rslora=True",
    "--config.prompt.init=text",
    "--config.prompt.text=a bright film",
  ],
  "lora+prefix+prompt": [
    "--config.prefix.init=random",
    "--config.prefix.projection=6",
  ],
}


# Made from a config: builders/adapter_test.py; a run: training/train_test.py.
@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_a_run_of_every_kind(
  command_line, tmp_path, tiny_model, tiny_rows, kind
):
  code = command_line(
    f"--config={LLAMA}:task=rotten_tomatoes",
    f"--workdir={tmp_path}",
    f"--config.model.name={tiny_model}",
    f"--config.data.dir={tiny_rows}",
    f"--config.adapter.kind={kind}",
    *RUNS[kind],
    "--config.data.num_selection=40",
    "--config.loss=classification",
    "--config.penalty=1",
    "--config.lower.num_steps=2",
    "--config.lower.learning_rate=3e-2",
    "--config.upper.learning_rate=3e-2",
    "--config.zo.learning_rate=1e-4",
    "--config.train.num_steps=30",
    "--config.train.eval_every_steps=15",
  )
  assert code == 0
  summary = json.loads((tmp_path / "summary.json").read_text())
  assert summary["zero_shot_accuracy"] < 0.7 < summary["test_accuracy"]
  assert command_line("evaluate", f"--workdir={tmp_path}") == 0
  evaluation = json.loads((tmp_path / "evaluation.json").read_text())
  assert evaluation["accuracy"] == summary["test_accuracy"]
  run = run_lib.make_run(run_lib.read_config(epath.Path(tmp_path)))
  state = run.abstract_state()
  kinds = {p.rpartition("/")[2] for p in adapters.parts(state.upper)}
  assert kinds == set(kind.split("+"))


def test_adapters_leave_a_place_for_rows(
  command_line, tmp_path, tiny_model, tiny_rows, capsys
):
  def complaint(length):
    code = command_line(
      f"--config={LLAMA}:task=rotten_tomatoes",
      f"--workdir={tmp_path}",
      f"--config.model.name={tiny_model}",
      f"--config.data.dir={tiny_rows}",
      "--config.adapter.kind=prompt",
      f"--config.prompt.length={length}",
      # As many rows as there are, so that nothing is to be warned of.
      "--config.data.num_lower=102",
      "--config.data.num_upper=50",
      "--config.data.num_selection=40",
      "--config.data.num_test=64",
    )
    assert code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    return sentence

  assert "takes 64 positions; expected fewer than the model's 64" in complaint(
    64
  )
  assert "at most 4 fit" in complaint(60)
