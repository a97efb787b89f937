import json
import os
import pathlib
import string
import subprocess
import sys

import pytest

from zofo_jax import errors, tasks
from zofo_jax.commands import tasks as tasks_command
from zofo_jax.data import hub, sources

DATA = pathlib.Path(
  os.environ.get("ZOFO_TEST_DATA")
  or pathlib.Path(__file__).parents[3] / "shared" / "data"
)
DATA_TASKS = (
  json.loads((DATA / "labels.json").read_text())
  if (DATA / "labels.json").exists()
  else {}
)
_NLI = {"premise": "It froze.", "hypothesis": "It was cold"}
_PAIR = {"sentence1": "One.", "sentence2": "Two."}
_NO_YES = ["No", "Yes"]

# task, version, row, prompt, options; typed by hand from the published forms.
GOLDEN = [
  (
    ("sst2", 0, {"sentence": "a fine film . "}),
    ("a fine film . It was", [" terrible", " great"]),
  ),
  (
    ("hellaswag", 0, tasks.get("hellaswag").example),
    (
      "Skating: A girl ties her skates. She",
      [" eats the ice.", " glides onto the rink."],
    ),
  ),
  (
    ("openbookqa", 0, tasks.get("openbookqa").example),
    (
      "Question: Where would you keep milk?\nAnswer:",
      [" oven", " fridge"],
    ),
  ),
  (
    ("sst2", 1, {"sentence": "a fine film ."}),
    ("a fine film .", [" terrible", " great"]),
  ),
  (
    ("rte", 0, _NLI),
    (
      'It froze.\nDoes this mean that "It was cold" is true? Yes or No?\n',
      ["Yes", "No"],
    ),
  ),
  (("rte", 1, _NLI), ('It froze.\n"It was cold"\n', ["Yes", "No"])),
  (
    ("cb", 0, _NLI),
    (
      'Suppose It froze. Can we infer that "It was cold"? Yes, No, or Maybe?\n',
      ["Yes", "No", "Maybe"],
    ),
  ),
  (
    ("boolq", 0, {"passage": "Ice is cold.", "question": "is ice cold"}),
    ("Ice is cold. Is ice cold?", [" No", " Yes"]),
  ),
  (
    ("boolq", 1, {"passage": "Ice is cold.", "question": "Is ice cold?"}),
    ("Ice is cold. Is ice cold?" + r"\n\n", _NO_YES),
  ),
  (
    ("boolq", 2, {"passage": "Ice is cold.", "question": "is ice cold"}),
    ("Ice is cold. Is ice cold?\n", _NO_YES),
  ),
  (
    (
      "wsc",
      0,
      {"text": "Al met Bo. He left.", "span1_text": "Al", "span2_text": "He"},
    ),
    (
      'Al met Bo. He left.\nIn the previous sentence, does the pronoun "he" '
      "refer to Al? Yes or No?\n",
      _NO_YES,
    ),
  ),
  (
    (
      "wic",
      0,
      {"word": "ring", "sentence1": "A ring.", "sentence2": "Phones ring."},
    ),
    (
      'Does the word "ring" have the same meaning in these two sentences? '
      "Yes, No?\nA ring.\nPhones ring.\n",
      _NO_YES,
    ),
  ),
  (
    (
      "multirc",
      0,
      {"paragraph": "Al ate figs.", "question": "Who ate?", "answer": "Al"},
    ),
    (
      'Al ate figs.\nQuestion: Who ate?\nI found this answer "Al". Is that '
      "correct? Yes or No?\n",
      _NO_YES,
    ),
  ),
  (
    (
      "copa",
      0,
      {
        "premise": "The dog barked. ",
        "choice1": "The cat ran.",
        "choice2": "I woke up.",
        "question": "effect",
      },
    ),
    ("The dog barked so", [" the cat ran.", " I woke up."]),
  ),
  (
    (
      "copa",
      0,
      {
        "premise": "The dog barked!",
        "choice1": "It's late.",
        "choice2": "It saw a cat.",
        "question": "cause",
      },
    ),
    ("The dog barked! because", [" it's late.", " it saw a cat."]),
  ),
  (
    (
      "copa",
      1,
      {
        "premise": "The dog barked.",
        "choice1": "The cat ran.",
        "choice2": "I woke up.",
        "question": "effect",
      },
    ),
    ("The dog barked", [" the cat ran.", " I woke up."]),
  ),
  (
    (
      "record",
      0,
      {
        "passage": "A won.\n@highlight\nB lost",
        "query": "The cup went to @placeholder on Sunday",
        "entities": ["A", "B", "A"],
        "answers": ["B"],
      },
    ),
    (
      "A won.\n- B lost\n-",
      [" The cup went to A on Sunday", " The cup went to B on Sunday"],
    ),
  ),
  (
    (
      "winogrande",
      0,
      {
        "sentence": "The key fits the lock as the _ is new.",
        "option1": "key",
        "option2": "lock",
      },
    ),
    (
      "The key fits the lock as the",
      [" key is new.", " lock is new."],
    ),
  ),
  (
    (
      "winogrande",
      0,
      {"sentence": "_'s hat fell.", "option1": "Al", "option2": "Bo"},
    ),
    ("", ["Al's hat fell.", "Bo's hat fell."]),
  ),
  (
    (
      "squad",
      0,
      {
        "title": "Figs",
        "context": "Figs are sweet.",
        "question": "What are figs?",
        "answers": {"text": ["sweet", "sweet", "very sweet"]},
      },
    ),
    (
      "Title: Figs\nContext: Figs are sweet.\nQuestion: What are figs?\n"
      "Answer:",
      [" sweet\n", " very sweet\n"],
    ),
  ),
  (
    (
      "drop",
      0,
      {
        "passage": "Two and two.",
        "question": "How many?",
        "answers_spans": {"spans": ["4"]},
      },
    ),
    ("Passage: Two and two.\nQuestion: How many?\nAnswer:", [" 4\n"]),
  ),
  (
    ("tweet_eval_sentiment", 0, {"text": "Hi"}),
    ("Hi It was", [" terrible", " neutral", " great"]),
  ),
  (
    ("tweet_eval_sentiment", "reference", {"text": "Hi"}),
    ("Hi It was", [" terrible", " neutral", " neutral"]),
  ),
  (("imdb", 0, {"text": "Hi"}), ("Hi It was", [" terrible", " great"])),
  (
    ("rotten_tomatoes", 1, {"text": "Hi"}),
    ("Hi", [" terrible", " great"]),
  ),
  (
    ("emotion", 0, {"text": "Hi"}),
    (
      "Hi The emotion was",
      [" sadness", " joy", " love", " anger", " fear", " surprise"],
    ),
  ),
  (
    ("tweet_eval_emotion", 0, {"text": "Hi"}),
    ("Hi The emotion was", [" anger", " joy", " optimism", " sadness"]),
  ),
  (
    ("emo", 0, {"text": "Hi"}),
    ("Hi The emotion was", [" others", " happy", " sad", " angry"]),
  ),
  (
    ("tweet_eval_irony", 0, {"text": "Hi"}),
    ("Hi The text was", [" non-ironic", " ironic"]),
  ),
  (
    ("amazon_polarity", 0, {"content": "Hi"}),
    ("Hi The sentiment was", [" negative", " positive"]),
  ),
  (
    ("poem_sentiment", 0, {"verse_text": "Hi"}),
    (
      "Hi The sentiment was",
      [" negative", " positive", " neutral", " mixed"],
    ),
  ),
  (
    ("financial_phrasebank", 0, {"sentence": "Hi"}),
    ("Hi The sentiment was", [" negative", " neutral", " positive"]),
  ),
  (
    ("mrpc", 0, _PAIR),
    (
      "Sentence 1: One.\nSentence 2: Two.\nAre these sentences paraphrases of "
      "each other? Yes or No?\n",
      _NO_YES,
    ),
  ),
  (
    ("qqp", 0, {"question1": "A?", "question2": "B?"}),
    (
      "Question 1: A?\nQuestion 2: B?\nAre these questions duplicates of each "
      "other? Yes or No?\n",
      _NO_YES,
    ),
  ),
  (
    ("mnli", 0, _NLI),
    (
      "Premise: It froze.\nHypothesis: It was cold\nDoes the premise entail "
      "the hypothesis? Yes, No, or Maybe?\n",
      ["Yes", "Maybe", "No"],
    ),
  ),
  (
    ("anli_r2", 0, _NLI),
    (
      "Premise: It froze.\nHypothesis: It was cold\nDoes the premise entail "
      "the hypothesis? Yes, No, or Maybe?\n",
      ["Yes", "Maybe", "No"],
    ),
  ),
  (
    ("wnli", 0, _PAIR),
    (
      "Sentence 1: One.\nSentence 2: Two.\nAre these sentences entailed by "
      "each other? Yes or No?\n",
      _NO_YES,
    ),
  ),
  (
    ("medical_questions_pairs", 0, {"question_1": "A?", "question_2": "B?"}),
    (
      "Question 1: A?\nQuestion 2: B?\nAre these questions similar to each "
      "other? Yes or No?\n",
      _NO_YES,
    ),
  ),
  (
    ("hate_speech18", 0, {"text": "Hi"}),
    (
      "Hi\nIs the text hate speech? Yes, No, Skip, or Depends?\n",
      ["No", "Yes", "skip", "depends"],
    ),
  ),
  (
    ("tweet_eval_offensive", 0, {"text": "Hi"}),
    ("Hi\nIs the text offensive? Yes or No?\n", _NO_YES),
  ),
  (
    ("tweet_eval_hate", 0, {"text": "Hi"}),
    ("Hi\nIs the text hate speech? Yes or No?\n", _NO_YES),
  ),
  (
    ("tweet_eval_stance_atheism", 0, {"text": "Hi"}),
    (
      "Hi\nWhat is the stance of the tweet towards atheism? neutral, against, "
      "or favor?\n",
      ["neutral", "against", "favor"],
    ),
  ),
  (
    ("tab_fact", 0, {"statement": "A", "table_text": "a#b"}),
    ("A\nEvidence: a#b\nIs the claim true? Yes or No?\n", _NO_YES),
  ),
  (
    ("wiki_qa", 0, {"question": "q", "answer": "a"}),
    (
      "Question: q\nAnswer: a\nIs the answer correct? Yes or No?\n",
      _NO_YES,
    ),
  ),
  (
    ("meta_icl", 0, {"input": "in", "options": ["x", "y"], "output": "y"}),
    ("in\nx, y\n", ["x", "y"]),
  ),
  (
    ("meta_icl", 1, {"input": "in", "options": ["x", "y"], "output": "y"}),
    ("in\n", ["x", "y"]),
  ),
]


def _row(fields):
  return tasks.Row(fields, "made up row 1")


@pytest.mark.parametrize("given, expected", GOLDEN)
def test_golden_prompts(given, expected):
  name, version, fields = given
  prompt, options = expected
  task = tasks.get(name)
  assert task.prompt(_row(fields), version) == prompt
  assert list(task.options(_row(fields), version)) == options


@pytest.mark.parametrize("name", tasks.ALL)
def test_entries_are_whole(name):
  task = tasks.ALL[name]
  row = _row(task.example)
  task.check(row)
  versions = [*range(len(task.templates)), "reference"]
  for version in versions:
    template = task.template(version)
    options = task.options(row, version)
    assert max(task.right(row)) < len(options)
    assert template.may_repeat or len(set(options)) == len(options)
    assert not task.prompt(row, version).endswith(" ")
    if version == 0 and isinstance(template.prompt, str):
      read = {f for _, f, _, _ in string.Formatter().parse(template.prompt)}
      assert read - {None} <= set(task.columns)
  if isinstance(task.label, str) and task.kind == "classification":
    for value in task.labels or range(len(options)):
      task.right(_row({**task.example, task.label: value}))


@pytest.mark.parametrize(
  "name, fields, right",
  [
    ("winogrande", {"answer": "1"}, (0,)),
    ("winogrande", {"answer": 2}, (1,)),
    ("hellaswag", {"label": "1"}, (1,)),
    ("scitail", {"label": "neutral"}, (0,)),
    ("record", {"answers": ["Oslo", "Bergen"]}, (0, 1)),
    ("hatexplain", {"annotators": {"label": [0, 0, 2]}}, (1,)),
    ("fever", {"output": [{"answer": "REFUTES"}]}, (0,)),
    ("commonsense_qa", {"answerKey": "A"}, (0,)),
    ("meta_icl", {"options": [], "output": "eggs"}, (0,)),
    ("squad", {"answers": {"text": ["a", "b"]}}, (0, 1)),
    ("sst2", {"label": 1.0}, (1,)),
    ("sst2", {"label": "0"}, (0,)),
    ("sst2", {"label": True}, (1,)),
  ],
)
def test_right_options(name, fields, right):
  task = tasks.get(name)
  assert task.right(_row({**task.example, **fields})) == right


@pytest.mark.parametrize("folder", DATA_TASKS)
def test_every_row_of_real_data(folder):
  facts = DATA_TASKS[folder]
  task = tasks.get(folder.removesuffix(".fixed"))
  labels = facts["label_names"]
  for split, count in facts["rows"].items():
    lines = (DATA / folder / f"{split}.jsonl").read_text().splitlines()
    assert len(lines) == count
    for number, line in enumerate(lines, 1):
      row = tasks.Row(json.loads(line), f"{folder}/{split}.jsonl row {number}")
      task.check(row)
      options = task.options(row)
      assert task.prompt(row) or folder == "winogrande"
      assert len(set(options)) == len(options)
      right = task.right(row)
      value = row.fields[facts["label_column"]]
      if folder == "record":
        filled = [row.fields["query"].replace("@placeholder", a) for a in value]
        assert {options[i].strip() for i in right} == {
          s.strip() for s in filled
        }
      elif labels is None:
        assert options[right[0]].strip() in str(value)
      else:
        assert right == (
          labels.index(value) if value in labels else int(value),
        )
        if task.kind == "classification":
          assert len(options) == len(labels)


def test_unknown_names_suggest_the_nearest():
  with pytest.raises(errors.UserError, match="Did you mean 'sst2'"):
    tasks.get("sst-2")
  with pytest.raises(errors.UserError, match="sst2 has no template version 5"):
    tasks.get("sst2").prompt(_row({}), 5)


@pytest.mark.parametrize(
  "name, fields, sentence",
  [
    ("sst2", {"sentense": "x", "label": 0}, "no column 'sentence'.*'sentense'"),
    ("sst2", {"sentence": "", "label": 0}, "column 'sentence' is empty"),
    ("sst2", {"sentence": " ", "label": 0}, "column 'sentence' is empty"),
    ("sst2", {"sentence": 3, "label": 0}, "holds 3 of type int.*expects text"),
    ("sst2", {"sentence": "x", "label": 2}, "holds 2.*integer from 0 to 1"),
    ("sst2", {"sentence": "x", "label": -1}, "holds -1"),
    ("sst2", {"sentence": "x", "label": 0.5}, "holds 0.5"),
    ("sst2", {"sentence": "x", "label": None}, "holds None"),
    ("sst2", {"sentence": "x", "label": "pos"}, "holds 'pos'"),
    (
      "winogrande",
      {"sentence": "a _", "option1": "b", "option2": "c", "answer": ""},
      "holds ''.*one of '1', '2'",
    ),
    (
      "winogrande",
      {"sentence": "a", "option1": "b", "option2": "c", "answer": "1"},
      "has 0 blanks '_'; expected one",
    ),
    (
      "record",
      {"passage": "p", "query": "q", "entities": ["a"], "answers": ["b"]},
      "no right option",
    ),
    (
      "squad",
      {"title": "t", "context": "c", "question": "q", "answers": "x"},
      "not of the kind",
    ),
    (
      "squad",
      {"title": "t", "context": "c", "question": "q", "answers": {}},
      "no entry 'text'",
    ),
    (  # as in SQuAD 2
      "squad",
      {**tasks.get("squad").example, "answers": {"text": []}},
      "column 'answers' has no answer",
    ),
  ],
)
def test_broken_rows_name_file_and_row(name, fields, sentence):
  task = tasks.get(name)
  with pytest.raises(errors.UserError, match=f"made up row 1: .*{sentence}"):
    task.check(_row(fields))
    task.prompt(_row(fields))
    pytest.fail("nothing raised")


def test_copa_needs_cause_or_effect():
  row = _row({**tasks.get("copa").example, "question": "why"})
  with pytest.raises(errors.UserError, match=r"row 1: .*'why'.*'cause'"):
    tasks.get("copa").prompt(row)


def test_custom_classification():
  task = tasks.custom(
    "wine",
    prompt="{note} Overall",
    options=[" poor", " good"],
    label="verdict",
    labels=["bad", "fine"],
  )
  row = _row({"note": "Oak {and} plum.", "verdict": "fine"})
  task.check(row)
  assert task.prompt(row) == "Oak {and} plum. Overall"
  assert task.options(row) == (" poor", " good")
  assert task.right(row) == (1,)
  assert task.kind == "classification"


def test_custom_generation():
  task = tasks.custom("quiz", prompt="{q}\nA:", label="a")
  assert (task.kind, task.metric) == ("generation", "token_f1")
  one = _row({"q": "Where?", "a": "At home"})
  many = _row({"q": "Where?", "a": ["At home", "home", "home"]})
  task.check(one)
  assert task.prompt(one) == "Where?\nA:"
  assert task.options(one) == (" At home\n",)
  assert task.options(many) == (" At home\n", " home\n")
  assert task.right(many) == (0, 1)
  with pytest.raises(errors.UserError, match=r"row 1: .*not of the kind"):
    task.check(_row({"q": "Where?", "a": None}))
  with pytest.raises(errors.UnusableRowError, match=r"row 1: .*has no answer"):
    task.check(_row({"q": "Where?", "a": []}))


@pytest.mark.parametrize(
  "value, answers",
  [
    (
      {"text": ["Oslo", "in Oslo"], "answer_start": [1, 2]},
      ["Oslo", "in Oslo"],
    ),
    (3.0, ["3.0"]),
    ({"value": "Oslo", "aliases": []}, None),
    ({"text": [], "answer_start": []}, None),
    (["Oslo", None], None),
    (["Oslo", " "], None),
    ("  ", None),
    (float("nan"), None),
  ],
)
def test_custom_answers(value, answers):
  task = tasks.custom("quiz", prompt="{q}\nA:", label="a")
  row = _row({"q": "Where?", "a": value})
  if answers is None:
    with pytest.raises(
      errors.RowError, match=r"row 1: .*(column 'a'|no right)"
    ):
      task.check(row)
  else:
    task.check(row)
    assert task.options(row) == tuple(f" {answer}\n" for answer in answers)


@pytest.mark.parametrize("name", ["squad", "drop", "commonsense_qa", "record"])
@pytest.mark.parametrize("entry", [None, " ", float("nan")])
def test_no_option_is_a_word_for_nothing(name, entry):
  task = tasks.get(name)
  fields = json.loads(json.dumps(task.example))
  for value in fields.values():
    inside = value.values() if isinstance(value, dict) else [value]
    for entries in inside:
      if isinstance(entries, list) and entries != ["A", "B"]:
        entries.append(entry)
  with pytest.raises(errors.RowError, match=r"row 1: column .* holds .*empty"):
    task.options(_row(fields))


def test_a_pattern_has_no_word_for_null():
  task = tasks.get("health_fact")
  row = _row({**task.example, "explanation": None})
  assert "None" not in task.prompt(row)
  with pytest.raises(
    errors.RowError, match="row 1: column 'explanation' is em"
  ):
    task.prompt(row, 1)


@pytest.mark.parametrize(
  "value, labels, index",
  [
    ("1.0", None, 1),
    (" 1", None, 1),
    (True, None, 1),
    ("False", None, 0),
    (1.5, None, None),
    ("1_0", None, None),
    ("", None, None),
    (None, ("None", "Some"), None),
    (" pos", ("neg", "pos"), 1),
    ("pos\n", ("neg", "pos"), 1),
    ("POS", ("neg", "pos"), None),
    (True, ("false", "true"), 1),
    ("TRUE", ("false", "true"), 1),
    (True, ("True", "False"), 0),
    ("5.0", ("1", "5"), 1),
    (5, ("1.0", "5.0"), 1),
    ("1.0", ("1.0", "1"), 0),
    (1, ("1.0", "1"), 1),
    ("01", ("1.0", "1"), None),
  ],
)
def test_labels_as_files_write_them(value, labels, index):
  task = tasks.custom("own", prompt="{q}", options=(" a", " b"), labels=labels)
  row = _row({"q": "Where?", "label": value})
  if index is None:
    with pytest.raises(errors.RowError, match="row 1: label column 'label'"):
      task.check(row)
  else:
    assert task.right(row) == (index,)


def test_custom_multiple_choice():
  task = tasks.custom("plot", prompt="{start}", options=[" {a}", " {b}"])
  row = _row({"start": "Once", "a": "upon", "b": "under", "label": 0})
  assert task.options(row) == (" upon", " under")
  assert task.columns == ("start", "a", "b", "label")
  assert task.kind == "multiple choice"


@pytest.mark.parametrize(
  "fields, sentence",
  [
    ({"prompt": "{a", "options": ["x", "y"]}, "prompt '{a' is not a pattern"),
    ({"prompt": "{a.b}", "options": ["x", "y"]}, "the column 'a.b'"),
    ({"prompt": "{}", "options": ["x", "y"]}, "the column ''"),
    ({"prompt": "a", "options": ["x", "y"]}, "names no column"),
    ({"prompt": "{a}", "options": ["x"]}, "options has 1 entry"),
    ({"prompt": "{a}", "options": ["x", "{y"]}, r"options\[1\] '{y'"),
    (
      {"prompt": "{a}", "options": ["x", "y"], "labels": ["p"]},
      "labels has 1 entries and options 2",
    ),
    (
      {"prompt": "{a}", "options": ["x", "y"], "labels": ["p", "p "]},
      "labels are 'p', 'p '; expected values that differ",
    ),
    (
      {"prompt": "{a}", "options": ["x", "y"], "labels": ["", "p"]},
      "labels are '', 'p'; .*none of them blank",
    ),
    (
      {"prompt": "{a}", "options": ["x", "y"], "metric": "acuracy"},
      "metric.*Did you mean 'accuracy'",
    ),
    ({"prompt": "{a}", "metric": "accuracy"}, "metric.*token_f1, exact_match"),
  ],
)
def test_custom_tells_mistakes(fields, sentence):
  with pytest.raises(errors.UserError, match=f"Task own: .*{sentence}"):
    tasks.custom("own", **fields)


def test_listing_shows_every_task(capsys):
  tasks_command.main([])
  listing = capsys.readouterr().out
  assert all(f"{name}  (" in listing for name in tasks.ALL)
  assert "' terrible'" in listing


def test_check_names_the_sets_that_cannot_be_loaded(monkeypatch, capsys):
  def find_splits(task):
    if task.name == "sst2":
      raise errors.UserError("There is no such set.")
    return ["train", "dev"]

  monkeypatch.setattr(hub, "find_splits", find_splits)
  with pytest.raises(errors.UserError, match=r"^1 data sets .*: sst2\.$"):
    tasks_command.main(["--check"])
  lines = capsys.readouterr().out.splitlines()
  assert "sst2: FAILS. There is no such set." in lines
  assert "mpqa: has no hub set" in lines
  assert "rte: aps/super_glue/rte has train, dev" in lines


def test_check_stops_without_a_connection(monkeypatch, capsys):
  def find_splits(task):
    raise errors.UserError("Cannot reach the hub.") from ConnectionError()

  monkeypatch.setattr(hub, "find_splits", find_splits)
  with pytest.raises(errors.UserError, match=r"^Cannot reach the hub\.$"):
    tasks_command.main(["--check"])
  assert not capsys.readouterr().out


def test_local_copies_of_mirrors_are_read_too(tmp_path):
  path = tmp_path / "train.jsonl"
  for row, text in (
    ({"text": "Sales rose."}, "Sales rose."),
    ({"sentence": "Sales fell.", "text": "other"}, "Sales fell."),
  ):
    path.write_text(json.dumps({**row, "label": 0}) + "\n")
    (row,) = sources.load(tasks.get("financial_phrasebank"), tmp_path, "train")
    assert row.fields["sentence"] == text
  path.write_text('{"sentense": "Sales rose.", "label": 0}\n')
  with pytest.raises(errors.UserError, match="no column 'sentence'"):
    sources.load(tasks.get("financial_phrasebank"), tmp_path, "train")


def test_the_only_split_is_trained_on(tmp_path):
  task = tasks.get("climate_fever")
  (tmp_path / "test.jsonl").write_text(json.dumps(task.example) + "\n")
  assert len(sources.load(task, tmp_path, "train")) == 1
  assert not sources.has_split(task, tmp_path, "test")


def test_tasks_import_nothing_heavy():
  code = (
    "import sys, zofo_jax.tasks; print([m for m in "
    "('transformers', 'datasets', 'torch', 'sklearn') if m in sys.modules])"
  )
  root = pathlib.Path(__file__).parents[2]
  out = subprocess.run(
    [sys.executable, "-c", code],
    cwd=root,
    capture_output=True,
    text=True,
    check=True,
  )
  assert out.stdout.strip() == "[]"
