"""Sets of tasks: groups, and MetaICL's lists."""

import json

import pytest

from tests import tiny
from zofo_jax import errors, tasks
from zofo_jax.builders import data
from zofo_jax.builders import run as run_lib
from zofo_jax.tasks import groups
from zofo_jax.training.meta import few_shot, task_sets


@pytest.fixture
def config(tiny_model):
  config = tiny.base_config()
  config.command = "adapt"
  config.model.name = str(tiny_model)
  config.data.num_test = 8
  config.data.num_selection = 8
  config.adapt.shots = 3
  config.adapt.num_seeds = 2
  return config


def resolve(config, names, split, field):
  return task_sets.resolve_tasks(
    names, split, field, folder=config.data.dir, metaicl=config.meta.metaicl
  )


def load_targets(config, run, sources):
  return few_shot.load_targets(
    sources,
    run.row_source,
    run.encoder,
    shots=config.adapt.shots,
    num_seeds=config.adapt.num_seeds,
  )


def names_of(members):
  return [member.task.name for member in members]


def test_groups_hold_tasks_that_there_are():
  for group in groups.ALL.values():
    assert not set(group.train) & set(group.target)
    for name in (*group.train, *group.target):
      assert tasks.get(name).kind == "classification"


def test_metaicl_lists(config, tmp_path):
  rows = [
    {"task": "a", "input": f"row {i}", "output": o, "options": ["yes", "no"]}
    for i, o in enumerate(["yes", "no"] * 20)
  ]
  for name in ("glue-mrpc", "poem"):
    (tmp_path / name).mkdir()
    for split in ("train", "test"):
      path = tmp_path / name / f"{name}_16_100_{split}.jsonl"
      path.write_text(
        "".join(json.dumps(row) + "\n" for row in rows[split == "test" :])
      )
  split = tmp_path / "class_to_class.json"
  split.write_text('{"train": ["glue-mrpc"], "test": ["poem"]}')
  config.data.dir = str(tmp_path)
  config.meta.metaicl = "16_100"
  trained, target = (
    resolve(config, (str(split),), side, "meta.train")
    for side in ("train", "target")
  )
  assert names_of(trained) == ["glue-mrpc"] and names_of(target) == ["poem"]
  run = run_lib.make_run(config, trained[0].task)
  (examples,) = task_sets.load_examples(trained, run.row_source, run.encoder)
  assert isinstance(examples, data.Examples)
  assert len(examples.lower) > 0 and len(examples.test) == 8
  (actual,) = load_targets(config, run, target)
  assert [len(shots) for shots in actual.support_examples] == [3, 3]
  split.write_text('{"test": []}')
  with pytest.raises(errors.UserError, match=r"lists 'train' and 'test'"):
    resolve(config, (str(split),), "train", "meta.train")
