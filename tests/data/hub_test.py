"""Built-in tasks, loaded from a hub on loopback by the real clients."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import pytest

from tests import standin_hub
from zofo_jax import tasks
from zofo_jax.data import sources

pytest.importorskip("datasets")
# Columns of mirrors, where they are not the task's.
RAW = {
  "emo": {"turn1": "hi", "turn2": None, "turn3": "how are you", "label": 0},
  "financial_phrasebank": {"text": "Orders doubled .", "label": 2},
}
MODEL = ("config.json", "model.safetensors", "tokenizer.json", "chart.png")
ADAPTER = {"adapter_config.json": "{}", "adapter_model.safetensors": "a"}
# Of a script whose copy in the cache lacks a file.
HALF = ["load", "liar", None, "validation"]
GATED = ["load", "subj", "hub:a/gate", "train"]
ON_HUB = [task for task in tasks.ALL.values() if task.hub]


def _rows(task, split):
  """Makes up rows; the first text says which split they are of."""
  row = RAW.get(task.name, task.example)
  texts = [name for name, value in row.items() if isinstance(value, str)]
  return [
    {**row, **{name: f"{row[name]} {split} {i}" for name in texts[:1]}}
    for i in (1, 2)
  ]


def _repos():
  configs, scripts = {}, set()
  for task in ON_HUB:
    name, config = task.hub
    splits = ("train", "validation")[
      : 1 if "" in task.hub_splits.values() else 2
    ]
    named = {s: task.hub_splits.get(s, s) for s in splits}
    configs.setdefault(name, {}).setdefault(config, {}).update(
      {on_hub: _rows(task, s) for s, on_hub in named.items()}
    )
    scripts |= {name} if task.hub_script else set()
  return {
    ("datasets", name): (
      standin_hub.script(name.split("/")[1], sets)
      if name in scripts
      else standin_hub.data_set(sets)
    )
    for name, sets in configs.items()
  }


@pytest.fixture(scope="module")
def hub():
  repos = _repos()
  repos["datasets", "old/set"] = standin_hub.script(
    "set", {"part": {"train": _rows(tasks.get("subj"), "train")}}
  )
  repos["datasets", "a/gate"] = standin_hub.data_set(
    {None: {"train": _rows(tasks.get("subj"), "train")}}
  )
  repos["datasets", "a/stream"] = standin_hub.data_set(
    {None: {"train": _rows(tasks.get("subj"), "train") * 3}}
  )
  repos["models", "a/model"] = {"main": dict.fromkeys(MODEL, b"{}")}
  files = {name: text.encode() for name, text in ADAPTER.items()}
  repos["models", "a/adapter"] = {"main": {**files, "chart.png": b"-"}}
  with standin_hub.serve(repos) as server:
    server.gated = {"a/gate"}
    yield server


def _session(calls, url, cache, **environment):
  """Runs calls of `hub_session` in a process with a cache of its own."""
  done = subprocess.run(
    [sys.executable, "-m", "tests.data.hub_session", json.dumps(calls)],
    cwd=pathlib.Path(__file__).parents[2],
    env={
      **os.environ,
      "HF_ENDPOINT": url,
      "HF_HOME": str(cache),
      **environment,
    },
    capture_output=True,
    text=True,
    check=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


# A set that holds data, with a configuration and without; a script, with a
# configuration and without; one whose only split is called "test".
SOME = ("rte", "subj", "tab_fact", "trec", "climate_fever")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def first_run(hub, cache):
  """What became of loading every task for the first time."""
  calls = [["load", task.name, None, "train"] for task in ON_HUB]
  results = _session([*calls, GATED], hub.url, cache)
  return dict(zip([*(t.name for t in ON_HUB), "gated"], results))


def _halve(cache):
  """Removes a file of a copy in the cache, as an interrupted run leaves it."""
  (path,) = cache.glob("hub/*--liar/snapshots/*/*/validation/*.parquet")
  path.resolve().unlink()
  path.unlink()


@pytest.mark.parametrize("task", ON_HUB, ids=lambda task: task.name)
def test_every_task_loads(first_run, task):
  rows = first_run[task.name]
  assert not isinstance(rows, str), rows
  for (source, fields), made in zip(rows, _rows(task, "train"), strict=True):
    assert source.startswith("/".join(filter(None, task.hub)))
    if task.name in RAW:
      assert all(made[name] == fields[name] for name in made)
    else:
      assert fields.items() >= json.loads(json.dumps(made)).items()
    assert all(fields[column].strip() for column in task.text)
  (text,) = {fields[c] for c in task.text[:1] for _, fields in rows[:1]} or {""}
  assert ("train 1" in text) == bool(task.text)


def test_turns_are_joined(first_run):
  assert first_run["emo"][0][1]["text"] == "hi train 1 how are you"


def _expected(name):
  """Returns what the calls of `_calls` give."""
  only = name == "climate_fever"
  return [2, "No split" if only else 2, not only, False]


def _calls(name):
  return [
    ["load", name, None, "train"],
    ["load", name, None, "validation"],
    ["has", name, None, "validation"],
    ["has", name, None, "test"],
  ]


def _check(results):
  for i, name in enumerate(SOME):
    for result, expected in zip(results[4 * i :], _expected(name)):
      if isinstance(expected, int) and not isinstance(expected, bool):
        assert not isinstance(result, str), result
        assert len(result) == expected
      elif isinstance(expected, bool):
        assert result is expected, (name, result)
      else:
        assert result.startswith("Cannot read split 'validation' of"), result


@pytest.mark.slow
def test_later_runs(hub, cache, first_run):
  calls = [call for name in SOME for call in _calls(name)]
  find = [["find", name, None, None] for name in SOME]
  mistakes = [
    ["load", "subj", "hub:no/where", "train"],
    ["load", "subj", "hub:nyu-mll/glue/sst", "train"],
    ["load", "subj", "hub:old/set/part", "train"],
    ["load", "subj", "hub:old/set", "train"],
  ]
  commit = hub.commits(("datasets", "SetFit/subj"))["main"]
  mistakes += [
    ["load", "subj", f"hub:SetFit/subj@{name}", "train"]
    for name in (commit, "none")
  ]
  others = [
    GATED,
    HALF,
    ["draw", "subj", "hub:a/stream", "train"],
    ["draw", "trec", None, "train"],
    ["model", "a/model", None, None],
    ["adapter", "hub:a/adapter", None, None],
    ["adapter", "hub:no/where@v1", None, None],
    ["adapter", "hub:a", None, None],
  ]
  hub.requests.clear()
  hub.faults[:] = [500, 0, 429]
  # The first answer is later than the client waits for it, and the first files
  # end too early.
  hub.delays[:], hub.cuts[:] = [1.2], [10, 100]
  _halve(cache)
  *results, gated, half, drawn, script, model, adapter, missing, wrong = (
    _session(
      [*calls, *find, *mistakes, *others],
      hub.url,
      cache,
      HF_TOKEN="hf_secret",
      HF_HUB_DOWNLOAD_TIMEOUT="1",
      HF_HUB_ETAG_TIMEOUT="1",
    )
  )
  assert "gated" in first_run["gated"] and len(gated) == len(half) == 2
  assert [source for source, _ in drawn] == [
    f"a/stream/train, row {i} drawn" for i in (1, 2, 3)
  ]
  assert len(script) == 2 and not [
    *cache.glob("datasets/a___stream/**/*.arrow")
  ]
  assert model == sorted(MODEL[:3])
  assert adapter == ADAPTER
  assert missing.startswith("The adapter no/where at revision v1 is neither")
  assert "'hub:a' is no hub id; expected hub:owner/name" in wrong
  _check(results)
  assert not (hub.faults or hub.delays or hub.cuts)
  assert not any(
    "resolve" in path
    and path.endswith("parquet")
    and not re.search("/(old|a)/|liar", path)
    for _, path in hub.requests
  )
  *names, missing, config, converted, configs, old, none = results[len(calls) :]
  assert [set(n) for n in names] == [{"train", "validation"}] * 4 + [{"test"}]
  assert missing.startswith("Cannot read split 'train' of 'no/where' from the")
  assert "BuilderConfig 'sst' not found" in config
  assert len(converted) == 2
  assert [fields for _, fields in old] == _rows(tasks.get("subj"), "train")
  assert old[0][0] == f"SetFit/subj/{commit}/train row 1"
  assert none.startswith("Cannot read split 'train' of 'SetFit/subj' from the")
  assert "branch refs/convert/parquet has no such split" in configs


def test_without_a_connection(hub, cache, first_run):
  calls = [call for name in SOME for call in _calls(name)]
  hub.requests.clear()
  _halve(cache)
  *known, half, new = _session(
    [*calls, HALF, ["load", "subj", "hub:old/set/part2", "train"]],
    hub.url,
    cache,
    HF_HUB_OFFLINE="1",
  )
  _check(known)
  assert not hub.requests
  assert half.startswith("Cannot read split 'validation' of 'ucsbai/liar' from")
  assert "is incomplete" in half
  assert new.startswith("Cannot read split 'train' of 'old/set' from the hub")


def test_a_table_that_the_cache_has_lost_is_made_again(monkeypatch):
  modes = []

  def load_dataset(*hub, download_mode="reuse_dataset_if_exists", **options):
    modes.append(download_mode)
    if len(modes) == 1:
      raise FileNotFoundError("Failed to open local file 'a.arrow'")
    return [dict(tasks.get("subj").example)]

  module = types.SimpleNamespace(load_dataset=load_dataset)
  monkeypatch.setitem(sys.modules, "datasets", module)
  assert len(sources.load(tasks.get("subj"), None, "train")) == 1
  assert modes == ["reuse_dataset_if_exists", "reuse_cache_if_exists"]


# The first answers about a task's data set.
FAULTS = {
  "slow": {"delays": [1.2, 1.2]},  # later than the client waits
  "dropped": {"faults": [0]},
  "cut": {"cuts": [10]},
  "busy": {"faults": [429]},
  "broken": {"faults": [500]},
}
SHORT = {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}


def _each(*verbs):
  """Returns calls of (verb, split) for every task."""
  return [[v, t.name, None, split] for t in ON_HUB for v, split in verbs]


def _by_task(results):
  """Yields each task and the results of its calls, as many for every task."""
  size = len(results) // len(ON_HUB)
  for i, task in enumerate(ON_HUB):
    yield task, results[size * i : size * (i + 1)]


def _is_sentence(result):
  return (
    isinstance(result, str)
    and re.match(r"Cannot read (split|splits)", result)
    and "\n" not in result
  )


def _loaded(task, rows, split="train"):
  """Returns whether these are the rows of a split."""
  return (
    isinstance(rows, list)
    and len(rows) == 2
    and all(source.startswith(task.hub[0]) for source, _ in rows)
    and (not task.text or f"{split} 1" in rows[0][1][task.text[0]])
  )


def _assert_right(task, results):
  """Checks the results of `ALL_CALLS`, or of the first two of them."""
  train, validation, *has = results
  is_split = "" not in task.hub_splits.values()
  assert _loaded(task, train), train
  if is_split:
    assert _loaded(task, validation, "validation"), validation
  else:
    assert _is_sentence(validation), validation
  assert has in ([], [is_split, False])


ALL_CALLS = (
  ("load", "train"),
  ("load", "validation"),
  ("has", "validation"),
  ("has", "test"),
)


def _remove_parts(cache, *, prepared):
  """Leaves a cache as an interrupted run or a full disk does.

  Args:
    cache: the folder.
    prepared: whether a table of each prepared set is missing; or else the
      tables are, and half of each file that was downloaded.
  """
  if prepared:
    for path in cache.glob("datasets/*/**/*-train.arrow"):
      path.unlink()
    return
  shutil.rmtree(cache / "datasets")
  for path in cache.glob("hub/datasets--*/snapshots/**/*.parquet"):
    blob = path.resolve()
    path.unlink()
    if blob.exists():  # as the content of one file, or of several
      content = blob.read_bytes()
      blob.unlink()
      part = blob.with_name(f"{blob.name}.incomplete")
      part.write_bytes(content[: len(content) // 2])


@pytest.mark.slow
def test_all_tasks_with_a_cache_that_is_whole_or_not(hub, tmp_path):
  def run(*verbs, **environment):
    hub.requests.clear()
    results = _session(_each(*verbs), hub.url, tmp_path, **environment)
    return _by_task(results)

  def contents():
    return [p for _, p in hub.requests if "resolve" in p and "parquet" in p]

  for task, results in run(*ALL_CALLS):  # a first run, several splits
    _assert_right(task, results)
  for task, results in run(*ALL_CALLS):  # a second one
    _assert_right(task, results)
  assert not any(p.endswith("parquet") for p in contents())
  for task, results in run(*ALL_CALLS, HF_HUB_OFFLINE="1"):
    _assert_right(task, results)
  assert not hub.requests
  for prepared in (False, True):
    _remove_parts(tmp_path, prepared=prepared)
    for task, (rows,) in run(("load", "train"), HF_HUB_OFFLINE="1"):
      assert _is_sentence(rows) or _loaded(task, rows), rows
    for task, results in run(*ALL_CALLS[:2]):
      _assert_right(task, results)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAULTS)
def test_all_tasks_of_a_hub_with_faults(tmp_path, kind):
  """An answer that fails is asked for again, or said in a sentence."""
  calls = [
    call
    for task in ON_HUB
    for call in (
      ["faults", FAULTS[kind], None, None],
      ["load", task.name, None, "train"],
      ["faults", {}, None, None],
      ["load", task.name, None, "train"],
    )
  ]
  with standin_hub.serve(_repos()) as server:
    results = _session(calls, server.url, tmp_path, **SHORT)
  sentences, known = [], set()
  for task, (_, first, left, again) in _by_task(results):
    # Files of a set that another task has loaded are asked for no more.
    assert not any(left.values()) or task.hub[0] in known, (task.name, left)
    known.add(task.hub[0])
    assert _loaded(task, first) or _is_sentence(first), first
    assert _loaded(task, again), again
    sentences += [first] if isinstance(first, str) else []
  print(kind, len(ON_HUB) - len(sentences), "at once;", *sentences[:1])
