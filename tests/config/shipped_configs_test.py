"""Every config file loads, and says what the paper and its code say."""

import importlib.util
import json
import pathlib
import re

import pytest
from etils import epath

from zofo_jax import errors, tasks
from zofo_jax.builders import assets, budget, run
from zofo_jax.config import defaults, methods, presets, validate

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").glob("*.py"))
FAMILIES = ("gemma", "gpt2", "llama", "opt", "qwen")
DEFAULTS = defaults.flat(defaults.base_config())


def load(name):
  path = ROOT / "configs" / f"{name}.py"
  spec = importlib.util.spec_from_file_location(f"configs_{name}", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def changed(config):
  """Returns what differs from the defaults."""
  fields = defaults.flat(config)
  assert fields.keys() == DEFAULTS.keys()
  return {k: v for k, v in fields.items() if v != DEFAULTS[k]}


def names_with_sizes():
  return [(name, size) for name in FAMILIES for size in load(name).SIZES]


@pytest.mark.parametrize("name, size", names_with_sizes())
@pytest.mark.parametrize("preset", ["paper", "reference"])
def test_every_size_and_preset(name, size, preset):
  module = load(name)
  config = module.get_config(f"size={size},task=copa,preset={preset}")
  validate.check(config)
  assert config.model.name == module.SIZES[size]
  assert re.fullmatch(r"[\w-]+/[\w.-]+", config.model.name)
  assert config.data.task == "copa"
  if preset == "paper":
    assert changed(config).keys() == {"model.name", "data.task"}


def test_masked_language_models():
  get_config = load("roberta").get_config
  config = get_config("size=bert-base,task=snli,shots=512,method=mezo_peft")
  validate.check(config)
  assert changed(config) == {
    "model.name": "google-bert/bert-base-uncased",
    "data.task": "snli",
    "data.shots": 512,
    "data.max_length": 256,
    "data.long_rows": "truncate",
    "loss": "classification",
    "method": "mezo_peft",
    "zo.learning_rate": 5e-5,
    "zo.direction": "gaussian",
    "upper.batch_size": 64,
    "train.num_steps": 100_000,
  }
  for arg in ("shots=few", "method=mezo_peft,adapter=prompt", "size=huge"):
    with pytest.raises(errors.UserError, match=r"expected|values|no size"):
      get_config(arg)
  assert get_config("method=bilevel").zo.learning_rate == 1e-8


@pytest.mark.parametrize("name", FAMILIES)
def test_defaults(name):
  config = load(name).get_config()
  validate.check(config)
  assert config.data.task == "sst2"
  assert changed(config).keys() == {"model.name"}


def test_paper_numbers():
  """MeZO's protocol: 1000 rows, two thirds for the lower level, 1000 tests."""
  expected = {
    "data.num_lower": 666,
    "data.num_upper": 334,
    "data.num_test": 1000,
    "lora.rank": 8,
    "lora.alpha": 16.0,
    "zo.eps": 1e-3,
    "lower.num_steps": 10,
    "lower.clip_norm": 1.0,
    "loss": "likelihood",
  }
  assert expected.items() <= DEFAULTS.items()


def test_reference_preset():
  config = load("opt").get_config("size=1.3b,task=cb,preset=reference")
  assert changed(config) == {
    "model.name": "facebook/opt-1.3b",
    "data.task": "cb",
    "data.num_selection": 0,
    "penalty": 1e5,
    "lower.learning_rate": 1e-3,
    "lower.num_steps": 30,
    "upper.learning_rate": 1e-5,
    "zo.direction": "gaussian",
    "zo.estimator": "forward",
    "zo.optimizer": "adam",
    "zo.learning_rate": 1e-5,
    "train.num_steps": 166,
  }


def test_demo(monkeypatch, tmp_path):
  monkeypatch.setenv("ZOFO_CACHE", str(tmp_path))
  config = load("demo").get_config()
  validate.check(config)
  assert config.model.name == str(assets.smollm2())
  assert config.data.dir == str(assets.movie_reviews())
  assert tasks.get(config.data.task).name == "rotten_tomatoes"
  assert config.data.num_selection > 0  # four disjoint sets
  steps, every = config.train.num_steps, config.train.eval_every_steps
  assert steps % every == 0


@pytest.mark.parametrize("method", methods.OVER_TASKS)
def test_metademo(method):
  config = load("metademo").get_config(f"method={method}")
  validate.check(config)
  assert config.method == method
  assert config.train.num_steps % config.train.eval_every_steps == 0


def test_adapt_is_of_its_first_run(tmp_path):
  config = load("metatrain").get_config("model=some/model,group=nli")
  config.lora.rank = 3
  (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
  adapted = load("adapt").get_config(f"run={tmp_path}+other,task=cr+emo")
  validate.check(adapted)
  assert adapted.command == "adapt" and adapted.adapt.tasks == (
    "cr",
    "emo",
  )
  assert adapted.adapt.runs == (str(tmp_path), "other")
  assert (adapted.model.name, adapted.lora.rank) == ("some/model", 3)
  assert adapted.meta.target == ("nli",)


@pytest.mark.parametrize("task", ["squad", "financial"])
@pytest.mark.parametrize("outer", ["", "loss", "none"])
def test_rewards_and_what_they_are_compared_with(task, outer):
  module = load("reward")
  config = module.get_config(f"task={task},outer={outer}")
  validate.check(config)
  run_passes = budget.make_budget(config).total(config.train.num_steps)
  share = run_passes.forward_equivalents / module.ROWS[task]
  assert 0.8 < share <= 1
  with pytest.raises(errors.UserError, match=r"no outer 'none'; .* reward"):
    module.get_config("task=words,outer=none")


def test_files():
  assert [path.stem for path in FILES] == [
    *("adapt", "compare", "demo", "gemma", "gpt2", "llama", "metademo"),
    *("metatrain", "opt", "qwen", "reward", "roberta"),
  ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_docstrings_name_what_exists(path):
  text = path.read_text().replace("\\\n", " ")
  docstring = text.split('"""')[1]
  commands = re.findall(r"^  (?:zofo|make) .*", docstring, re.MULTILINE)
  assert commands
  for command in commands:
    if command.strip().startswith("make "):
      target = command.split()[1]
      assert f"\n{target}:" in (ROOT / "Makefile").read_text()
      continue
    name, _, arg = re.search(r"--config=(\S+)", command)[1].partition(":")
    assert name == path.stem
    load(path.stem).get_config(*filter(None, [arg]))
  for field in re.findall(r"--config\.([\w.]+)=", docstring):
    assert field in DEFAULTS


# The published hyper-parameters, typed from the sweeps: inner learning rate,
# outer learning rate, lambda, T.
LORA = """
boolq       1e-4  1e-4  1e6  30
cb          1e-3  1e-5  1e5  30
copa        1e-4  1e-7  1e6  30
drop        1e-6  1e-4  1    10
multirc     1e-4  1e-7  1e3  30
rte         1e-4  1e-7  1e4  30
record      1e-5  1e-6  1e1  30
squad       1e-4  1e-7  1e3  30
sst2        1e-4  1e-4  1e4  10
wic         1e-4  1e-7  1e6  30
wsc         1e-5  1e-7  1e4  30
winogrande  1e-4  1e-8  1e3  30
"""


PREFIX = """
boolq       1e-2  1e-4  1e1  30
cb          1e-2  1e-8  1e6  30
copa        1e-3  1e-8  1e5  30
drop        1e-2  1e-6  1e3  30
multirc     1e-2  1e-6  1e2  30
rte         1e-2  1e-4  1e1  30
record      1e-4  1e-7  1e5  30
squad       1e-2  1e-7  1e5  30
wic         1e-2  1e-7  1e3  30
wsc         1e-3  1e-4  1e3  30
winogrande  1e-3  1e-8  1e2  30
"""
PROMPT = """
boolq       1e-2  1e-6  1e4  30
cb          1e-2  1e-5  1e1  30
copa        1e-2  1e-8  1e4  30
drop        1e-2  1e-6  1e3  30
multirc     1e-2  1e-7  1e6  30
rte         1e-2  1e-6  1e5  30
record      1e-5  1e-4  1e6  10
squad       1e-2  1e-7  1e4  30
wic         1e-2  1e-5  1e3  30
wsc         1e-4  1e-7  1e5  30
winogrande  1e-3  1e-4  1e6  20
"""
SWEEPS = {"lora": LORA, "prefix": PREFIX, "prompt": PROMPT}


@pytest.mark.parametrize("adapter", SWEEPS)
def test_recipes(adapter):
  lines = [line.split() for line in SWEEPS[adapter].split("\n")[1:-1]]
  for task, *numbers in lines:
    assert presets.find(adapter, task) == tuple(map(float, numbers))
    assert task in tasks.ALL
  assert set(presets.ADAPTERS[adapter]) == {task for task, *_ in lines}


def test_reference_preset_of_another_adapter():
  arg = "size=1.3b,task=record,preset=reference,adapter="
  config = load("opt").get_config(arg + "prompt")
  assert config.adapter.kind == "prompt" and config.lower.num_steps == 10
  with pytest.raises(errors.UserError, match=r"no adapter 'lora\+prompt'"):
    load("opt").get_config(arg + "lora+prompt")


def test_saved_config_survives_a_round_trip(tmp_path):
  config = load("opt").get_config("task=cb,preset=reference")
  (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
  again = run.read_config(epath.Path(tmp_path))
  assert defaults.flat(again) == defaults.flat(config)
