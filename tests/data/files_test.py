"""Files as spreadsheets, pandas, pyarrow and datasets write them."""

import codecs
import csv
import gzip
import io
import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from zofo_jax import errors, tasks
from zofo_jax.data import files, layouts, sources

TASK = tasks.get("rotten_tomatoes")
OWN = tasks.custom("mood", prompt="{text} I am", options=(" sad", " glad"))

# Everything a cell may hold that has a UTF-8 form.
TEXTS = st.text(
  st.characters(codec="utf-8", exclude_characters="\x00"), max_size=20
).map(lambda text: f"a{text}b")
TABLES = st.lists(
  st.fixed_dictionaries({"text": TEXTS, "label": st.integers(0, 1)}),
  min_size=1,
  max_size=4,
)
quickly = hypothesis.settings(
  max_examples=50,
  deadline=None,
  derandomize=True,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


def rows_of(path, task=OWN):
  """Gives (text, label) of all rows of a file."""
  return [
    (row.fields["text"], task.right(row)[0])
    for row in sources.load(task, path, "train")
  ]


def expected(records):
  return [(record["text"], record["label"]) for record in records]


def csv_text(records, delimiter=",", end="\r\n", quoting=csv.QUOTE_MINIMAL):
  file = io.StringIO()
  writer = csv.DictWriter(
    file,
    ["text", "label"],
    delimiter=delimiter,
    lineterminator=end,
    quoting=quoting,
  )
  writer.writeheader()
  writer.writerows(records)
  return file.getvalue()


def write(path, text, encoding="utf-8"):
  content = text.encode(encoding)
  path.write_bytes(
    gzip.compress(content) if path.suffix.lower() == ".gz" else content
  )
  return path


# What programs write is read to the same rows.


@quickly
@hypothesis.given(
  records=TABLES,
  name=st.sampled_from(["a.csv", "a.CSV", "a.tsv", "a.csv.gz", "a.Tsv.GZ"]),
  delimiter=st.sampled_from([",", ";", "\t"]),
  end=st.sampled_from(["\r\n", "\n"]),
  quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
  encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
  first=st.booleans(),
)
def test_csv_of_spreadsheets(
  tmp_path, records, name, delimiter, end, quoting, encoding, first
):
  text = csv_text(records, delimiter, end, quoting)
  text = f"sep={delimiter}{end}{text}" if first else text
  path = write(tmp_path / name, text, encoding)
  assert rows_of(path) == expected(records)


@quickly
@hypothesis.given(
  records=TABLES,
  name=st.sampled_from(["a.json", "a.jsonl", "a.JSON", "a.jsonl.gz"]),
  ascii_only=st.booleans(),
  layout=st.sampled_from(["lines", "array", "indented array"]),
  end=st.sampled_from(["\r\n", "\n"]),
  encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_json_lines_and_arrays(
  tmp_path, records, name, ascii_only, layout, end, encoding
):
  if layout == "lines":
    text = "".join(
      json.dumps(record, ensure_ascii=ascii_only) + end for record in records
    )
  else:
    indent = 2 if layout == "indented array" else None
    text = json.dumps(records, ensure_ascii=ascii_only, indent=indent)
  path = write(tmp_path / name, text, encoding)
  assert rows_of(path) == expected(records)


@quickly
@hypothesis.given(
  records=TABLES,
  kind=st.sampled_from(["int64", "float64", "string", "bool", "dictionary"]),
  row_group_size=st.integers(1, 3),
)
def test_parquet_of_pyarrow(tmp_path, records, kind, row_group_size):
  arrow = pytest.importorskip("pyarrow")
  parquet = pytest.importorskip("pyarrow.parquet")
  labels = arrow.array([record["label"] for record in records])
  if kind == "dictionary":
    labels = labels.cast("string").dictionary_encode()
  else:
    labels = labels.cast(arrow.type_for_alias(kind))
  texts = arrow.array([record["text"] for record in records])
  path = tmp_path / "a.parquet"
  parquet.write_table(
    arrow.table({"text": texts.cast(arrow.large_string()), "label": labels}),
    path,
    row_group_size=row_group_size,
  )
  assert rows_of(path) == expected(records)


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "parquet"])
@pytest.mark.parametrize("gap", [False, True])
def test_what_pandas_writes(tmp_path, ending, gap):
  pandas = pytest.importorskip("pandas")
  records = [{"text": f'a "{i}",\nfilm\t', "label": i % 2} for i in range(4)]
  table = pandas.DataFrame(records)
  if gap:  # which makes floats of the labels
    table.loc[4] = ["no label", float("nan")]
    assert table["label"].dtype == float
  path = tmp_path / f"a.{ending}"
  if ending in ("csv", "tsv"):  # with an index column that has no name
    table.to_csv(path, sep="\t" if ending == "tsv" else ",")
  elif ending == "parquet":
    table.to_parquet(path)
  else:
    table.to_json(path, orient="records", lines=ending == "jsonl")
  if gap:
    with pytest.raises(errors.UserError, match=rf"a\.{ending} row 5: .*label"):
      rows_of(path)
    table[:4].to_csv(path := tmp_path / "floats.csv")
    assert "1.0" in path.read_text()
  assert rows_of(path) == expected(records)


@pytest.mark.parametrize("ending", ["csv", "json", "array.json", "parquet"])
def test_what_datasets_writes(tmp_path, ending):
  datasets = pytest.importorskip("datasets")
  records = [{"text": f'a "{i}",\nfilm', "label": i % 2} for i in range(4)]
  table = datasets.Dataset.from_list(records)
  path = tmp_path / f"a.{ending}"
  options = {"lines": False} if ending == "array.json" else {}
  getattr(table, f"to_{ending.split('.')[-1]}")(path, **options)
  assert rows_of(path) == expected(records)


def test_what_datasets_saves_to_disk(tmp_path):
  datasets = pytest.importorskip("datasets")
  records = [{"text": f"film {i}", "label": i % 2} for i in range(4)]
  table = datasets.Dataset.from_list(records)
  datasets.DatasetDict(train=table).save_to_disk(
    tmp_path, num_shards={"train": 2}
  )
  assert rows_of(tmp_path) == expected(records)


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
  mark = codecs.BOM_UTF8
  (tmp_path / "a.csv").write_bytes(mark + b"text,label\ngood,1\n")
  (tmp_path / "a.jsonl").write_bytes(mark + b'{"text": "good", "label": 1}\n')
  for name in ("a.csv", "a.jsonl"):
    assert rows_of(tmp_path / name) == [("good", 1)]


def test_long_cells(tmp_path):
  long = "word " * 100_000
  path = write(tmp_path / "a.csv", csv_text([{"text": long, "label": 1}]))
  assert rows_of(path) == [(long, 1)]


# What cannot be read is named with its file and row.


@pytest.mark.parametrize(
  "name, text, sentence",
  [
    (
      "a.csv",
      "text,label,text\na,0,b\n",
      "a.csv: .*names the column 'text' tw",
    ),
    ("a.tsv", "text\tlabel\t label\na\t0\t1\n", "column 'label' twice"),
    (
      "a.jsonl",
      '{"text": "a", "label": 0, "label": 1}',
      "row 1: .*'label' occ",
    ),
    ("a.json", '[{"text": "a"}, 3]', "row 1: no column 'label'"),
    ("a.json", '[{"text": "a", "label": 0}, 3]', "row 2: found 3; exp"),
    ("a.jsonl", "null", "row 1: found null; expected a JSON object"),
    (
      "a.jsonl",
      '{"text": "a", "label": 0, "tree": ' + "[" * 600 + "]" * 600 + "}",
      r"row 1: .*nested more than 100 deep",
    ),
    (
      "a.csv",
      "text,label\na,0\ntext,label\nb,1\n",
      r"row 2 \(line 3\): repeats the header",
    ),
    (
      "a.csv",
      "text,label\na,0\n\ufefftext,label\nb,1\n",
      r"row 2 \(line 3\): starts with a byte-order mark",
    ),
    (  # as GLUE's files, which have no quoted cells
      "a.tsv",
      'text\tlabel\nc\t1\n"a film\t1\nfine\t0\nb"\t0\n',
      r"row 2 \(line 5\): a quoted cell spans 3 lines, each of which",
    ),
    ("a.json", '[{"text": "a",', r"a\.json: broken JSON.*one array of objects"),
    ("a.json", "[" * 100_000, r"a\.json: broken JSON"),
    (
      "a.csv",
      'text,label\n"a,0\nb,1\n',
      r"line 3: broken CSV \(unexpected end",
    ),
    ("a.csv", "text,label\na,0\nb\n", r"row 2 \(line 3\): found 1 cells; .* 2"),
    ("a.csv.gz", None, "a.csv.gz: cannot be read"),
    ("a.csv", None, "a.csv: cannot be read"),
  ],
)
def test_broken_files(tmp_path, name, text, sentence):
  path = tmp_path / name
  if text is None:
    path.write_bytes(gzip.compress(b"text,label\ngood,1\n" * 999)[:-9])
  else:
    path.write_text(text)
  with pytest.raises(errors.UserError, match=sentence):
    rows_of(path)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-be"])
def test_utf_16_without_a_mark(tmp_path, name, encoding):
  text = "text,label\na,0\n" if name == "a.csv" else '{"text": "a"}'
  path = write(tmp_path / name, text, encoding)
  with pytest.raises(errors.UserError, match=f"{name}: .*byte-order mark"):
    rows_of(path)


def test_compressed_text_without_the_ending(tmp_path):
  text = csv_text([{"text": "good", "label": 1}])
  (tmp_path / "a.csv").write_bytes(gzip.compress(text.encode()))
  assert rows_of(tmp_path / "a.csv") == [("good", 1)]


@pytest.mark.parametrize("kind", ["new_file", "new_stream"])
def test_arrow_files_and_streams(tmp_path, kind):
  arrow = pytest.importorskip("pyarrow")
  ipc = pytest.importorskip("pyarrow.ipc")
  table = arrow.table({"text": ["good"], "label": [1]})
  with getattr(ipc, kind)(tmp_path / "a.arrow", table.schema) as writer:
    writer.write_table(table)
  assert rows_of(tmp_path / "a.arrow") == [("good", 1)]


@pytest.mark.parametrize(
  "number, kind", [(2**55, ("us",)), (0, ("us", "Mars/Base"))]
)
def test_a_column_that_python_has_no_values_for(tmp_path, caplog, number, kind):
  arrow = pytest.importorskip("pyarrow")
  parquet = pytest.importorskip("pyarrow.parquet")
  when = arrow.array([number * 8], arrow.timestamp(*kind))
  table = arrow.table({"text": ["good"], "label": [1], "when": when})
  parquet.write_table(table, tmp_path / "a.parquet")
  assert rows_of(tmp_path / "a.parquet") == [("good", 1)]
  assert "a.parquet: column 'when' is left out" in caplog.text


def test_parquet_with_a_repeated_name(tmp_path):
  arrow = pytest.importorskip("pyarrow")
  parquet = pytest.importorskip("pyarrow.parquet")
  columns = [arrow.array(["a"]), arrow.array([0]), arrow.array([1])]
  table = arrow.Table.from_arrays(columns, ["text", "label", "label"])
  parquet.write_table(table, tmp_path / "a.parquet")
  with pytest.raises(errors.UserError, match=r"two columns .* name 'label'"):
    rows_of(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_half_a_surrogate_pair(tmp_path, name):
  path = tmp_path / name
  path.write_text(
    '{"text": "fine", "label": 0}\n{"text": "\\ud83d", "label": 1}'
  )
  with pytest.raises(
    errors.UserError, match=rf"{name} row 2: column 'text' .*half of a surrogat"
  ):
    rows_of(path)


def test_bytes_that_are_not_utf_8(tmp_path):
  (tmp_path / "a.csv").write_bytes(b"text,label\ngood,1\ncaf\xe9,0\n")
  with pytest.raises(errors.UserError, match=r"a\.csv line 3: not UTF-8"):
    rows_of(tmp_path / "a.csv")


LINES = '\n{"text": "a", "n": 1}\r\n \n{"text": \n3\n{"text": "caf\u00e9"}'
CELLS = 'text,label\n\n"a\nb",0\nc\nd,1\ntext,label\ncaf\u00e9,1\n'


@pytest.mark.parametrize(
  "name, text, encoding",
  [
    ("a.jsonl", LINES, "utf-8"),
    ("a.jsonl.gz", LINES, "utf-16"),
    ("a.json", '[{"text": "a"}, 3, {"text": "b"}]', "utf-8-sig"),
    ("a.csv", CELLS, "utf-8"),
    ("a.csv.gz", "sep=,\n" + CELLS, "utf-8-sig"),
  ],
)
def test_rows_that_are_chosen_are_those_of_the_whole(
  tmp_path, name, text, encoding
):
  """Broken ones too, with their numbers and lines."""
  path = write(tmp_path / name, text, encoding)
  whole = list(map(repr, files.read(path)))
  order = [*range(len(whole))][::-1]

  def choose(total):
    assert total == 2 * len(whole)
    return np.array([i + len(whole) for i in order[1:]] + order)

  chosen = list(map(repr, files.read_all([path, path], choose)))
  assert len(whole) > 2
  assert chosen == [whole[i] for i in (*order[1:], *order)]
  assert repr(files.first(path)) == whole[0]


@pytest.mark.parametrize("line", [1, 5_000])
def test_the_line_that_is_not_utf_8(tmp_path, line):
  """Also far behind what is read at a time."""
  path = tmp_path / "a.jsonl.gz"
  lines = [b'{"text": "a film"}\n'] * 6_000
  lines[line - 1] = b'{"text": "caf\xe9"}\n'
  path.write_bytes(gzip.compress(b"".join(lines)))
  sentence = rf"a\.jsonl\.gz line {line}: not UTF-8 text"
  with pytest.raises(errors.UserError, match=sentence):
    files.read(path)
  with pytest.raises(errors.UserError, match=sentence):
    files.read_all([path], lambda total: np.arange(0))


def test_the_first_row_that_can_be_read(tmp_path):
  path = write(tmp_path / "a.jsonl", '3\n{"text": "a"}\n{"b": "c"}\n')
  assert files.first(path).fields == {"text": "a"}
  assert files.first(write(path, "3\n")) is None


# Where the files of a split are.


def put(path, *numbers):
  parquet = pytest.importorskip("pyarrow.parquet")
  arrow = pytest.importorskip("pyarrow")
  path.parent.mkdir(parents=True, exist_ok=True)
  records = [{"text": f"film {i}", "label": i % 2} for i in numbers]
  parquet.write_table(arrow.Table.from_pylist(records), path)


@pytest.mark.parametrize(
  "names",
  [
    ["data/train-00000-of-00001.parquet"],
    ["data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"],
    ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
    [f"train-{i:05}-of-00011.parquet" for i in range(11)],
    ["default/train/0000.parquet", "default/train/0001.parquet"],
    ["rotten_tomatoes/train-00000-of-00001.parquet"],
    ["plain_text/train-00000-of-00001.PARQUET"],
  ],
)
def test_what_hf_download_leaves(tmp_path, names):
  for i, name in reversed([*enumerate(names)]):
    put(tmp_path / name, 2 * i, 2 * i + 1)
  (tmp_path / "README.md").write_text("card")
  rows = sources.load(TASK, tmp_path, "train")
  assert [r.fields["text"] for r in rows] == [
    f"film {i}" for i in range(2 * len(names))
  ]
  assert sources.has_split(TASK, tmp_path, "train")
  assert not sources.has_split(TASK, tmp_path, "test")


def test_a_folder_for_each_configuration(tmp_path):
  for name in ("cola", "sst2", "rte"):
    put(tmp_path / name / "validation-00000-of-00001.parquet", 1)
  (path,) = layouts.find(tmp_path, tasks.get("sst2"), "validation")
  assert path.parent.name == "sst2"
  task = tasks.get("mnli")
  put(tmp_path / "mnli" / "validation_matched-00000-of-00001.parquet", 1)
  (path,) = layouts.find(tmp_path, task, "validation")
  assert path.parent.name == "mnli"
  assert not layouts.find(tmp_path, tasks.get("qqp"), "validation")


def test_a_configuration_with_the_name_of_another_task(tmp_path):
  task = tasks.get("tweet_eval_emotion")
  put(tmp_path / "emotion" / "train.parquet", 1)
  (path,) = layouts.find(tmp_path, task, "train")
  assert path.parent.name == "emotion"  # as in the data set's own repository
  put(tmp_path / "tweet_eval_emotion" / "train.parquet", 2)
  (path,) = layouts.find(tmp_path, task, "train")
  assert path.parent.name == "tweet_eval_emotion"


def test_splits_are_of_one_folder(tmp_path):
  put(tmp_path / "data" / "train-00000-of-00001.parquet", 1)
  put(tmp_path / "rotten_tomatoes" / "test.parquet", 2)
  assert not layouts.find(tmp_path, TASK, "test")


@pytest.mark.parametrize(
  "names, sentence",
  [
    (["train-00000-of-00002.parquet"], "expected all shards"),
    (
      ["train-00000-of-00001.parquet", "train-00000-of-00001-aa.parquet"],
      "expected all shards of a split, each once",
    ),
    (
      ["train.csv", "train.parquet"],
      "and train.parquet; expected one file",
    ),
    (
      ["train.parquet", "data/train-00000-of-00001.parquet"],
      r"holds train\.parquet and data/train-00000-of-00001\.parquet; expected",
    ),
    (
      ["train.csv", "train-00000-of-00001.csv"],
      r"holds train\.csv and train-00000-of-00001\.csv; expected one file",
    ),
    (
      ["train.parquet", "train/0000.parquet"],
      r"holds train\.parquet and train/0000\.parquet; expected one file",
    ),
    (
      ["train.parquet", "dev.parquet", "validation.parquet"],
      r"holds validation\.parquet and dev\.parquet; .* split 'validation'",
    ),
    (
      ["train.parquet", "test.parquet", "rotten_tomatoes/test.parquet"],
      r"holds test\.parquet and rotten_tomatoes/test\.parquet; expected",
    ),
  ],
)
def test_files_that_do_not_make_a_split(tmp_path, names, sentence):
  for name in names:
    put(tmp_path / name, 1)
  with pytest.raises(errors.UserError, match=sentence):
    sources.load(TASK, tmp_path, "train")


@pytest.mark.parametrize("name", ["valid", "dev", "val", "eval", "evaluation"])
def test_names_of_a_split(tmp_path, name):
  put(tmp_path / "train.parquet", 1)
  put(tmp_path / f"{name}.parquet", 2)
  (path,) = layouts.find(tmp_path, TASK, "validation")
  assert path.stem == name


def test_files_of_no_split_are_named(tmp_path, caplog):
  for name in ("train", "train2", "val", "Test_2", "notes"):
    put(tmp_path / f"{name}.parquet", 1)
  (tmp_path / "train.py").write_text("")
  sources.load(OWN, tmp_path, "train")
  assert "are not read: Test_2.parquet, train2.parquet; ex" in caplog.text


TEXTS = tasks.formatted("texts", "text")


@pytest.mark.parametrize("ending", ["txt", "TXT.gz", "md"])
def test_a_plain_text_is_a_row_a_line(tmp_path, ending):
  """As `datasets` reads it, but without blank lines."""
  path = tmp_path / f"train.{ending}"
  text = "\ufeff A day.\r\n\r\n  \nIt rained. \n".encode()
  path.write_bytes(gzip.compress(text) if "gz" in ending else text)
  for source in (path, tmp_path):
    rows = sources.load(TEXTS, source, "train")
    assert [row.fields for row in rows] == [
      {"text": " A day."},
      {"text": "It rained. "},
    ]
    assert [row.source for row in rows] == [f"{path} row 1", f"{path} row 4"]


def test_a_folder_of_plain_texts_is_a_row_a_file(tmp_path):
  for name in ("b.txt", "a.md", "c.txt"):
    (tmp_path / name).write_text(f"{name}\n\nand more.\n")
  rows = sources.load(TEXTS, tmp_path, "train")
  assert [row.source for row in rows] == [
    str(tmp_path / name) for name in ("a.md", "b.txt", "c.txt")
  ]
  assert rows[1].fields == {"text": "b.txt\n\nand more.\n"}
  assert sources.columns(TEXTS, str(tmp_path)) == ("text",)
  assert not sources.has_split(TEXTS, tmp_path, "validation")
  chosen = sources.load(
    TEXTS, tmp_path, "train", choose=lambda total: np.array([total - 1, 0])
  )
  assert chosen == [rows[2], rows[0]]
  # Beside other data, a text may say what they are.
  (tmp_path / "chats.jsonl").write_text("{}")
  with pytest.raises(errors.UserError, match=r"no train\.jsonl .* a\.md, b"):
    sources.load(TEXTS, tmp_path, "train")
  with pytest.raises(errors.UserError, match=r"no train\.jsonl"):
    sources.load(OWN, tmp_path, "train")


@pytest.mark.parametrize("ending", files.ENDINGS)
def test_every_ending_is_found_in_a_folder(tmp_path, ending):
  path = tmp_path / f"train{ending.upper()}"
  path.write_bytes(b"")
  assert layouts.find(tmp_path, TASK, "train") == [path]
