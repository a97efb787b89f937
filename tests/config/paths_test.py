"""One form of a path, and escapes of texts."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zofo_jax.config import defaults, paths


@pytest.fixture
def home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  (tmp_path / "home").mkdir()
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  return tmp_path / "home"


def test_all_ways_to_name_a_folder(home, tmp_path):
  (tmp_path / "here" / "link").symlink_to(home)
  (home / "run").mkdir()
  for text in ("~/run", "~/run/", f"{home}/./run//"):
    assert paths.expand(text) == str(home / "run"), text
  assert paths.expand("./rows/") == "rows"
  for text in ("~/run", "../home/run", "link/run/", "link/../home/run"):
    assert paths.resolve(text) == str(home / "run"), text
  assert paths.from_folder(str(tmp_path), "home/run") == str(home / "run")
  assert paths.from_folder(str(tmp_path), "gone") == "gone"


@pytest.mark.parametrize(
  "text",
  ["", "gs://bucket/run/", "hub:owner/name", "~no_such_user_7/x", "a/b"],
)
def test_what_is_no_local_path(home, text):
  assert paths.expand(text) == text


def test_a_hub_name_is_a_folder_where_there_is_one(home, tmp_path):
  name = "facebook/opt-125m"
  assert paths.resolve(name) == name
  (tmp_path / "here" / name).mkdir(parents=True)
  assert paths.resolve(name) == os.path.abspath(name)


def test_without_a_home(monkeypatch):
  monkeypatch.delenv("HOME")  # then the system's users say where it is
  assert os.path.isabs(paths.expand("~/run"))


def test_the_table_says_which_fields_are_paths(home):
  config = defaults.base_config()
  config.update_from_flattened_dict(
    {
      "model.name": "~/link",
      "data.dir": "rows/",
      "adapter.init_from": "~/x",
      "adapt.runs": ("a/", "~/b"),
      "meta.train": ("sentiment", "~/lists/hr.json"),
      "data.prompt": "~/{text}/",
    }
  )
  defaults.replace_paths(config, paths.expand)
  assert config.model.name == str(home / "link")
  assert config.data.dir == "rows"
  assert config.adapter.init_from == str(home / "x")
  assert config.adapt.runs == ("a", str(home / "b"))
  assert config.meta.train == ("sentiment", str(home / "lists/hr.json"))
  assert config.data.prompt == "~/{text}/"


@pytest.mark.parametrize(
  "text, expected",
  [
    (r"\n", "\n"),
    (r"{q}\nAnswer:\t", "{q}\nAnswer:\t"),
    (r"C:\\new", r"C:\new"),
    (r"\alpha", r"\alpha"),
    ("\n", "\n"),
  ],
)
def test_escapes(text, expected):
  assert paths.unescape(text) == expected


@given(st.text("\\ntr\n\t a"))
def test_escaping_can_be_undone(text):
  assert paths.unescape(paths.escape(text)) == text
