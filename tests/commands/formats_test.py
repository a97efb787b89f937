"""Runs on chats, from files of any name to answers and an exported model."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests import standin_hub, tiny
from zofo_jax import errors, report, tasks
from zofo_jax.builders import data, encoder
from zofo_jax.builders import model as model_lib
from zofo_jax.builders import run as run_lib
from zofo_jax.builders import task as task_lib
from zofo_jax.config import validate

LLAMA = pathlib.Path(__file__).parents[2] / "configs" / "llama.py"
TEMPLATE = (
  "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] }}"
  "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}a:{% endif %}"
)


def _chats(count):
  moods = ("dull", "bright")
  return [
    {
      "messages": [
        {"role": "user", "content": f"film {i}?"},
        {"role": "assistant", "content": f"{moods[i % 2]}\nand cold"},
      ]
    }
    for i in range(count)
  ]


@pytest.fixture(scope="module")
def chat_model(tiny_model, tmp_path_factory):
  """The tiny model with a chat template."""
  folder = tmp_path_factory.mktemp("chat") / "model"
  shutil.copytree(tiny_model, folder)
  (folder / "chat_template.jinja").write_text(TEMPLATE)
  return folder


def _rows_of(folder, chat_model):
  """Arguments that name the model and the rows of `run_folder`."""
  return (
    f"--config={LLAMA}:method=peft",
    f"--config.model.name={chat_model}",
    "--config.data.task=support",
    f"--config.data.dir={folder / 'chats.jsonl'}",
    "--config.data.num_lower=12",
    "--config.data.num_upper=6",
    "--config.data.num_selection=6",
    "--config.data.num_test=6",
  )


@pytest.fixture(scope="module")
def run_folder(command_line, chat_model, tmp_path_factory):
  """A run of two iterations on chats."""
  folder = tmp_path_factory.mktemp("run")
  tiny._write_jsonl(folder / "chats.jsonl", _chats(40))
  code = command_line(
    *_rows_of(folder, chat_model),
    f"--workdir={folder}",
    "--config.lower.num_steps=2",
    "--config.lower.learning_rate=0.01",
    "--config.upper.learning_rate=0.01",
    "--config.train.num_steps=2",
    "--config.train.eval_every_steps=1",
    "--config.generate.max_new_tokens=4",
    "--config.eval.batch_size=8",
  )
  assert code == 0
  return folder


@pytest.mark.slow
@pytest.mark.parametrize(
  "method, changes",
  [
    ("bilevel", {"data.pack": True, "data.max_length": 48}),
    ("bilevel", {"zo.objective": "reward"}),
    ("mezo", {}),
    ("mezo_peft", {"adapter.kind": "prefix", "data.pack": True}),
    ("full", {"data.metric": "rouge_l"}),
    ("es", {}),
  ],
)
def test_every_method_learns_chats(
  command_line, chat_model, tmp_path, method, changes
):
  rows = tmp_path / "chats.jsonl"
  tiny._write_jsonl(rows, _chats(40))
  if method == "es" or "zo.objective" in changes:
    changes = {**changes, "reward.functions": ("token_f1",)}
  fields = {
    "method": method,
    "model.name": chat_model,
    "data.task": "support",
    "data.dir": rows,
    "data.num_lower": 12,
    "data.num_upper": 6,
    "data.num_selection": 4,
    "data.num_test": 4,
    "lower.num_steps": 1,
    "train.num_steps": 2,
    "train.eval_every_steps": 2,
    "generate.max_new_tokens": 2,
    "eval.batch_size": 8,
    **changes,
  }
  code = command_line(
    f"--config={LLAMA}",
    f"--workdir={tmp_path / 'run'}",
    *(f"--config.{name}={value}" for name, value in fields.items()),
  )
  assert code == 0
  summary = json.loads((tmp_path / "run" / "summary.json").read_text())
  assert np.isfinite(summary[f"test_{summary['selection_metric']}"])


def test_the_format_is_known_by_the_columns(run_folder):
  config = json.loads((run_folder / "config.json").read_text())
  assert config["data"]["format"] == "messages"


def test_tokens_are_scored(command_line, run_folder):
  summary = json.loads((run_folder / "summary.json").read_text())
  rows = report.read_jsonl(run_folder / "metrics.jsonl")
  losses = [
    r["selection_token_loss"] for r in rows if "selection_token_loss" in r
  ]
  assert summary["selection_metric"] == "token_loss"
  assert summary["selection_token_loss"] == min(losses)
  assert summary["best_step"] == 1 + int(np.argmin(losses))
  assert summary["test_token_loss"] < summary["zero_shot_token_loss"]
  assert command_line("evaluate", f"--workdir={run_folder}") == 0
  evaluation = json.loads((run_folder / "evaluation.json").read_text())
  assert evaluation["token_loss"] == summary["test_token_loss"]
  np.testing.assert_allclose(
    evaluation["perplexity"], np.exp(evaluation["token_loss"])
  )
  lines = report.read_jsonl(run_folder / "predictions.jsonl")
  counts = [line["num_tokens"] for line in lines]
  for name in ("token_loss", "token_accuracy"):
    mean = np.average([line[name] for line in lines], weights=counts)
    np.testing.assert_allclose(mean, evaluation[name], rtol=1e-6)


def test_chats_in_context(command_line, run_folder, chat_model, tmp_path):
  summary = json.loads((run_folder / "summary.json").read_text())
  losses = []
  for shots in (0, 1):
    code = command_line(
      "icl",
      *_rows_of(run_folder, chat_model),
      f"--workdir={tmp_path}",
      f"--config.icl.num_shots={shots}",
    )
    assert code == 0
    outcome = json.loads((tmp_path / "icl.json").read_text())
    losses.append(outcome["token_loss"])
  np.testing.assert_allclose(losses[0], summary["zero_shot_token_loss"])
  assert abs(losses[1] - losses[0]) > 1e-3


def test_chats_are_answered(command_line, run_folder, tmp_path):
  asked = tmp_path / "asked.jsonl"
  lines = [
    {"messages": c["messages"][:1], "id": i} for i, c in enumerate(_chats(3))
  ]
  ask, broken = lines[0]["messages"][0], "\ud83d"
  unanswered = [
    ([], "expected a list of messages"),
    ([{"role": "system", "content": "Hm"}], "ends in a message of the system"),
    ([{**ask, "content": broken}], "half of a surrogate pair"),
    ([{**ask, "content": "film " * 99}], "at most 60 fit beside the answer"),
    (json.dumps([ask]), "expected a list of messages"),
    (None, "expected a list of messages"),
  ]
  for number, (messages, _) in enumerate(unanswered, 3):
    lines.append({"messages": messages, "id": number})
  lines.append({"text": "film?", "id": 9})
  tiny._write_jsonl(asked, lines)
  code = command_line("predict", f"--workdir={run_folder}", f"--input={asked}")
  assert code == 0
  answers = report.read_jsonl(run_folder / "answers.jsonl")
  assert [a["id"] for a in answers] == [*range(10)]
  assert all(isinstance(a["prediction"], str) for a in answers[:3])
  for line, answer in zip(lines[:3], answers):
    text = {"role": "assistant", "content": answer["prediction"]}
    assert answer["messages"] == [*line["messages"], text]
  reasons = [*(reason for _, reason in unanswered), "no entry 'messages'"]
  for number, (answer, reason) in enumerate(zip(answers[3:], reasons), 4):
    assert answer["prediction"] is None
    assert answer["error"].startswith(f"{asked} row {number}: ")
    assert reason in answer["error"]


def test_the_exported_model_has_the_template(
  command_line, run_folder, tmp_path
):
  folder = tmp_path / "merged"
  code = command_line("export", run_folder, folder, "--what=merged")
  assert code == 0
  assert (folder / "chat_template.jinja").read_text() == TEMPLATE


@pytest.mark.slow
def test_everything_comes_from_the_hub(
  command_line, run_folder, chat_model, tmp_path
):
  """Weights, tokenizer, chat template, adapter and rows."""
  pytest.importorskip("datasets")
  folder = tmp_path / "adapter"
  assert command_line("export", run_folder, folder, "--what=adapter") == 0
  repos = {
    ("models", f"a/{name}"): {
      "main": {path.name: path.read_bytes() for path in place.iterdir()}
    }
    for name, place in (("model", chat_model), ("adapter", folder))
  }
  chats = {"train": _chats(40), "validation": _chats(50)[40:]}
  repos["datasets", "a/chats"] = standin_hub.data_set({None: chats})
  fields = {
    "model.name": "a/model",
    "adapter.init_from": "hub:a/adapter",
    "data.task": "support",
    "data.dir": "hub:a/chats",
    "data.stream": True,
    "data.num_test": 4,
    "lower.num_steps": 1,
    "train.num_steps": 1,
    "train.eval_every_steps": 1,
    "eval.batch_size": 8,
  }
  with standin_hub.serve(repos) as hub:
    subprocess.run(
      [
        *(sys.executable, "-m", "zofo_jax.main", "train"),
        *(f"--config={LLAMA}:method=peft", f"--workdir={tmp_path / 'run'}"),
        *(f"--config.{name}={value}" for name, value in fields.items()),
      ],
      env={
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "cache"),
      },
      check=True,
    )
  summary = json.loads((tmp_path / "run" / "summary.json").read_text())
  assert np.isfinite(summary["test_token_loss"])


def test_a_changed_template_is_a_changed_tokenizer(
  command_line, run_folder, chat_model, capsys
):
  place = chat_model / "chat_template.jinja"
  place.write_text(TEMPLATE + " ")
  try:
    assert command_line("evaluate", f"--workdir={run_folder}") == 2
  finally:
    place.write_text(TEMPLATE)
  assert "the tokenizer changed since the run began: chat template" in (
    capsys.readouterr().err
  )


def _config(path, **changes):
  config = tiny.base_config()
  config.data.task, config.data.dir = "support", str(path)
  config.update_from_flattened_dict(changes)
  return config


@pytest.mark.parametrize(
  "row, changes, sentence",
  [
    (
      {"a": 1},
      {},
      "no built-in task 'support', and rows with the columns a .*prompt.$",
    ),
    ({"a": 1}, {"data.task": "sst-2"}, "Did you mean 'sst2'"),
    (
      {"text": "a", "label": 1},
      {},
      "data.format=text to learn .*el.$",
    ),
    (
      {"text": "a"},
      {"data.format": "messages", "data.task": "rte"},
      "'rte', wh",
    ),
    (
      _chats(1)[0],
      {"data.metric": "accuracy"},
      "metric is 'accuracy'; expected",
    ),
    (_chats(1)[0], {"loss": "classification"}, "config.loss: task support"),
    (_chats(1)[0], {"zo.objective": "accuracy"}, "has no options"),
    ({}, {"data.task": "copa", "zo.objective": "macro_f1"}, "no labels that"),
    (_chats(1)[0], {"data.template": 1}, "no template version 1"),
    ({"text": "a"}, {"method": "es"}, "rewards score answers, and rows of"),
    (
      _chats(1)[0],
      {"data.pack": True, "zo.objective": "token_f1"},
      "packed row has several answers",
    ),
  ],
)
def test_mistakes_are_named(tmp_path, row, changes, sentence):
  path = tmp_path / "rows.jsonl"
  tiny._write_jsonl(path, [row])
  with pytest.raises(errors.UserError, match=sentence):
    task_lib.load_task(_config(path, **changes))


def test_columns_that_are_not_read_are_named(tmp_path, caplog):
  path = tmp_path / "rows.jsonl"
  row = {"instruction": "a", "input": "b", "output": "c"}
  tiny._write_jsonl(path, [row])
  task_lib.load_task(_config(path))
  assert not caplog.text
  tiny._write_jsonl(path, [{**row, "system": "d", "history": []}])
  task_lib.load_task(_config(path))
  assert "data.format=alpaca, which has no column system, hist" in caplog.text


def test_rewards_need_answers(tmp_path):
  path = tmp_path / "rows.jsonl"
  tiny._write_jsonl(path, _chats(1))
  task = task_lib.load_task(_config(path, **{"data.metric": "token_accuracy"}))
  with pytest.raises(errors.UserError, match="token_f1, exact_match or rouge"):
    task_lib.check_answers(task, reward=True, alone=False)


def test_metrics_of_texts_make_a_chat_generate(tmp_path):
  path = tmp_path / "rows.jsonl"
  tiny._write_jsonl(path, _chats(1))
  task = task_lib.load_task(_config(path, **{"data.metric": "rouge_l"}))
  assert (task.kind, task.metric) == ("generation", "rouge_l")
  assert task_lib.load_task(_config(path)).kind == "text"
  assert tasks.recognise(["text", "label"]) is None


def test_rows_that_the_template_refuses_are_replaced(
  chat_model, tmp_path, caplog
):
  path = tmp_path / "chats.jsonl"
  rows = _chats(40)
  for row in rows[::2]:
    row["messages"].insert(0, {"role": "system", "content": "Be brief."})
  tiny._write_jsonl(path, rows)
  changes = {
    "model.name": str(chat_model),
    "data.num_lower": 6,
    "data.num_upper": 6,
    "data.num_selection": 4,
    "data.num_test": 4,
    "data.bad_rows": "drop",
  }
  model = model_lib.load_model(str(chat_model))
  model.tokenizer.chat_template = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('No.') }}"
    "{% endif %}" + TEMPLATE
  )
  run = run_lib.make_run(_config(path, **changes), model=model)
  splits, examples = run.row_source.load(run.task), run.load_examples()
  sizes = [len(part) for part in splits]
  assert sizes == [6, 6, 4, 4]
  assert sizes == [len(getattr(examples, name)) for name in splits._fields]
  (warning,) = {r.getMessage() for r in caplog.records if "left out" in r.msg}
  assert "the chat template refuses it: No." in warning
  assert len(run.encoder.bad_rows.dropped) == int(
    warning.split("support: ")[1].split(" of")[0]
  )


def test_rows_that_do_not_fit_are_counted(chat_model, tmp_path, caplog):
  path = tmp_path / "rows.jsonl"
  tiny._write_jsonl(
    path, [{"text": "film " * (99 if i % 3 else 2) + str(i)} for i in range(40)]
  )
  changes = {
    "model.name": str(chat_model),
    "data.num_lower": 8,
    "data.num_upper": 4,
    "data.num_selection": 9,
    "data.num_test": 9,
  }
  counts = {}
  for policy in ("drop", "truncate"):
    config = _config(path, **changes, **{"data.long_rows": policy})
    task, source = task_lib.load_task(config), data.make_row_source(config)
    encode = encoder.make_encoder(config, model_lib.load_model(**config.model))
    caplog.clear()
    examples = data.load_examples(task, source, encode)
    splits = source.load(task)
    for name in ("lower", "selection", "test"):
      rows, part = getattr(splits, name), getattr(examples, name)
      long = sum(len(row.fields["text"]) > 99 for row in rows)
      assert 0 < long < len(rows)
      assert len(part) == len(rows) - long * (policy == "drop")
      text = {"drop": "do not fit in 64", "truncate": "are cut to 64"}[policy]
      assert f"{long} of {len(rows)} rows {text} tokens" in caplog.text
    counts[policy] = len(encode.bad_rows.dropped)
  assert counts["truncate"] == 0 < counts["drop"]


def test_training_rows_are_packed(chat_model, tmp_path):
  path = tmp_path / "texts.jsonl"
  tiny._write_jsonl(path, [{"text": f"a dull film {i}" * 3} for i in range(40)])
  changes = {
    "model.name": str(chat_model),
    "data.pack": True,
    "data.max_length": 16,
    "data.num_lower": 8,
    "data.num_upper": 4,
    "data.num_selection": 2,
    "data.num_test": 2,
    "data.long_rows": "truncate",
  }
  config = _config(path, **changes)
  task = task_lib.load_task(config)
  model = model_lib.load_model(**config.model)
  encode = encoder.make_encoder(config, model)
  examples = data.load_examples(task, data.make_row_source(config), encode)
  assert task.may_split
  lengths = [len(e.rows[0].tokens) for e in examples.lower]
  assert max(lengths) == 16
  assert {len(e.rows) for e in examples.lower} == {1}
  assert max(len(e.rows[0].tokens) for e in examples.test) <= 16
  assert len({e.source for e in examples.test}) == 2 < len(examples.test)
  with pytest.raises(errors.UserError, match="the virtual tokens of adapter"):
    validate.check(_config(path, **changes, **{"adapter.kind": "prompt"}))
  with pytest.raises(
    errors.UserError, match=r"data\.pack: task rte has a prompt"
  ):
    task_lib.load_task(_config(path, **{"data.pack": True, "data.task": "rte"}))
