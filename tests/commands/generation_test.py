"""Runs that are answered by generating text, from their config to answers."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from tests import tiny
from zofo_jax import errors, report
from zofo_jax.builders import data, encoder
from zofo_jax.builders import model as model_lib
from zofo_jax.builders import task as task_lib
from zofo_jax.config import validate

LLAMA = pathlib.Path(__file__).parents[2] / "configs" / "llama.py"


@pytest.fixture(scope="module")
def long_model(tiny_model, tmp_path_factory):
  """The tiny model with a context of 256 tokens."""
  folder = tmp_path_factory.mktemp("long") / "model"
  shutil.copytree(tiny_model, folder)
  fields = json.loads((folder / "config.json").read_text())
  fields["max_position_embeddings"] = 256
  (folder / "config.json").write_text(json.dumps(fields))
  return folder


@pytest.fixture(scope="module")
def question_rows(tmp_path_factory):
  """A folder of made-up rows of squad."""
  folder = tmp_path_factory.mktemp("questions")
  names = ("Ann", "Bob", "Cy", "Di", "Ed", "Flo", "Gus", "Hal")
  pets = ("cat", "dog", "hen", "cow")
  rows = [
    {
      "title": "Pets",
      "context": f"{name} has a {pet}.",
      "question": f"What has {name}?",
      "answers": {"text": [pet, f"a {pet}"]},
    }
    for name in names
    for pet in pets
  ]
  for split, some in (("train", rows[:24]), ("validation", rows[24:])):
    report_rows = "".join(json.dumps(row) + "\n" for row in some)
    (folder / f"{split}.jsonl").write_text(report_rows)
  return folder


def run_config(model, rows, **changes):
  config = tiny.base_config()
  config.model.name, config.data.dir = str(model), str(rows)
  config.data.task = "squad"
  config.update_from_flattened_dict(changes)
  return config


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"loss": "classification"}, "config.loss: task squad.*'likelihood'"),
    ({"generate.max_new_tokens": 0}, "max_new_tokens: expected more than 0"),
    ({"generate.top_p": 1.5}, "top_p: expected .* at most 1; found 1.5"),
    ({"generate.top_k": 5}, "temperature: top_k and top_p need more than 0"),
    (
      {"generate.num_beams": 2, "generate.temperature": 0.5},
      "num_beams: beam search draws nothing.*found 0.5 with 2 beams",
    ),
    ({"generate.length_penalty": 2.0}, "length_penalty: only beam search"),
    ({"generate.stop": ("",)}, "stop: expected texts that are not empty"),
  ],
)
def test_mistakes_are_named(changes, words):
  config = run_config("model", "rows", **changes)
  with pytest.raises(errors.UserError, match=words):
    validate.check(config)
    task_lib.load_task(config)


def test_prompts_leave_room_for_answers(long_model, question_rows):
  def questions(**changes):
    config = run_config(long_model, question_rows, **changes)
    config.data.num_lower, config.data.num_upper = 8, 4
    config.data.num_selection, config.data.num_test = 4, 8
    model, task = (
      model_lib.load_model(**config.model),
      task_lib.load_task(config),
    )
    return data.load_examples(
      task, data.make_row_source(config), encoder.make_encoder(config, model)
    ).test

  whole = questions()
  assert whole[0].answers[0] in ("cat", "dog", "hen", "cow")
  with pytest.raises(errors.UserError, match="at most 26 fit beside"):
    questions(**{"generate.max_new_tokens": 230})
  with pytest.raises(errors.UserError, match="context of 256 tokens"):
    questions(**{"generate.max_new_tokens": 256})
  cut = questions(
    **{"generate.max_new_tokens": 230, "data.long_rows": "truncate"}
  )
  assert [q.tokens for q in cut] == [q.tokens[-26:] for q in whole]


def test_a_run_from_training_to_answers(
  command_line, long_model, question_rows, tmp_path
):
  folder = tmp_path / "run"
  code = command_line(
    f"--config={LLAMA}:task=squad",
    f"--workdir={folder}",
    f"--config.model.name={long_model}",
    f"--config.data.dir={question_rows}",
    "--config.data.num_lower=12",
    "--config.data.num_upper=6",
    "--config.data.num_selection=6",
    "--config.data.num_test=6",
    "--config.lower.num_steps=1",
    "--config.train.num_steps=2",
    "--config.train.eval_every_steps=2",
    "--config.generate.max_new_tokens=4",
    "--config.generate.stop=('\\n', '.')",
    "--config.eval.batch_size=4",
  )
  assert code == 0
  summary = json.loads((folder / "summary.json").read_text())
  metrics = report.read_jsonl(folder / "metrics.jsonl")
  for name in ("token_f1", "exact_match"):
    assert 0 <= summary[f"test_{name}"] <= 1
    assert 0 <= metrics[-1][f"selection_{name}"] <= 1
    assert f"zero_shot_{name}" in summary and f"test_{name}_s" in summary
  assert "test_accuracy" not in summary

  assert command_line("evaluate", f"--workdir={folder}") == 0
  evaluation = json.loads((folder / "evaluation.json").read_text())
  assert evaluation["token_f1"] == summary["test_token_f1"]
  low, high = evaluation["token_f1_interval"]
  assert low <= evaluation["token_f1"] <= high
  predictions = report.read_jsonl(folder / "predictions.jsonl")
  assert len(predictions) == 6
  mean = np.mean([line["token_f1"] for line in predictions])
  np.testing.assert_allclose(mean, evaluation["token_f1"])
  for line in predictions:
    assert line["answers"][0] in line["answers"][1]
    assert not set("\n.") & set(line["prediction"])

  rows = question_rows / "validation.jsonl"
  unlabelled = tmp_path / "asked.jsonl"
  unlabelled.write_text(
    "".join(
      json.dumps({k: row[k] for k in ("title", "context", "question")}) + "\n"
      for row in report.read_jsonl(rows)
    )
  )
  code = command_line("predict", f"--workdir={folder}", f"--input={unlabelled}")
  assert code == 0
  answers = report.read_jsonl(folder / "answers.jsonl")
  asked = report.read_jsonl(unlabelled)
  actual = [row.pop("prediction") for row in answers]
  assert answers == asked and all(isinstance(text, str) for text in actual)
