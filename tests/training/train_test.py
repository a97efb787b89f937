"""A whole run through the command line: training, resuming, what it leaves."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from tests import tiny
from zofo_jax import report
from zofo_jax.builders import data
from zofo_jax.builders import model as model_lib
from zofo_jax.builders import run as run_lib
from zofo_jax.checkpoints import manager
from zofo_jax.core.types import BilevelHParams
from zofo_jax.report import curves
from zofo_jax.training import train

LLAMA = pathlib.Path(__file__).parents[2] / "configs" / "llama.py"
STEPS, EVAL_EVERY, INNER = 30, 10, 2
CLOCK = (
  "seconds",
  "train_seconds",
  "compile_seconds",
  "rss_bytes",
  "peak_rss_bytes",
)


@dataclasses.dataclass(frozen=True)
class Done:
  """A run that went to its end, and how often its step was compiled."""

  folder: pathlib.Path
  compiled: int

  @property
  def metrics(self):
    return report.read_jsonl(self.folder / "metrics.jsonl")

  @property
  def summary(self):
    return json.loads((self.folder / "summary.json").read_text())


def start(command_line, workdir, model, rows, *more):
  """Types the same command, whatever the folder."""
  return command_line(
    "train",
    f"--config={LLAMA}:task=rotten_tomatoes",
    f"--workdir={workdir}",
    f"--config.model.name={model}",
    f"--config.data.dir={rows}",
    "--config.data.num_selection=40",
    "--config.loss=classification",
    "--config.penalty=1",
    f"--config.lower.num_steps={INNER}",
    "--config.lower.learning_rate=3e-2",
    "--config.upper.learning_rate=3e-2",
    "--config.zo.learning_rate=1e-4",
    f"--config.train.num_steps={STEPS}",
    f"--config.train.eval_every_steps={EVAL_EVERY}",
    "--config.zo.select=",  # all weights
    *more,
  )


@pytest.fixture(scope="module")
def done(command_line, tmp_path_factory, tiny_model, tiny_rows):
  """The run that most tests look at."""
  folder = tmp_path_factory.mktemp("runs") / "one" / "run"
  steps = []
  jit = jax.jit

  def noting_jit(fun, **options):
    jitted = jit(fun, **options)
    if "donate_argnums" in options:
      steps.append(jitted)
    return jitted

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, "jit", noting_jit)
    code = start(command_line, folder, tiny_model, tiny_rows)
  assert code == 0
  (step,) = steps
  return Done(folder, step._cache_size())


def arrays(folder):
  """Reads every checkpoint of a run as {step: {name: array}}."""
  run = run_lib.make_run(run_lib.read_config(epath.Path(folder)))
  by_name = {}
  with manager.Checkpoints(folder / "checkpoints") as checkpoints:
    for step in checkpoints.steps():
      state, _ = checkpoints.restore(run.abstract_state(), step)
      state = state._replace(key=jax.random.key_data(state.key))
      by_name[step] = {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(state)
      }
  return by_name


def steady(rows):
  """Leaves out what the clock and the machine decide."""
  return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


# Training.


def test_it_learns(done):
  losses = [row["lower_loss"] for row in done.metrics if "lower_loss" in row]
  assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:2])
  summary = done.summary
  assert summary["zero_shot_accuracy"] < 0.7
  assert summary["test_accuracy"] > 0.9
  assert summary["test_accuracy_s"] > 0.9


def test_theta_moves_without_first_order_state(done, tiny_model):
  run = run_lib.make_run(run_lib.read_config(epath.Path(done.folder)))
  before = model_lib.load_base(run.model)
  last = arrays(done.folder)[STEPS]
  moved = {
    path: leaf - last[f".base{path}"]
    for path, leaf in (
      (jax.tree_util.keystr(path), np.asarray(leaf))
      for path, leaf in jax.tree.leaves_with_path(before)
    )
  }
  assert all(np.any(change) for change in moved.values())
  assert max(np.abs(change).max() for change in moved.values()) < 0.1


def test_step_compiles_once(done):
  assert done.compiled == 1


def test_metrics_have_every_step(done):
  rows = [row for row in done.metrics if "lower_loss" in row]
  assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
  # 2 inner, 2 for p, and 3 losses at either side of theta.
  assert [row["forward_passes"] for row in rows] == [
    10 * step for step in range(1, STEPS + 1)
  ]
  assert [row["backward_passes"] for row in rows] == [
    4 * step for step in range(1, STEPS + 1)
  ]
  seconds = [row["seconds"] for row in rows]
  assert seconds == sorted(seconds) and seconds[0] > 0
  for row in rows:
    assert row["rss_bytes"] > 0
    assert np.isfinite([row["lower_loss"], row["upper_loss"]]).all()
    assert np.isfinite(row["coefficients"]).all()


def test_metrics_have_what_the_picture_shows(done):
  _, lines = curves._LOSSES
  shown = {name for name, *_ in lines}
  shown.add(f"selection_{done.summary['selection_metric']}")
  assert shown == {"lower_loss", "upper_loss", "selection_accuracy"}
  assert all(any(name in row for row in done.metrics) for name in shown)
  scored = [row for row in done.metrics if "selection_accuracy" in row]
  assert [row["step"] for row in scored] == [10, 20, 30]


def test_summary(done):
  summary = done.summary
  scored = {
    row["step"]: row["selection_accuracy"]
    for row in done.metrics
    if "selection_accuracy" in row
  }
  best = max(scored.values())
  expected = {
    "task": "rotten_tomatoes",
    "num_test_rows": 64,
    "num_outer_steps": STEPS,
    "num_inner_steps": STEPS * INNER,
    "forward_passes": 10 * STEPS,
    "backward_passes": 4 * STEPS,
    "best_step": max(step for step in scored if scored[step] == best),
  }
  assert expected.items() <= summary.items()
  last = next(row for row in done.metrics if row.get("step") == STEPS)
  assert 0 < last["seconds"] <= summary["train_seconds"] < 600
  # Linux counts pages in batches, by thread: a peak may be a little behind.
  assert summary["peak_rss_bytes"] >= 0.99 * last["rss_bytes"]


@pytest.mark.slow
def test_a_linear_penalty_rises_to_its_value(
  command_line, tmp_path, tiny_model, tiny_rows
):
  more = "--config.train.num_steps=2", "--config.penalty=4"
  more += ("--config.penalty_schedule=linear",)
  more += (f"--config.zo.select={tiny.MOVED}",)
  assert start(command_line, tmp_path, tiny_model, tiny_rows, *more) == 0
  config = run_lib.read_config(epath.Path(tmp_path))
  run = run_lib.make_run(config)
  examples = run.load_examples()
  shape = data.train_shape(examples)
  state = run.init(model_lib.load_base(run.model))
  step = run.jit_step()
  for number, penalty in enumerate((2.0, 4.0)):
    rows = train.iteration_batch(config, examples, shape, run.model.pad, number)
    hparams = BilevelHParams(zo_eps=config.zo.eps, penalty=penalty)
    state, _ = step(state, run.shard_batch(rows), hparams)
  actual = arrays(tmp_path)[2]
  for name in ("base", "upper", "lower"):
    leaves = jax.tree.leaves_with_path(getattr(state, name))
    for path, leaf in leaves:
      saved = actual[f".{name}{jax.tree_util.keystr(path)}"]
      np.testing.assert_array_equal(saved, leaf)


def test_picture_and_config(done, tiny_model):
  assert (done.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
  config = run_lib.read_config(epath.Path(done.folder))
  assert config.lower.num_steps == INNER
  assert config.model.name == str(tiny_model)
  with manager.Checkpoints(done.folder / "checkpoints") as checkpoints:
    assert checkpoints.latest_step() == STEPS
    assert checkpoints.best_step() == done.summary["best_step"]


# Resuming.


@pytest.mark.slow
def test_resumed_run_is_the_uninterrupted_one(
  done, command_line, tmp_path, tiny_model, tiny_rows, monkeypatch
):
  folder = tmp_path / "run"
  make_batch = train.iteration_batch

  def stop(config, examples, shape, pad, step):
    if step == 17:
      raise KeyboardInterrupt
    return make_batch(config, examples, shape, pad, step)

  monkeypatch.setattr(train, "iteration_batch", stop)
  assert start(command_line, folder, tiny_model, tiny_rows) == 130
  metrics = folder / "metrics.jsonl"
  assert report.read_jsonl(metrics)[-1]["step"] > 10
  with metrics.open("a") as file:
    file.write('{"step": 17, "lower_l')  # a line cut by the end of a process
  seen = []

  def note(config, examples, shape, pad, step):
    seen.append(step)
    return make_batch(config, examples, shape, pad, step)

  monkeypatch.setattr(train, "iteration_batch", note)
  assert start(command_line, folder, tiny_model, tiny_rows) == 0
  assert sorted(set(seen)) == list(range(10, STEPS))  # the first twice
  resumed = Done(folder, 1)
  assert steady(resumed.metrics) == steady(done.metrics)
  actual, expected = arrays(folder), arrays(done.folder)
  assert actual.keys() == expected.keys()
  for step in actual:
    assert actual[step].keys() == expected[step].keys()
    for name, value in actual[step].items():
      np.testing.assert_array_equal(value, expected[step][name], name)
  assert {k: v for k, v in resumed.summary.items() if k not in CLOCK} == {
    k: v for k, v in done.summary.items() if k not in CLOCK
  }


@pytest.mark.slow
@pytest.mark.parametrize(
  "options",
  [
    ("--config.guided.lengths=parabola",),
    ("--config.guided.lengths=descend", "--config.guided.history=2"),
  ],
  ids=["parabola", "history"],
)
def test_a_resumed_run_whose_theta_follows_s(
  command_line, tmp_path, tiny_model, tiny_rows, monkeypatch, capsys, options
):
  def run(name, *more):
    return start(
      *(command_line, tmp_path / name, tiny_model, tiny_rows),
      *("--config.zo.direction=guided", *options),
      *("--config.train.num_steps=4", "--config.train.eval_every_steps=2"),
      *more,
    )

  assert run("whole") == 0
  make_batch = train.iteration_batch

  def stop(config, examples, shape, pad, step):
    if step == 3:
      raise KeyboardInterrupt
    return make_batch(config, examples, shape, pad, step)

  with monkeypatch.context() as patch:
    patch.setattr(train, "iteration_batch", stop)
    assert run("stopped") == 130
  assert run("stopped") == 0
  whole, resumed = (Done(tmp_path / x, 1) for x in ("whole", "stopped"))
  assert steady(resumed.metrics) == steady(whole.metrics)
  assert "test_accuracy_base" in whole.summary
  for step, expected in arrays(whole.folder).items():
    jax.tree.map(
      np.testing.assert_array_equal, arrays(resumed.folder)[step], expected
    )
  capsys.readouterr()
  assert run("prompt", "--config.adapter.kind=prompt") == 2
  assert "adapter.kind" in capsys.readouterr().err


def test_finished_run_is_not_trained_again(
  done, command_line, tmp_path, tiny_model, tiny_rows, monkeypatch
):
  folder = shutil.copytree(done.folder, tmp_path / "run")
  (folder / "summary.json").unlink()
  monkeypatch.setattr(train, "iteration_batch", None)
  assert start(command_line, folder, tiny_model, tiny_rows) == 0
  again = Done(folder, 0)
  assert again.metrics == done.metrics
  assert again.summary["test_accuracy"] == done.summary["test_accuracy"]
  assert again.summary["train_seconds"] == done.summary["train_seconds"]


# A saved run.


def test_evaluate_and_predict(done, command_line, tmp_path, tiny_rows):
  assert command_line("evaluate", f"--workdir={done.folder}") == 0
  evaluation = json.loads((done.folder / "evaluation.json").read_text())
  assert evaluation["accuracy"] == done.summary["test_accuracy"]
  assert evaluation["num_test_rows"] == 64
  assert evaluation["step"] == done.summary["best_step"]
  low, high = evaluation["accuracy_interval"]
  assert 0 <= low <= evaluation["accuracy"] <= high <= 1

  lines = report.read_jsonl(done.folder / "predictions.jsonl")
  right = [line["prediction"] in line["right"] for line in lines]
  assert np.mean(right) == evaluation["accuracy"]
  by_number = {int(line["where"].split()[-1]): line for line in lines}
  assert sorted(by_number) == list(range(1, 65))

  rows = report.read_jsonl(tiny_rows / "validation.jsonl")
  asked = tmp_path / "asked.jsonl"
  asked.write_text(
    "".join(json.dumps({"text": row["text"]}) + "\n" for row in rows)
  )
  answers = tmp_path / "new" / "answers.jsonl"
  code = command_line(
    "predict",
    f"--workdir={done.folder}",
    f"--input={asked}",
    f"--output={answers}",
  )
  assert code == 0
  for number, answer in enumerate(report.read_jsonl(answers), 1):
    known = by_number[number]
    assert answer["text"] == rows[number - 1]["text"]
    assert known["right"] == [rows[number - 1]["label"]]
    word = ("terrible", "great")[known["prediction"]]
    assert answer["prediction"] == word
    np.testing.assert_allclose(answer["scores"], known["scores"], rtol=1e-5)


def test_predict_answers_what_it_can(
  done, command_line, tmp_path, capsys, tiny_rows
):
  good = report.read_jsonl(tiny_rows / "validation.jsonl")[:2]
  lines = [
    json.dumps({**good[0], "prediction": "an older one", "error": "gone"}),
    json.dumps({"text": "cold " * 99, "number": 7}),
    '{"text": ',
    json.dumps({"text": None, "number": 8}),
    '{"text": "\\ud83d"}',
    json.dumps(good[1]),
  ]
  path = tmp_path / "rows.jsonl"
  path.write_text("\n".join(lines))
  answers = tmp_path / "answers.jsonl"
  code = command_line(
    "predict",
    f"--workdir={done.folder}",
    f"--input={path}",
    f"--output={answers}",
  )
  assert code == 0
  assert "4 of 6 rows have no answer" in capsys.readouterr().out
  found = report.read_jsonl(answers)
  assert [row.get("number") for row in found] == [None, 7, None, 8, None, None]
  records = report.read_jsonl(done.folder / "predictions.jsonl")
  by_number = {int(line["where"].split()[-1]): line for line in records}
  for place, number in ((0, 1), (5, 2)):
    word = ("terrible", "great")[by_number[number]["prediction"]]
    assert found[place]["prediction"] == word
    assert "error" not in found[place]
  for place, reason in (
    (1, "at most 64 fit."),
    (2, "broken JSON"),
    (3, "column 'text' is empty"),
    (4, "half of a surrogate pair"),
  ):
    assert found[place]["prediction"] is None
    error = found[place]["error"]
    assert f"rows.jsonl row {place + 1}: " in error and reason in error
    assert "long_rows" not in error


@pytest.mark.parametrize(
  "name, line, expected",
  [
    ("gone.jsonl", None, "gone.jsonl"),
    ("broken.jsonl", '{"text": ', "row 1: broken JSON"),
    ("columns.jsonl", '{"txt": "a film"}', "no column 'text'"),
    ("empty.jsonl", "", "no rows"),
    ("long.jsonl", json.dumps({"text": "cold " * 99}), "at most 64 fit"),
    ("rows.doc", "a film", "unknown ending"),
  ],
)
def test_rows_that_cannot_be_answered(
  done, command_line, tmp_path, capsys, name, line, expected
):
  if line is not None:
    (tmp_path / name).write_text(line)
  arguments = (f"--workdir={done.folder}", f"--input={tmp_path / name}")
  assert command_line("predict", *arguments) == 2
  (sentence,) = capsys.readouterr().err.splitlines()
  assert sentence.startswith("zofo_jax: ") and expected in sentence, sentence
  assert name in sentence


def test_run_whose_model_is_gone(done, command_line, tmp_path, capsys):
  folder = shutil.copytree(done.folder, tmp_path / "run")
  config = json.loads((folder / "config.json").read_text())
  config["model"]["name"] = str(tmp_path / "gone")
  (folder / "config.json").write_text(json.dumps(config))
  assert command_line("evaluate", f"--workdir={folder}") == 2
  (sentence,) = capsys.readouterr().err.splitlines()
  assert "gone does not exist" in sentence


def test_run_without_checkpoint(done, command_line, tmp_path, capsys):
  shutil.copy(done.folder / "config.json", tmp_path)
  assert command_line("evaluate", f"--workdir={tmp_path}") == 2
  (sentence,) = capsys.readouterr().err.splitlines()
  assert "no folder of checkpoints" in sentence
  (tmp_path / "checkpoints").mkdir()
  assert command_line("evaluate", f"--workdir={tmp_path}") == 2
  (sentence,) = capsys.readouterr().err.splitlines()
  assert "no checkpoint in" in sentence
