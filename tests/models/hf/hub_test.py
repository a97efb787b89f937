"""Local folders, and a cache laid out like the hub's, without a network."""

import subprocess
import sys

import huggingface_hub
import pytest
from huggingface_hub import constants, utils
from huggingface_hub import errors as hub_errors

from zofo_jax import errors
from zofo_jax.models.hf import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def fill(folder, *names):
  folder.mkdir(parents=True, exist_ok=True)
  for name in names:
    (folder / name).write_text("{}")
  return folder


def error_of(*args):
  with pytest.raises(errors.UserError) as caught:
    hub.locate(*args)
  text = str(caught.value)
  assert "\n" not in text and text.endswith(".")
  return text


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """The hub's cache in a temporary folder, and no network."""
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  return tmp_path


def warm(cache, name, *files):
  folder = cache / f"models--{name.replace('/', '--')}"
  fill(folder / "refs").joinpath("main").write_text(COMMIT)
  return fill(folder / "snapshots" / COMMIT, *files)


@pytest.mark.parametrize(
  "weights",
  [
    name
    for names in (hub.SAFETENSORS, hub.MSGPACK, hub.TORCH)
    for name in names
  ],
)
def test_local_folder(tmp_path, weights):
  fill(tmp_path, "config.json", weights)
  assert hub.locate(tmp_path) == hub.locate(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
  "files, complaint",
  [
    ([], "no config.json and no model.safetensors"),
    (["config.json"], "no model.safetensors"),
    (["model.safetensors"], "no config.json."),
    (["README.md"], "no config.json and no model.safetensors"),
  ],
)
def test_folder_is_no_checkpoint(tmp_path, files, complaint):
  fill(tmp_path, *files)
  text = error_of(tmp_path)
  assert f"{tmp_path} is no checkpoint" in text and complaint in text


def test_file_is_no_checkpoint(tmp_path):
  fill(tmp_path, "model.safetensors")
  assert "is no checkpoint" in error_of(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
  "name",
  [
    "./gone",
    "../gone",
    "/gone/model",
    "~/gone",
    "a/b/c",
    "C:\\models\\x",
    "a b",
  ],
)
def test_missing_folder(name, cache):
  assert f"folder {name} does not exist" in error_of(name)


def test_preference(tmp_path):
  fill(tmp_path, "pytorch_model.bin")
  assert hub.weights_format(tmp_path) == hub.TORCH
  fill(tmp_path, "flax_model.msgpack")
  assert hub.weights_format(tmp_path) == hub.MSGPACK
  fill(tmp_path, "model.safetensors.index.json")
  assert hub.weights_format(tmp_path) == hub.SAFETENSORS


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
@pytest.mark.parametrize("name", ["org/tiny-1.3b", "gpt2"])
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_warm_cache_offline(cache, name, weights, revision):
  folder = warm(cache, name, "config.json", weights)
  assert hub.locate(name, revision).resolve() == folder.resolve()


def test_cache_without_weights(cache):
  warm(cache, "org/tiny", "config.json")
  assert "no model.safetensors" in error_of("org/tiny")


def test_cold_cache_offline(cache):
  text = error_of("org/tiny")
  assert "org/tiny" in text and "cannot be reached" in text


def test_bad_ids(cache):
  assert "nor a valid hub id" in error_of("org/a--b")


REPOSITORY = {
  "both": ("model.safetensors", "pytorch_model.bin", "flax_model.msgpack"),
  "sharded": ("model.safetensors.index.json", "model-1-of-1.safetensors"),
  "flax": ("flax_model.msgpack", "pytorch_model.bin"),
  "bin": ("pytorch_model.bin.index.json", "pytorch_model-1-of-1.bin"),
}
FETCHED = {
  **REPOSITORY,
  "both": REPOSITORY["both"][:1],
  "flax": REPOSITORY["flax"][:1],
}


@pytest.mark.parametrize("name", REPOSITORY)
def test_fetches_one_format(tmp_path, monkeypatch, name):
  text = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "merges.txt",
  ]
  left = ["README.md", "model.onnx", "tf_model.h5", "training_args.bin"]

  def snapshot_download(repo_id, *, revision, allow_patterns):
    assert (repo_id, revision) == (f"org/{name}", "v1")
    wanted = utils.filter_repo_objects(
      [*text, *left, *REPOSITORY[name]], allow_patterns=allow_patterns
    )
    return str(fill(tmp_path, *wanted))

  monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
  folder = hub.locate(f"org/{name}", "v1")
  assert {p.name for p in folder.iterdir()} == {*text, *FETCHED[name]}


@pytest.mark.parametrize(
  "error, complaint",
  [
    ("GatedRepoError", "accept its terms"),
    ("RepositoryNotFoundError", "nor a repository of the hub"),
    ("RevisionNotFoundError", "no such revision"),
    ("LocalEntryNotFoundError", "cannot be reached"),
    ("HfHubHTTPError", "could not be fetched from the hub (first line)"),
    (
      OSError("first line\nsecond"),
      "could not be fetched from the hub (first l",
    ),
    (RuntimeError(""), "could not be fetched from the hub (RuntimeError)"),
  ],
)
def test_hub_says_no(monkeypatch, error, complaint):
  if isinstance(error, str):
    # Their constructors want a response, of one HTTP library or another.
    kind = getattr(hub_errors, error)
    error = kind.__new__(kind, "first line")
    monkeypatch.setattr(kind, "__str__", lambda self: "first line\nsecond")

  def snapshot_download(*args, **kwargs):
    raise error

  monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
  text = error_of("org/tiny", "v1")
  assert complaint in text and "org/tiny at revision v1" in text


def test_import_is_light():
  code = (
    "import sys; from zofo_jax.models.hf import hub, weights;"
    "print({'huggingface_hub', 'transformers', 'torch'} & {*sys.modules})"
  )
  out = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert out.stdout.strip() == "set()"
