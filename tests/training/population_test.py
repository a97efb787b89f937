"""Training by rewards: the host's part of a step, and whole runs."""

import functools
import json
import logging
import pathlib
import sys
import types

import jax
import numpy as np
import pytest
from etils import epath

import zofo_jax as zofo
from tests import tiny
from zofo_jax import errors, report
from zofo_jax.builders import model as model_lib
from zofo_jax.builders import run as run_lib
from zofo_jax.checkpoints import state_store
from zofo_jax.data import batching, encode_prompts
from zofo_jax.evaluation import generation, rewards
from zofo_jax.models.decoder import STACKED
from zofo_jax.sharding import multihost
from zofo_jax.training import population, train

LLAMA = pathlib.Path(__file__).parents[2] / "configs" / "llama.py"
QUESTIONS = [
  encode_prompts.Question((5,) * n, ("x",), f"row {n}", f"prompt {n}")
  for n in (1, 2, 9, 4)
]


class Letters:
  """A tokenizer of one letter a token."""

  def decode(self, tokens, **options):
    del options
    return "".join(chr(97 + token) for token in tokens)


def scorer(answers, **options):
  """A scorer of given answers [Q, 2, B, T], whose reward is the share of a."""
  seen = []

  def answer_fn(state, tokens, mask, numbers):
    seen.append((state, tokens, mask, numbers))
    lengths = np.full(answers.shape[:-1], answers.shape[-1], np.int32)
    return generation.Generated(answers, lengths)

  module = types.ModuleType("share_of_a")
  module.reward = lambda completions, **columns: [
    text.count("a") / len(text) for text in completions
  ]
  sys.modules["share_of_a"] = module
  made = population.Scorer(
    rewards.Rewards(
      ("share_of_a:reward", "length"), (2.0, 1.0), rewards.Options(max_words=9)
    ),
    answer_fn,
    QUESTIONS,
    tokenizer=Letters(),
    pad=0,
    stop=("z",),
    seed=0,
    batch_size=2,
    **options,
  )
  return made, seen


def test_scores_are_means_over_prompts():
  # Two directions, two sides, two prompts, two letters.
  answers = np.array(
    [
      [[[0, 0], [0, 1]], [[0, 1], [1, 1]]],
      [[[1, 1], [0, 1]], [[0, 25], [0, 1]]],
    ]
  )
  samples = []
  made, seen = scorer(answers, num_samples=1, write_sample=samples.append)
  expected = 2 * np.array([[0.75, 0.25], [0.25, 0.75]])
  np.testing.assert_allclose(made.scores("state", 4), expected)
  assert made.scores("state", 4).dtype == np.float32
  assert len(seen) == 1, "the program asks twice for one step"
  state, tokens, mask, numbers = seen[0]
  assert state == "state" and tokens.shape == mask.shape == (2, 16)
  assert sorted(mask.sum(axis=1)) and numbers.tolist() == [0, 1]
  row = made.metrics(4)
  assert row["reward"] == pytest.approx(1.0)
  assert row["reward_best"] == pytest.approx(1.5)
  assert row["reward_std"] == pytest.approx(0.5)
  assert row["zero_spread"] == 0 and row["answer_tokens"] == 2
  assert row["tied_directions"] == 0
  assert row["reward_share_of_a:reward"] == pytest.approx(0.5)
  (sample,) = samples
  assert sample["step"] == 5 and sample["where"].startswith("row ")
  assert sample["best"] in ("aa", "a") and sample["best_reward"] == 2
  assert sample["worst"] == "bb" and sample["worst_reward"] == 0


def test_each_process_scores_its_own_rows(monkeypatch):
  answers = np.random.RandomState(0).randint(0, 3, (2, 2, 2, 3))
  alone, _ = scorer(answers)
  parts = []
  monkeypatch.setattr(multihost, "sum_over_processes", lambda scores: scores)
  for index in range(2):
    monkeypatch.setattr(
      multihost, "own_share", lambda count, i=index: range(i, count, 2)
    )
    samples = []
    made, _ = scorer(answers, num_samples=9, write_sample=samples.append)
    parts.append(made.scores(None, 0))
    assert len(samples) == 1
  monkeypatch.undo()
  np.testing.assert_allclose(sum(parts), alone.scores(None, 0), rtol=1e-6)


def test_rewards_that_never_differ_are_told(caplog):
  made, _ = scorer(np.zeros((2, 2, 2, 3), int))
  with caplog.at_level(logging.WARNING, "zofo_jax"):
    for step in range(12):
      assert np.ptp(made.scores(None, step)) == 0
      row = made.metrics(step)
      assert row["zero_spread"] == 1 and row["tied_directions"] == 2
  assert caplog.text.count("has changed the reward for 10 steps") == 1


@pytest.mark.slow  # the example of make_es_step learns, too
def test_a_model_learns_to_write_a_word_by_reward_alone(tiny_model):
  """Tokens are drawn; of 400, one has a reward."""
  model = model_lib.load_model(str(tiny_model))
  generate_fn = model_lib.make_generate_fn(
    model, max_new_tokens=1, temperature=1.0
  )
  prompts = [
    model.tokenizer(text + " It was")["input_ids"]
    for text in ("a dull film", "a bright and warm story about a dog")
  ]
  rows = batching.collate_prompts(prompts * 4, 16, pad=model.pad)

  def write(base, rows, key):
    return generate_fn(base, {}, *rows, jax.random.split(key, 8)).tokens[:, 0]

  algorithm = zofo.make_es_step(
    write,
    zofo.outer.sgd(0.02),
    zofo.ZerothOrder(
      zofo.Sampler(
        zofo.directions.LowRank(2),
        select=lambda path: path.startswith("head"),
        stacked=STACKED,
        lazy=True,
      ),
      num_directions=32,
      map_fn=functools.partial(jax.lax.map, batch_size=32),
    ),
    shaping=zofo.population.z_scores,
  )
  state = algorithm.init(zofo.keys.seed_key(0), model_lib.load_base(model))
  evaluate = jax.jit(algorithm.evaluate)
  update = jax.jit(algorithm.update, donate_argnums=0)
  hparams = zofo.BilevelHParams(zo_eps=0.3)
  shares = []
  for _ in range(100):
    tokens = np.asarray(evaluate(state, rows, hparams))
    words = model.tokenizer.batch_decode(tokens.reshape(-1, 1).tolist())
    rewards = np.reshape([word == " great" for word in words], tokens.shape)
    state, _ = update(state, rewards.mean(axis=-1), hparams)
    shares.append(rewards.mean())
  assert np.mean(shares[:5]) < 0.05
  assert np.mean(shares[-5:]) >= 0.95


# Whole runs.


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
  """A folder of made-up questions."""
  folder = tmp_path_factory.mktemp("questions")
  made = [
    {"name": name, "pet": pet}
    for name in ("Ann", "Bob", "Cy", "Di", "Ed", "Flo")
    for pet in ("cat", "dog", "hen", "cow")
  ]
  for split, some in (("train", made[:16]), ("validation", made[16:])):
    text = "".join(json.dumps(row) + "\n" for row in some)
    (folder / f"{split}.jsonl").write_text(text)
  return folder


def config(model, rows, **changes):
  config = tiny.base_config()
  config.update_from_flattened_dict(
    {
      "method": "es",
      "model.name": str(model),
      "data.dir": str(rows),
      "data.task": "pets",
      "data.prompt": "{name} has a",
      "data.label": "pet",
      "data.num_lower": 8,
      "data.num_upper": 8,
      "data.num_selection": 4,
      "data.num_test": 4,
      "lower.num_steps": 1,
      "upper.batch_size": 4,
      "zo.direction": "low_rank",
      "zo.rank": 1,
      "zo.num_directions": 3,
      "zo.eps": 0.1,
      "zo.learning_rate": 1e-3,
      "zo.select": tiny.MOVED,
      "reward.functions": ("vowels:reward",),
      "reward.temperature": 1.0,
      "train.num_steps": 4,
      "train.eval_every_steps": 2,
      "generate.max_new_tokens": 3,
      **changes,
    }
  )
  return config


@pytest.fixture
def vowels(monkeypatch):
  module = types.ModuleType("vowels")
  module.reward = lambda completions, pet, **columns: [
    sum(letter in "aeiou" for letter in text) / 4 for text in completions
  ]
  monkeypatch.setitem(sys.modules, "vowels", module)
  return module


def last_base(config, folder):
  run = run_lib.make_run(config)
  with state_store.open_store(run, epath.Path(folder)) as store:
    return store.restore(4)[0].base


@pytest.mark.slow
def test_a_run_by_rewards_resumes_as_if_never_stopped(
  tiny_model, rows, vowels, tmp_path
):
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  # The resumed run replays its first steps from the ledger.
  made = config(tiny_model, rows, **{"ckpt.base_every_steps": 4})
  summary = train.train(made, str(whole))
  lines = report.read_jsonl(whole / "metrics.jsonl")
  steps = [line for line in lines if "reward" in line]
  assert [line["step"] for line in steps] == [1, 2, 3, 4]
  for line in steps:
    assert line["upper_loss"] == pytest.approx(-line["reward"], abs=1e-5)
    assert line["forward_passes"] == 6 * line["step"]
    assert 0 < line["reward_best"] and 1 <= line["answer_tokens"] <= 3
  assert any(np.any(line["coefficients"]) for line in steps)
  assert summary["selection_metric"] == "reward"
  assert summary["tied_steps"] == sum(
    line["tied_directions"] == 3 for line in steps
  )
  assert 0 <= summary["test_reward"] <= 3
  samples = report.read_jsonl(whole / "samples.jsonl")
  assert [s["step"] for s in samples] == [1, 1, 2, 2, 3, 3, 4, 4]

  calls = []

  def raise_at_step_4(completions, pet, **columns):
    calls.append(completions)
    if len(calls) > 4 + 2:  # three steps, and evaluations at the start and at 2
      raise RuntimeError("no such luck")
    return reward(completions, pet)

  reward, vowels.reward = vowels.reward, raise_at_step_4
  with pytest.raises(errors.UserError, match=r"raised RuntimeError.*such luck"):
    train.train(made, str(parts))
  vowels.reward = reward
  train.train(made, str(parts))
  bases = [last_base(made, folder) for folder in (whole, parts)]
  jax.tree.map(np.testing.assert_array_equal, *bases)
  assert report.read_jsonl(parts / "samples.jsonl") == samples


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes",
  [
    {
      "method": "es_peft",
      "zo.select": "",
      "lora.rank": 2,
      "data.label": "",
      "reward.functions": ("regex", "length"),
      "reward.pattern": "[aeiou]",
      "reward.max_words": 1,
    },
    {
      "method": "bilevel",
      "zo.objective": "reward",
      "zo.direction": "rademacher",
      "zo.num_directions": 2,
    },
  ],
  ids=["es_peft", "bilevel"],
)
def test_other_runs_by_rewards(tiny_model, rows, vowels, tmp_path, changes):
  made = config(tiny_model, rows, **{"train.num_steps": 2, **changes})
  train.train(made, str(tmp_path))
  lines = report.read_jsonl(tmp_path / "metrics.jsonl")
  steps = [line for line in lines if "reward" in line]
  assert len(steps) == 2 and any(np.any(s["coefficients"]) for s in steps)
  assert ("lower_loss" in steps[0]) == (changes["method"] == "bilevel")
