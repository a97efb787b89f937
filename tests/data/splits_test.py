import csv
import json
import logging
import pathlib
import sys
import types

import pytest

from zofo_jax import errors, tasks
from zofo_jax.data import fingerprints, sources, tables, text_files
from zofo_jax.data import hub as hub_lib
from zofo_jax.data import splits as splits_lib

TASK = tasks.get("rotten_tomatoes")


def _write(path: pathlib.Path, records) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  return path


def _records(count, start=0):
  return [
    {"text": f"film number {i}", "label": i % 2, "extra": None}
    for i in range(start, start + count)
  ]


def _rows(count, start=0):
  return [
    tasks.Row(fields, f"made up row {i}")
    for i, fields in enumerate(_records(count, start), 1)
  ]


def _texts(some):
  return [row.fields["text"] for row in some]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_formats_agree(tmp_path, ending):
  records = _records(5)
  records[2]["text"] = 'a "quoted",\nlong café'
  path = tmp_path / f"validation.{ending}"
  if ending == "jsonl":
    _write(path, records)
  elif ending == "csv":
    with path.open("w", newline="", encoding="utf-8") as file:
      writer = csv.DictWriter(file, records[0])
      writer.writeheader()
      writer.writerows(records)
  else:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(records), path)
  rows = sources.load(TASK, tmp_path, "validation")
  assert _texts(rows) == [r["text"] for r in records]
  assert [TASK.right(row) for row in rows] == [(r["label"],) for r in records]
  assert rows[2].source == f"{path} row 3"


@pytest.mark.parametrize(
  "place", ["train.jsonl", "rotten_tomatoes/train.jsonl"]
)
def test_folder_or_folder_of_tasks(tmp_path, place):
  _write(tmp_path / place, _records(3))
  assert len(sources.load(TASK, tmp_path, "train")) == 3
  assert len(sources.load(TASK, str(tmp_path), "train")) == 3


def test_rows_to_predict_need_no_label(tmp_path):
  path = _write(tmp_path / "asked.jsonl", [{"text": "good"}])
  assert len(sources.load(TASK, path, "train", labelled=False)) == 1
  with pytest.raises(errors.UserError, match="row 1: no column 'label'"):
    sources.load(TASK, path, "train")


def test_configuration_folder_and_dev_file(tmp_path):
  task = tasks.get("wsc")
  _write(tmp_path / "wsc.fixed" / "dev.jsonl", [task.example])
  assert len(sources.load(task, tmp_path, "validation")) == 1


def test_one_file_is_train(tmp_path):
  path = _write(tmp_path / "mine.jsonl", _records(40))
  assert len(sources.load(TASK, path, "train")) == 40
  with pytest.raises(errors.UserError, match=r"one file.*no 'test'"):
    sources.load(TASK, path, "test")
  sets = splits_lib.load_splits(TASK, path)
  assert [len(s) for s in sets] == [16, 7, 7, 10]


@pytest.mark.parametrize(
  "text, sentence",
  [
    ('{"text": "a", "label": 0}\n{"text": \n', "row 2: broken JSON"),
    ('{"text": "a", "label": 0}\n\n[1]\n', r"row 3: found \[1\]; expected"),
    ("", "split 'train' has no rows"),
    ('{"txt": "a", "label": 0}', "row 1: no column 'text'.*'txt'"),
    ('{"text": "a", "label": 7}', "row 1: label column 'label' holds 7"),
    ('{"text": "  ", "label": 1}', "row 1: column 'text' is empty"),
    ('{"text": ["a"], "label": 1}', "row 1: .*of type list"),
  ],
)
def test_broken_jsonl_names_file_and_row(tmp_path, text, sentence):
  (tmp_path / "train.jsonl").write_text(text)
  with pytest.raises(errors.UserError, match=rf"train\.jsonl.*{sentence}"):
    sources.load(TASK, tmp_path, "train")


@pytest.mark.parametrize("line", ["just one", "a,1,2"])
def test_broken_csv_names_file_and_row(tmp_path, line):
  (tmp_path / "train.csv").write_text(f"text,label\ngood,1\n{line}\n")
  with pytest.raises(errors.UserError, match=r"train\.csv row 2 .*2 cells"):
    sources.load(TASK, tmp_path, "train")


def test_files_of_the_wrong_kind(tmp_path):
  (tmp_path / "train.jsonl").write_bytes(b'{"text": "caf\xe9", "label": 0}')
  with pytest.raises(errors.UserError, match="not UTF-8"):
    sources.load(TASK, tmp_path, "train")
  pytest.importorskip("pyarrow")
  (tmp_path / "a.parquet").write_bytes(b"no parquet here")
  with pytest.raises(errors.UserError, match="not a Parquet file"):
    sources.load(TASK, tmp_path / "a.parquet", "train")
  (tmp_path / "a.rtf").write_text("text")
  with pytest.raises(errors.UserError, match="unknown ending"):
    sources.load(TASK, tmp_path / "a.rtf", "train")


def test_missing_folders_and_files(tmp_path):
  _write(tmp_path / "movies" / "train.jsonl", _records(2))
  with pytest.raises(errors.UserError, match=r"No data folder.*'movies'"):
    sources.load(TASK, tmp_path / "movie", "train")
  with pytest.raises(errors.UserError, match=r"No data file .*movies\.jsonl"):
    sources.load(TASK, tmp_path / "movies.jsonl", "train")
  with pytest.raises(errors.UserError, match=r"no test\.jsonl.*train\.jsonl"):
    sources.load(TASK, tmp_path / "movies", "test")


class _Hub(types.ModuleType):
  """Stands in for the package datasets."""

  def __init__(self, splits):
    super().__init__("datasets")
    self.splits, self.asked = splits, []

  def load_dataset(self, hub, config, split):
    self.asked.append((hub, config, split))
    if split not in self.splits:
      raise FileNotFoundError(f"no {split}\nand a long explanation")
    return self.splits[split]

  def get_dataset_split_names(self, hub, config):
    return list(self.splits)


def test_hub_sets(monkeypatch, caplog):
  bad = {"text": "", "label": 1}
  hub = _Hub({"train": [*_records(40), bad], "test": _records(9, 50)})
  monkeypatch.setitem(sys.modules, "datasets", hub)
  with caplog.at_level(logging.WARNING):
    sets = splits_lib.load_splits(TASK, None)
  assert "train: 1 of 41 rows are left out; the first: " in caplog.text
  assert "row 41: column 'text' is empty" in caplog.text
  assert hub.asked[0] == (*TASK.hub, "train")
  assert len(sets.test) == 9
  assert sets.test[0].source.startswith(f"{TASK.hub[0]}/test row ")
  rows = sources.load(TASK, "hub:some/set/part", "train")
  assert len(rows) == 40
  assert hub.asked[-1] == ("some/set", "part", "train")
  with pytest.raises(
    errors.UserError,
    match=r"split 'validation' of 'some/set'.*: no validation$",
  ):
    sources.load(TASK, "hub:some/set", "validation")
  with pytest.raises(errors.UserError, match="is no hub id"):
    sources.load(TASK, "hub:set", "train")
  with pytest.raises(errors.UserError, match="mpqa has no hub set"):
    sources.load(tasks.get("mpqa"), None, "train")


def test_columns_of_a_set_without_rows(monkeypatch):
  monkeypatch.setitem(sys.modules, "datasets", _Hub({"train": []}))
  with pytest.raises(errors.UserError, match="some/set: there are no rows"):
    sources.columns(TASK, "hub:some/set")


def test_hub_names_of_splits(monkeypatch):
  task = tasks.get("mnli")
  hub = _Hub({"validation_matched": [task.example]})
  monkeypatch.setitem(sys.modules, "datasets", hub)
  assert len(sources.load(task, None, "validation")) == 1
  assert sources.has_split(task, None, "validation")
  assert not sources.has_split(task, None, "train")


def test_sets_are_disjoint_and_seeded():
  train, test = _rows(3000), _rows(1500, 5000)
  sets = splits_lib.split(TASK, train, test)
  assert [len(s) for s in sets] == [666, 334, 334, 1000]
  together = [text for part in sets for text in _texts(part)]
  assert len(set(together)) == len(together)
  assert sets == splits_lib.split(TASK, train, test)
  other = splits_lib.split(TASK, train, test, seed=1)
  assert set(_texts(other.lower)) != set(_texts(sets.lower))


def test_first_thousand_rows_are_mezo_s():
  numpy = pytest.importorskip("numpy")
  numpy.random.seed(7)
  expected = set(numpy.random.permutation(3000)[:1000])
  sets = splits_lib.split(TASK, _rows(3000), _rows(10, 5000), seed=7)
  drawn = {int(t.split()[-1]) for t in _texts(sets.lower + sets.upper)}
  assert drawn == expected


def test_same_text_never_in_two_sets():
  train = _rows(60) + _rows(60) + _rows(10, 500)  # twice, and ten of the test's
  sets = splits_lib.split(TASK, train, _rows(10, 500))
  together = [text for part in sets for text in _texts(part)]
  assert len(set(together)) == len(together) == 70


def test_rows_that_differ_in_an_optional_column_differ():
  task = tasks.formatted("own", "alpaca")
  fields = {"instruction": "Good or bad?", "output": "Good."}
  inputs = [*({"input": f"film {i}"} for i in range(6)), {}, {"input": " "}]
  rows = [tasks.Row({**fields, **one}, "a row") for one in (*inputs, *inputs)]
  sets = splits_lib.split(task, rows)
  inputs = [row.fields.get("input", " ") for part in sets for row in part]
  assert sorted(inputs) == [" ", *(f"film {i}" for i in range(6))]


def test_test_rows_held_out_of_train():
  counts = splits_lib.Counts(lower=30, upper=20, selection=10, test=40)
  sets = splits_lib.split(TASK, _rows(100), counts=counts)
  assert [len(s) for s in sets] == [30, 20, 10, 40]
  assert len({t for part in sets for t in _texts(part)}) == 100


@pytest.mark.parametrize(
  "total, lower, upper", [(250, 167, 83), (400, 267, 133), (554, 370, 184)]
)
def test_small_sets_follow_the_rule_of_thirds(total, lower, upper):
  counts = splits_lib.Counts(selection=0)
  sets = splits_lib.split(TASK, _rows(total), _rows(9, 5000), counts=counts)
  assert (len(sets.lower), len(sets.upper)) == (lower, upper)
  assert sets.selection == sets.upper


def test_small_sets_keep_selection_apart(caplog):
  with caplog.at_level(logging.WARNING):
    sets = splits_lib.split(TASK, _rows(250), _rows(9, 5000))
  assert "rotten_tomatoes: train has 250 different rows" in caplog.text
  assert [len(s) for s in sets] == [126, 62, 62, 9]


def test_too_few_rows_and_bad_counts():
  with pytest.raises(errors.UserError, match=r"3 different rows .* too few"):
    splits_lib.split(TASK, _rows(3), _rows(9, 5000))
  with pytest.raises(errors.UserError, match=r"data\.num_upper is 0"):
    splits_lib.split(TASK, _rows(9), counts=splits_lib.Counts(upper=0))


def test_k_shot_is_balanced_and_seeded():
  train = _rows(100)
  drawn = splits_lib.k_shot(TASK, train, 5, seed=3)
  assert sorted(row.fields["label"] for row in drawn) == [0] * 5 + [1] * 5
  assert drawn == splits_lib.k_shot(TASK, train, 5, seed=3)
  assert drawn != splits_lib.k_shot(TASK, train, 5, seed=4)
  with pytest.raises(errors.UserError, match="label 0 has 50 rows; 51"):
    splits_lib.k_shot(TASK, train, 51, seed=0)


def test_shots_make_balanced_sets_that_share_nothing():
  lopsided = _rows(200)
  for row in lopsided[:160]:
    row.fields["label"] = 0
  counts = splits_lib.Counts(selection=30, test=50)
  for seed in (0, 1):
    sets = splits_lib.split(TASK, lopsided, counts=counts, shots=8, seed=seed)
    for part in (sets.lower, sets.upper):
      assert sorted(TASK.right(row)[0] for row in part) == [0] * 8 + [1] * 8
    assert (len(sets.selection), len(sets.test)) == (30, 50)
    texts = [text for part in sets for text in _texts(part)]
    assert len(texts) == len(set(texts))
  apart = splits_lib.split(
    TASK, lopsided, _rows(9, 900), counts=counts, shots=8
  )
  assert len(apart.lower) == 16 and len(apart.test) == 9
  with pytest.raises(errors.UserError, match=r"20 different .*data\.shots"):
    splits_lib.split(TASK, _rows(20), counts=counts, shots=5)


def test_files_of_one_beginning_as_metaicl_names_them(tmp_path):
  for split, count in (("train", 40), ("dev", 4), ("test", 6)):
    _write(tmp_path / f"mrpc_16_100_{split}.jsonl", _records(count, count * 99))
  source = tmp_path / "mrpc_16_100"
  assert len(sources.load(TASK, source, "train")) == 40
  assert len(splits_lib.load_splits(TASK, source).test) == 4
  assert len(splits_lib.load_splits(TASK, source, test_split="test").test) == 6
  with pytest.raises(errors.UserError, match="No data folder"):
    sources.load(TASK, tmp_path / "mrpc_16_200", "train")


def test_of_a_large_table_only_what_is_needed_is_read(monkeypatch, tmp_path):
  """The rows are those of reading it whole, as long as none is bad."""
  parquet = pytest.importorskip("pyarrow.parquet")
  pyarrow = pytest.importorskip("pyarrow")
  records = [{"text": f"film {i % 280}", "label": i % 2} for i in range(300)]
  for number, part in enumerate((records[:190], records[190:])):
    path = tmp_path / f"train-{number:05}-of-00002.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(part), path)
  _write(tmp_path / "validation.jsonl", _records(30, 500))
  counts = splits_lib.Counts(9, 4, 3, 5)

  def load(source):
    return splits_lib.load_splits(TASK, source, counts=counts, seed=3)

  whole = load(tmp_path)
  read = []
  rows_of = tables._table_rows
  monkeypatch.setattr(
    tables, "_table_rows", lambda *args: read.append(args[1]) or rows_of(*args)
  )
  monkeypatch.setattr(splits_lib, "_MAX_WHOLE", 100)
  assert load(tmp_path) == whole
  assert sum(table.num_rows for table in read) == 4 * sum(counts)
  hub = _Hub({"train": records, "validation": _records(30, 500)})
  monkeypatch.setitem(sys.modules, "datasets", hub)

  def fields(sets):
    return [row.fields for part in sets for row in part]

  def number(row):
    return row.source.split(" row ")[1]

  of_hub = load("hub:some/set")
  assert fields(of_hub) == fields(whole)
  # A script's converted copy is read in the same way.
  hub.load_dataset = hub.get_dataset_split_names = _raise_script
  monkeypatch.setattr(hub_lib, "_converted", lambda *_: tmp_path)
  read.clear()
  assert load("hub:some/set") == of_hub
  assert sum(table.num_rows for table in read) == 4 * sum(counts)
  # An Arrow stream of several batches, and a file.
  for name, new in (("stream", "new_stream"), ("file", "new_file")):
    table, folder = pyarrow.Table.from_pylist(records), tmp_path / name
    _write(folder / "validation.jsonl", _records(30, 500))
    with getattr(pyarrow.ipc, new)(
      folder / "train.arrow", table.schema
    ) as sink:
      sink.write_table(table, max_chunksize=70)
    read.clear()
    of_arrow = load(folder)
    assert fields(of_arrow) == fields(whole)
    assert [number(r) for r in of_arrow.lower] == [
      number(r) for r in of_hub.lower
    ]
    assert sum(table.num_rows for table in read) == 4 * sum(counts)


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_of_a_large_text_only_what_is_needed_is_parsed(
  monkeypatch, tmp_path, ending
):
  records = [{"text": f"film {i % 280}", "label": i % 2} for i in range(300)]
  path = _write(tmp_path / f"train.{ending}", records)
  if ending == "csv":
    lines = [f"{r['text']},{r['label']}" for r in records]
    path.write_text("\n".join(["text,label", *lines]))
  _write(tmp_path / "validation.jsonl", _records(30, 500))
  counts = splits_lib.Counts(9, 4, 3, 5)
  whole = splits_lib.load_splits(TASK, tmp_path, counts=counts, seed=3)
  parsed = []
  name = {"jsonl": "_json_line", "csv": "_csv_row"}[ending]
  parse = getattr(text_files, name)

  def record(value, source, **options):
    parsed.append(source)
    return parse(value, source, **options)

  monkeypatch.setattr(text_files, name, record)
  monkeypatch.setattr(splits_lib, "_MAX_WHOLE", 100)
  part = splits_lib.load_splits(TASK, tmp_path, counts=counts, seed=3)
  assert part == whole
  assert len([s for s in parsed if "train" in s]) == 4 * sum(counts)


def _raise_script(*args, **options):
  raise RuntimeError("Dataset scripts are no longer supported")


def test_sets_of_content_are_those_of_any_order_of_files(tmp_path):
  records, test = _records(60), _records(20, 500)
  shuffled = [records[7 * i % 60] for i in range(60)]
  for name, rows, end in (("a", records, 25), ("b", shuffled, 40)):
    for number, part in enumerate((rows[:end], rows[end:])):
      _write(tmp_path / name / f"train-{number:05}-of-00002.jsonl", part)
  for name, rows in (("a", test), ("b", test[::-1])):
    _write(tmp_path / name / "validation.jsonl", rows)

  def load(name, **options):
    sets = splits_lib.load_splits(TASK, tmp_path / name, **options)
    return fingerprints.of_splits(sets._asdict())

  assert load("a", order="content") == load("b", order="content")
  assert load("a", order="content", seed=1) != load("b", order="content")
  assert load("a") != load("b")
