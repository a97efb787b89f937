"""Rows that cannot be used: left out and listed, or refused by name."""

import dataclasses
import json
import logging
import sys
import types

import pytest
from etils import epath

from tests import tiny
from zofo_jax import errors, report, tasks
from zofo_jax.builders import run as run_lib
from zofo_jax.data import bad_rows, encode_options, sources
from zofo_jax.data import tokenizer as tokenizer_lib

OWN = tasks.custom("mood", prompt="{text} I am", options=(" sad", " glad"))
GOOD = [{"text": f"film {i}", "label": i % 2} for i in range(3)]


@pytest.fixture
def on_the_hub(monkeypatch):
  """Replaces the hub by a table."""

  def put(table):
    hub = types.ModuleType("datasets")
    hub.load_dataset = lambda *hub, **options: table
    monkeypatch.setitem(sys.modules, "datasets", hub)

  return put


BAD = [
  ('{"text": "a", "label": -1}', "label column 'label' holds -1"),
  ('{"text": "a", "label": null}', "label column 'label' holds None"),
  ('{"text": "a", "label": NaN}', "label column 'label' holds nan"),
  ('{"text": "a", "label": 2}', "label column 'label' holds 2"),
  ('{"text": null, "label": 0}', "column 'text' is empty"),
  ('{"text": " ", "label": 0}', "column 'text' is empty"),
  ('{"text": "\\ud83d", "label": 0}', "half of a surrogate pair"),
  ('{"text": "a"}', "no column 'label'"),
  ('{"text": ', "broken JSON"),
  ("3", "found 3; expected a JSON object"),
]


@pytest.mark.parametrize("line, reason", BAD)
def test_a_bad_row_is_refused_or_left_out(tmp_path, line, reason):
  path = tmp_path / "a.jsonl"
  path.write_text(f"{json.dumps(GOOD[0])}\n{line}\n{json.dumps(GOOD[1])}\n")
  with pytest.raises(errors.UserError, match=rf"a\.jsonl row 2: .*{reason}"):
    sources.load(OWN, path, "train")
  policy = bad_rows.BadRows("drop")
  rows = sources.load(OWN, path, "train", bad_rows=policy)
  assert [row.fields for row in rows] == GOOD[:2]
  ((source, text),) = policy.dropped.items()
  assert source == f"{path} row 2" and reason in text


def test_the_sentence_names_the_way_out(tmp_path):
  path = tmp_path / "a.csv"
  path.write_text("text,label\na,\nb,1\n")
  with pytest.raises(errors.UserError, match=r"data\.bad_rows to 'drop'"):
    sources.load(OWN, path, "train")
  path.write_text("text,label\na,\n")
  with pytest.raises(errors.UserError, match=r"expects an integer.*\.$") as one:
    sources.load(OWN, path, "train")
  assert "bad_rows" not in str(one.value)
  with pytest.raises(
    errors.UserError, match=r"none of 1 rows can be used; the first: .* row 1:"
  ):
    sources.load(OWN, path, "train", bad_rows=bad_rows.BadRows("drop"))


# As if the repository held data: `on_the_hub` replaces the package `datasets`.
HEALTH = dataclasses.replace(tasks.get("health_fact"), hub_script=False)
SNLI = tasks.custom("snli", prompt="{claim}", options=(" Yes", " No", " ?"))


@pytest.mark.parametrize(
  "task, source, prefix",
  [
    (HEALTH, None, HEALTH.hub[0]),
    (SNLI, "hub:some/snli", "some/snli"),
  ],
)
@pytest.mark.parametrize("label", [-1, None])
def test_rows_of_the_hub_without_label(
  on_the_hub, caplog, task, source, prefix, label
):
  table = [{"claim": f"claim {i}", "label": i % 3} for i in range(8)]
  on_the_hub([*table, {"claim": "the odd one", "label": label}])
  policy = bad_rows.BadRows()
  with caplog.at_level(logging.WARNING):
    rows = sources.load(task, source, "train", bad_rows=policy)
  assert [row.fields for row in rows] == table
  assert "train: 1 of 9 rows are left out; the first: " in caplog.text
  assert list(policy.dropped) == [f"{prefix}/train row 9"]


def test_rows_of_the_hub_without_text(on_the_hub):
  on_the_hub([*GOOD, {"text": None, "label": 0}, {"text": "", "label": 0}])
  task = tasks.get("rotten_tomatoes")
  assert len(sources.load(task, None, "train")) == 3
  on_the_hub([*GOOD, {"text": "a", "label": 7}])
  with pytest.raises(errors.UserError, match=r"row 4: label .* holds 7"):
    sources.load(task, None, "train")


def test_a_split_without_labels(on_the_hub):
  on_the_hub([{"sentence": f"a {i}", "label": -1} for i in range(3)])
  task = tasks.get("sst2")
  with pytest.raises(errors.UserError, match=r"none of 3 rows .* holds -1"):
    sources.load(task, None, "test")
  assert len(sources.load(task, None, "test", labelled=False)) == 3


def test_a_copy_of_a_set_of_the_hub(tmp_path):
  (tmp_path / "train.jsonl").write_text(
    "".join(
      json.dumps({**row, "label": i - 1}) + "\n" for i, row in enumerate(GOOD)
    )
  )
  task = tasks.get("rotten_tomatoes")
  assert len(sources.load(task, tmp_path, "train")) == 2


@pytest.mark.parametrize(
  "name, fields",
  [
    ("commonsense_qa", {"answerKey": ""}),
    ("hellaswag", {"label": ""}),
    ("squad", {"answers": {"text": [], "answer_start": []}}),
  ],
)
def test_test_splits_of_the_hub(on_the_hub, name, fields):
  task = tasks.get(name)
  on_the_hub([dict(task.example), {**task.example, **fields}])
  assert len(sources.load(task, None, "test")) == 1


def _questions():
  """Rows of commonsense_qa, of which the second has an option twice."""
  return [
    tasks.Row(
      {
        "question": f"What has a wheel {i}?",
        "choices": {"label": ["A", "B", "C"], "text": ["car", "ram", third]},
        "answerKey": "A",
      },
      f"made up row {i}",
    )
    for i, third in enumerate(("cat", "ram", "hen"), 1)
  ]


def test_options_that_are_the_same_tokens(tiny_model, caplog):
  tokenizer = tokenizer_lib.load_tokenizer(tiny_model)
  task = tasks.get("commonsense_qa")
  policy = bad_rows.BadRows()
  with caplog.at_level(logging.WARNING):
    examples = encode_options.encode_rows(
      task, _questions(), tokenizer, max_length=64, bad_rows=policy
    )
  assert [e.source for e in examples] == ["made up row 1", "made up row 3"]
  assert "options ' ram' and ' ram'" in policy.dropped["made up row 2"]
  assert "1 of 3 rows are left out" in caplog.text
  assert encode_options.rows_of(_questions(), examples) == [
    _questions()[0],
    _questions()[2],
  ]
  own = tasks.custom("own", prompt="{q}", options=(" {a}", " {b}"))
  rows = [
    tasks.Row({"q": "x", "a": "yes", "b": b, "label": 0}, f"row {b}")
    for b in ("no", "yes")
  ]
  with pytest.raises(errors.UserError, match=r"row yes: .*same tokens.*'drop'"):
    encode_options.encode_rows(own, rows, tokenizer, max_length=64)
  (example,) = encode_options.encode_rows(
    own, rows, tokenizer, max_length=64, bad_rows=bad_rows.BadRows("drop")
  )
  assert example.source == "row no"


def test_a_run_counts_all_that_it_leaves_out(tiny_model, tmp_path):
  rows = [{"text": f"a warm tale {i}", "label": i % 2} for i in range(40)]
  rows[3]["label"] = "both"
  rows[5]["text"] = "tale " * 99
  (tmp_path / "train.jsonl").write_text(
    "".join(json.dumps(row) + "\n" for row in rows)
  )
  config = tiny.base_config()
  config.model.name, config.data.dir = str(tiny_model), str(tmp_path)
  config.data.task = "rotten_tomatoes"
  config.data.bad_rows = config.data.long_rows = "drop"
  config.data.num_test = config.data.num_selection = 1
  run = run_lib.make_run(config)
  examples = run.load_examples()
  assert len(examples.lower) + len(examples.upper) == 36
  run.write_dropped(epath.Path(tmp_path))
  first, second = report.read_jsonl(tmp_path / "dropped.jsonl")
  assert first["where"] == f"{tmp_path}/train.jsonl row 4"
  assert "holds 'both'" in first["reason"]
  assert second["where"] == f"{tmp_path}/train.jsonl row 6"
  assert "at most 64 fit" in second["reason"]
