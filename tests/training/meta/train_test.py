"""Meta-training and adaptation through the command line, on a tiny model."""

import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from tests import tiny
from zofo_jax import errors, report
from zofo_jax.builders import data, optimizers
from zofo_jax.builders import model as model_lib
from zofo_jax.builders import run as run_lib
from zofo_jax.checkpoints import manager
from zofo_jax.core.types import PER_TASK_FIELDS
from zofo_jax.data import batching
from zofo_jax.training import train
from zofo_jax.training.meta import adapt, task_sets
from zofo_jax.training.meta import few_shot as few_shot_lib
from zofo_jax.training.meta import train as meta_train

CONFIGS = pathlib.Path(__file__).parents[3] / "configs"
STEPS = 4
TRAINED = ("rotten_tomatoes", "cr", "imdb")


@pytest.fixture(scope="module")
def family_rows(tmp_path_factory, tiny_rows):
  """A folder with rows of four tasks, each with another part of the rows."""
  folder = tmp_path_factory.mktemp("family")
  lines = (tiny_rows / "train.jsonl").read_text().splitlines(keepends=True)
  for i, name in enumerate((*TRAINED, "mpqa")):
    (folder / name).mkdir()
    task_lines = lines[40 * i : 40 * i + 64]
    (folder / name / "train.jsonl").write_text("".join(task_lines))
    shutil.copy(tiny_rows / "validation.jsonl", folder / name)
  return folder


@pytest.fixture(scope="module")
def start(command_line, tiny_model, family_rows):
  """Types a command of meta-training."""

  def run(workdir, *changes, method="bilevel", steps=STEPS):
    return command_line(
      f"--config={CONFIGS / 'metatrain.py'}:method={method}",
      f"--workdir={workdir}",
      f"--config.model.name={tiny_model}",
      f"--config.data.dir={family_rows}",
      f"--config.meta.train={TRAINED}",
      "--config.meta.target=('mpqa',)",
      "--config.meta.num_tasks=2",
      "--config.meta.size_power=0.5",
      "--config.meta.weight_power=1",
      "--config.data.num_selection=8",
      "--config.data.num_test=8",
      "--config.ckpt.keep=2",
      "--config.data.max_length=48",
      "--config.penalty=1",
      "--config.lower.num_steps=2",
      "--config.lower.learning_rate=3e-2",
      "--config.upper.learning_rate=3e-2",
      "--config.zo.learning_rate=1e-4",
      f"--config.train.num_steps={steps}",
      "--config.train.eval_every_steps=2",
      *changes,
    )

  return run


@pytest.fixture(scope="module")
def done(start, tmp_path_factory):
  folder = tmp_path_factory.mktemp("runs") / "meta"
  assert start(folder) == 0
  return folder


def resolve(config, names, split, field):
  return task_sets.resolve_tasks(
    names, split, field, folder=config.data.dir, metaicl=config.meta.metaicl
  )


def load_examples(family):
  run = family.run
  return task_sets.load_examples(family.sources, run.row_source, run.encoder)


def load_targets(config, run, sources):
  return few_shot_lib.load_targets(
    sources,
    run.row_source,
    run.encoder,
    shots=config.adapt.shots,
    num_seeds=config.adapt.num_seeds,
  )


def arrays(folder, step):
  """Reads a checkpoint as {name: array}."""
  family = meta_train.make_run(run_lib.read_config(epath.Path(folder)))
  with manager.Checkpoints(folder / "checkpoints") as checkpoints:
    state, _ = checkpoints.restore(family.abstract_state(), step)
  state = state._replace(key=jax.random.key_data(state.key))
  return {
    jax.tree_util.keystr(path): leaf
    for path, leaf in jax.tree.leaves_with_path(state)
  }


def test_what_a_run_leaves(done):
  metrics = report.read_jsonl(done / "metrics.jsonl")
  rows = [row for row in metrics if "lower_loss" in row]
  assert [row["step"] for row in rows] == [1, 2, 3, 4]
  for row in rows:
    assert len(row["tasks"]) == len(set(row["tasks"])) == 2
    assert np.isfinite([row["lower_loss"], row["upper_loss"]]).all()
    assert len(row["penalty_loss"]) == 2
    # 2 inner, 2 for p, and 3 losses at either side of theta, of 2 tasks.
    assert row["forward_passes"] == 20 * row["step"]
  scored = [row for row in metrics if "selection_mean" in row]
  assert [row["step"] for row in scored] == [2, 4]
  for row in scored:
    each = [row[f"selection_{name}"] for name in TRAINED]
    assert row["selection_mean"] == pytest.approx(np.mean(each))
  summary = json.loads((done / "summary.json").read_text())
  assert [row["task"] for row in summary["tasks"]] == list(TRAINED)
  trained = [row["trained"] for row in summary["tasks"]]
  assert summary["test_mean"] == pytest.approx(np.mean(trained))
  assert (done / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_run_is_the_same_bit_for_bit(done, start, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(done, folder)
  shutil.rmtree(folder / "checkpoints" / str(STEPS))
  assert start(folder) == 0
  one, other = arrays(done, STEPS), arrays(folder, STEPS)
  jax.tree.map(np.testing.assert_array_equal, one, other)
  measured = ("seconds", "rss_bytes", "peak_rss_bytes")
  steps = [
    [
      {name: row[name] for name in row if name not in measured}
      for row in report.read_jsonl(each / "metrics.jsonl")
    ]
    for each in (done, folder)
  ]
  assert steps[0] == steps[1]


@pytest.mark.slow
def test_a_run_resumed_on_the_host_is_the_same(done, start, tmp_path):
  # As if it had been interrupted after step 2, with its tasks on the host.
  folder = tmp_path / "run"
  shutil.copytree(done, folder)
  shutil.rmtree(folder / "checkpoints" / str(STEPS))
  config = json.loads((folder / "config.json").read_text())
  config["meta"]["on_host"] = True
  (folder / "config.json").write_text(json.dumps(config))
  assert start(folder, "--config.meta.on_host=True") == 0
  one, other = arrays(done, STEPS), arrays(folder, STEPS)
  assert one.keys() == other.keys()
  for name, value in other.items():
    of_tasks = name.startswith((".upper", ".lower"))
    assert isinstance(value, np.ndarray) == of_tasks
    np.testing.assert_allclose(value, one[name], rtol=2e-3, atol=2e-5)
  steps = [
    [row for row in report.read_jsonl(each / "metrics.jsonl") if "tasks" in row]
    for each in (done, folder)
  ]
  assert [row["tasks"] for row in steps[0]] == [
    row["tasks"] for row in steps[1]
  ]


def test_where_stacks_start_does_not_matter(done, tiny_model):
  family = meta_train.make_run(run_lib.read_config(epath.Path(done)))
  base = model_lib.load_base(family.model)
  on_device = family.init(base)
  on_host = family._replace(on_host=True).init(base)
  for name in ("upper", "lower", "upper_opt", "lower_opt"):
    jax.tree.map(
      np.testing.assert_array_equal,
      getattr(on_host, name),
      getattr(on_device, name),
    )
  # Every task's p and s are others.
  drawn = [
    leaf
    for part in (on_device.upper, on_device.lower)
    for leaf in np.asarray(
      part["layers"]["attention"]["query"]["lora"].a
    ).reshape(len(TRAINED), -1)
  ]
  assert len({leaf.tobytes() for leaf in drawn}) == 2 * len(TRAINED)


@pytest.mark.slow
def test_every_kind_of_adapter_has_an_axis_of_tasks(config):
  config.command = "metatrain"
  config.adapter.kind = "lora+prefix+prompt"
  config.meta.train, config.meta.target = ("cr", "rotten_tomatoes"), ("mpqa",)
  config.meta.num_tasks = 2
  config.data.max_length = 32
  family = meta_train.make_run(config)
  model = family.run.model
  state = family.init(model_lib.load_base(model))
  examples = load_examples(family)
  shape = task_sets.common_shape([*map(data.train_shape, examples)])
  each = [batching.collate(e.upper[:3], shape, pad=model.pad) for e in examples]
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
  loss_fn = family.run.loss_fn
  grad = jax.value_and_grad(lambda a, base, b: loss_fn(base, a, b, None))
  together = jax.jit(jax.vmap(grad, (0, None, 0)))(
    state.upper, state.base, stacked
  )
  alone = jax.jit(grad)
  for i in range(2):
    one = alone(family.adapter(state, i), state.base, each[i])
    jax.tree.map(
      lambda many, one, i=i: np.testing.assert_allclose(
        many[i], one, rtol=1e-4, atol=1e-5
      ),
      together,
      one,
    )


@pytest.fixture(scope="module")
def lora(start, tmp_path_factory):
  folder = tmp_path_factory.mktemp("runs") / "peft"
  assert start(folder, method="peft", steps=2) == 0
  return folder


@pytest.mark.parametrize(
  "method", ["peft", pytest.param("full", marks=pytest.mark.slow), "mezo"]
)
def test_baselines_move_what_they_should(lora, start, tmp_path, method):
  folder = lora if method == "peft" else tmp_path / method
  if method != "peft":
    assert start(folder, method=method, steps=2) == 0
  metrics = report.read_jsonl(folder / "metrics.jsonl")
  passes = {"peft": (4, 4), "full": (4, 4), "mezo": (4, 0)}[method]
  assert (metrics[0]["forward_passes"], metrics[0]["backward_passes"]) == passes
  family, state = adapt.load_run(folder)
  before = model_lib.load_base(family.model)
  moved = {
    jax.tree_util.keystr(path): not np.array_equal(old, new)
    for (path, old), new in zip(
      jax.tree.leaves_with_path(before),
      jax.tree.leaves(state.base),
      strict=True,
    )
  }
  assert any(moved.values()) == (method != "peft")
  assert bool(jax.tree.leaves(state.upper)) == (method == "peft")


def test_adaptation(done, lora, command_line, tmp_path, capsys):
  code = command_line(
    f"--config={CONFIGS / 'adapt.py'}:run={done}+{lora},task=mpqa",
    f"--workdir={tmp_path / 'new'}",
    "--config.adapt.shots=4",
    "--config.adapt.num_seeds=2",
    "--config.adapt.num_steps=12",
    "--config.adapt.learning_rate=3e-2",
  )
  assert code == 0
  shown = capsys.readouterr().out
  columns = ("zero-shot", "in-context", "start", "few-shot", "±")
  for name in ("mpqa", "mean", "base", "meta", "peft", *columns):
    assert name in shown
  result = json.loads((tmp_path / "new" / "adapt.json").read_text())
  base, meta, first_order = result["outcome"]
  assert [row["backbone"] for row in result["outcome"]] == [
    "base",
    "meta",
    "peft",
  ]
  assert all(len(row["few_shot"]) == 2 for row in result["outcome"])
  assert "start" not in base and "start" in meta
  # Theta stood still there; here zero-shot is of the backbone alone.
  assert base["zero_shot"] == first_order["zero_shot"]
  assert base["in_context"] == first_order["in_context"]
  assert all(len(row["in_context"]) == 2 for row in result["outcome"])
  # A few rows of a task that one word decides are enough.
  assert min(base["few_shot"]) > 0.9


@pytest.fixture
def config(tiny_model, family_rows):
  fields = tiny.base_config()
  fields.command = "adapt"
  fields.model.name = str(tiny_model)
  fields.zo.select = tiny.MOVED
  fields.data.dir = str(family_rows)
  fields.data.num_test = 8
  fields.data.num_selection = 8
  fields.adapt.tasks = ("mpqa", "cr")
  fields.adapt.shots = 3
  fields.adapt.num_seeds = 2
  fields.adapt.num_steps = 3
  fields.adapt.batch_size = 4
  return fields


@pytest.mark.slow
def test_all_targets_and_seeds_are_tuned_as_one_would_be(config):
  members = resolve(config, config.adapt.tasks, "target", "x")
  run = run_lib.make_run(config, members[0].task)
  targets = load_targets(config, run, members)
  base = model_lib.load_base(run.model)
  tune = functools.partial(
    few_shot_lib.tune,
    run,
    tx=optimizers.make_optimizer("adam", 1e-3),
    num_steps=3,
    batch_size=4,
  )
  together = tune(few_shot_lib.Backbone("base", base, {}), targets)
  # The last of all, alone.
  key = jax.random.fold_in(jax.random.key(config.seed), 1)
  fresh = run.init_adapter(key, base)
  target = targets[1]._replace(
    support_examples=[targets[1].support_examples[1]]
  )
  alone = tune(few_shot_lib.Backbone("base", base, fresh), [target])
  jax.tree.map(
    lambda many, one, start: (
      np.testing.assert_allclose(many[1, 1], one[0, 0], rtol=1e-3, atol=1e-6),
      np.testing.assert_array_less(1e-4, np.abs(many[1, 1] - start).max()),
      np.testing.assert_array_less(1e-4, np.abs(many[1, 1] - many[0, 1]).max()),
    ),
    together,
    alone,
    fresh,
  )


@pytest.mark.slow
def test_one_task_is_trained_as_a_run_of_it_bit_for_bit(config):
  config.command = "metatrain"
  config.meta.train, config.meta.target = ("cr",), ("mpqa",)
  config.meta.num_tasks = 1
  config.data.max_length = 32
  config.lower.num_steps = 2
  config.lower.learning_rate = config.upper.learning_rate = 1e-3
  config.zo.learning_rate = 1e-5
  family = meta_train.make_run(config)
  model = family.model
  (examples,) = load_examples(family)
  shape = data.train_shape(examples)
  many = family.init(model_lib.load_base(model))
  of_tasks = {name: getattr(many, name) for name in PER_TASK_FIELDS}
  one = many._replace(**jax.tree.map(lambda leaf: leaf[0], of_tasks))
  # Both as compiled programs.
  alone = jax.jit(
    run_lib.make_run(config, family.sources[0].task).algorithm.step
  )
  together = jax.jit(family.run.algorithm.step)
  hparams = family.run.hparams_fn(0)
  lift = functools.partial(jax.tree.map, lambda leaf: np.asarray(leaf)[None])
  for number in range(2):
    batch = train.iteration_batch(config, examples, shape, model.pad, number)
    one, info = alone(one, batch, hparams)
    many, many_info = together(many, lift(batch), hparams)
    np.testing.assert_array_equal(many_info.coefficients, info.coefficients)
    np.testing.assert_array_equal(many_info.lower_loss[0], info.lower_loss)
  jax.tree.map(np.testing.assert_array_equal, many.base, one.base)
  for name in PER_TASK_FIELDS:
    jax.tree.map(
      np.testing.assert_array_equal,
      getattr(many, name),
      lift(getattr(one, name)),
    )


@pytest.mark.many_devices
def test_directions_are_divided_among_devices(config, family_rows):
  config.command, config.method = "metatrain", "mezo"
  config.data.dir = str(family_rows)
  config.meta.train, config.meta.num_tasks = TRAINED[:1], 1
  config.mesh.data, config.mesh.pert = 1, 2
  config.zo.num_directions = 2
  family = meta_train.make_run(config)
  sampler = meta_train._TaskSampler(family, load_examples(family))
  program = jax.make_jaxpr(family.run.algorithm.step)(
    family.abstract_state(), sampler.batch(0), family.run.hparams_fn(0)
  )
  assert "shard_map" in str(program)


@pytest.mark.parametrize(
  "changes, expected",
  [
    (
      {"meta.train": ("sentimant",)},
      ["meta.train", "sentimant", "Did you mean 'sentiment'"],
    ),
    ({"meta.train": ("cr", "squad")}, ["squad", "generating"]),
    ({"meta.train": ()}, ["config.meta.train", "found nothing"]),
    ({"meta.target": ("cr",)}, ["not trained on", "cr"]),
    ({"meta.num_tasks": 3}, ["at most the 2 tasks", "found 3"]),
    ({"method": "pett"}, ["config.method", "Did you mean 'peft'"]),
    ({"method": "peft", "meta.on_host": True}, ["meta.on_host", "False"]),
    (
      {"method": "mezo", "zo.direction": "per_example"},
      ["zo.direction", "mezo"],
    ),
    (
      {"method": "mezo_peft", "zo.select": ""},
      ["config.method", "many tasks", "peft"],
    ),
    ({"meta.size_power": -1.0}, ["meta.size_power", "0 or more"]),
    ({"data.metric": "macro_f1"}, ["data.metric", "many tasks"]),
  ],
)
def test_mistakes(config, changes, expected):
  config.command = "metatrain"
  config.meta.train, config.meta.target = ("cr", "rotten_tomatoes"), ("mpqa",)
  config.meta.num_tasks = 2
  for name, value in changes.items():
    config.update_from_flattened_dict({name: value})
  with pytest.raises(errors.UserError) as caught:
    meta_train.make_run(config)
  for part in expected:
    assert part in str(caught.value)


def test_what_adaptation_does_not_take(done, config, tmp_path, command_line):
  config.adapt.runs = (str(done),)
  with pytest.raises(errors.UserError, match=r"not trained on.*found cr"):
    adapt.adapt(config, str(tmp_path))
  config.adapt.tasks = ("mpqa",)
  config.lora.rank = 4
  with pytest.raises(errors.UserError, match=r"config.lora.rank.*8.*found 4"):
    adapt.adapt(config, str(tmp_path))
  config.lora.rank = 8
  config.adapt.shots = 1000
  with pytest.raises(errors.UserError, match=r"mpqa.*1000 rows"):
    adapt.adapt(config, str(tmp_path))
  assert command_line("evaluate", f"--workdir={done}") == 2
