"""Files of strangers: whatever is in them, a sentence and nothing else."""

import json
import pathlib

import hypothesis
import pytest
from hypothesis import strategies as st

from zofo_jax import errors, report, tasks
from zofo_jax.builders import run
from zofo_jax.config import defaults
from zofo_jax.data import sources
from zofo_jax.models.hf import peft, tensor_files

settings = hypothesis.settings(
  max_examples=300,
  deadline=None,
  database=None,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
anything = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(
      st.sampled_from(["text", "label", "F32", "dtype", "shape", "a"])
      | st.text(max_size=4),
      inner,
      max_size=4,
    )
  ),
  max_leaves=8,
)


def complaint_of(call, *arguments):
  """Returns the UserError of reading a file, "" if it was read."""
  try:
    call(*arguments)
  except errors.UserError as error:
    assert str(error) and "\n" not in str(error)
    return str(error)
  return ""


@hypothesis.given(lines=st.lists(st.binary(max_size=30) | anything, max_size=4))
@settings
def test_rows(tmp_path, lines):
  path = tmp_path / "rows.jsonl"
  path.write_bytes(
    b"\n".join(
      line if isinstance(line, bytes) else json.dumps(line).encode()
      for line in lines
    )
  )
  complaint_of(sources.load, tasks.get("rotten_tomatoes"), path, "train")
  complaint_of(report.read_jsonl, path)


@hypothesis.given(
  header=st.binary(max_size=60)
  | anything.map(lambda x: json.dumps(x).encode()),
  length=st.none() | st.integers(0, 2**64 - 1),
  body=st.binary(max_size=20),
)
@settings
def test_safetensors(tmp_path, header, length, body):
  path = tmp_path / "model.safetensors"
  length = len(header) if length is None else length
  path.write_bytes(length.to_bytes(8, "little") + header + body)

  def read():
    for stored in tensor_files.open_safetensors(path).values():
      stored.read()

  complaint_of(read)


@hypothesis.given(content=anything | st.binary(max_size=40))
@settings
def test_indices_and_adapters(tmp_path, content):
  (tmp_path / "adapter_model.safetensors").write_bytes(b"")
  for name in ("model.safetensors.index.json", peft.CONFIG):
    path = tmp_path / name
    if isinstance(content, bytes):
      path.write_bytes(content)
    else:
      path.write_text(json.dumps(content))
  assert complaint_of(tensor_files.open_folder, tmp_path)
  assert complaint_of(peft.load, tmp_path, None, None)


@pytest.mark.parametrize(
  "name", ["../model.safetensors", "/etc/passwd", "a/b", "..", "", "C:x", 3]
)
def test_an_index_stays_in_its_folder(tmp_path, name):
  inside = tmp_path / "inside"
  inside.mkdir()
  (tmp_path / "model.safetensors").write_bytes(b"")
  (inside / "model.safetensors.index.json").write_text(
    json.dumps({"weight_map": {"w": name}})
  )
  assert "is not a plain file name" in complaint_of(
    tensor_files.open_folder, inside
  )


@hypothesis.given(content=anything)
@hypothesis.example(content={"seed": {}})
@settings
def test_configs_of_runs(tmp_path, content):
  (tmp_path / "config.json").write_text(json.dumps(content))
  complaint_of(run.read_config, tmp_path)


@hypothesis.given(
  name=st.sampled_from(sorted(defaults.flat(defaults.base_config())))
  | st.text("abc._=", max_size=6),
  value=st.text(max_size=6) | st.integers().map(str) | st.floats().map(str),
)
@hypothesis.settings(settings, max_examples=60)
def test_overrides(command_line, tmp_path, capsys, name, value):
  # The model that is missing stops what is sound.
  hypothesis.assume(name != "model.name")
  code = command_line(
    "train",
    f"--config={pathlib.Path(__file__).parents[2] / 'configs' / 'llama.py'}",
    f"--workdir={tmp_path / 'run'}",
    "--config.model.name=/none/such",
    f"--config.{name}={value}",
  )
  assert code == 2
  stderr = capsys.readouterr().err
  assert stderr.startswith("zofo_jax: ") and "Traceback" not in stderr


def test_a_pickle_is_asked_for(tmp_path):
  (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
  assert "are pickles of PyTorch" in complaint_of(
    tensor_files.open_folder, tmp_path
  )
