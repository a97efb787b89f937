"""Wrote the files of this folder; not to be run again.

Made by version 0.1.0 at commit 02af5ed. What `tests/golden_test.py` compares
with is what that version gave: run on newer code this script would only confirm
the newer code. To add a file, write a new name; those that are there are never
overwritten.

  python tests/golden/make.py
"""

import contextlib
import gzip
import io
import json
import os
import pathlib
import signal
import sys
import tarfile
import tempfile

GOLDEN = pathlib.Path(__file__).parent

COMMON = """
model.name=model data.dir=rows data.num_lower=64 data.num_upper=32
data.num_selection=16 data.num_test=16 lora.rank=4 lower.num_steps=2
lower.learning_rate=3e-2 upper.learning_rate=3e-2 train.eval_every_steps=2
penalty=1
"""
# name: (fields, the step at which a signal stops it)
RUNS = {
  "whole": (
    """
    loss=classification lora.dropout=0.1 zo.direction=low_rank zo.rank=2
    zo.frame_steps=3 zo.num_directions=2 zo.clip=5.0 zo.weight_decay=0.1
    zo.learning_rate=1e-3 zo.select=query train.num_steps=6
    """,
    3,
  ),
  "apart": (
    """
    method=mezo model.dtype=bfloat16 zo.learning_rate=1e-3
    zo.scaling=running_rms zo.select=embed|query|norm|down
    ckpt.base_every_steps=4 train.num_steps=8
    """,
    7,
  ),
}


def write_json(name, value):
  write(name, (json.dumps(value, indent=1) + "\n").encode())


def write_arrays(name, arrays):
  import numpy as np

  buffer = io.BytesIO()
  np.savez_compressed(buffer, **arrays)
  write(name, buffer.getvalue())


def write(name, content):
  assert len(content) <= 300_000, (name, len(content))
  path = GOLDEN / name
  path.parent.mkdir(exist_ok=True)
  with path.open("xb") as file:  # never over one that is there
    file.write(content)


def archived(folder):
  """Packs a folder the same way whenever it is done."""
  buffer = io.BytesIO()
  with (
    gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as packed,
    tarfile.open(
      fileobj=packed, mode="w", format=tarfile.PAX_FORMAT
    ) as archive,
  ):
    for path in [folder, *sorted(folder.rglob("*"))]:
      member = archive.gettarinfo(path, path.relative_to(folder.parent))
      member.mtime = member.uid = member.gid = 0
      member.uname = member.gname = ""
      member.mode = 0o755 if path.is_dir() else 0o644
      with open(path, "rb") if path.is_file() else io.BytesIO() as file:
        archive.addfile(member, file)
  return buffer.getvalue()


def write_model(tiny, folder):
  """Writes the tests' tiny Llama, half as wide."""
  import flax
  import numpy as np

  from zofo_jax.models import llama, weights

  folder.mkdir()
  tiny["_save_tokenizer"](folder)
  hf_config = {
    "model_type": "llama",
    "vocab_size": 400,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
  }
  (folder / "config.json").write_text(json.dumps(hf_config))
  config = llama.config_from_hf(hf_config)
  draw = np.random.RandomState(0)
  flat = {}
  for path, shape in weights.shapes(llama, config).items():
    size = {"embed": 1.0, "head": 0.3}.get(path.split("/")[0], 0.25)
    random = size * draw.standard_normal(shape)
    is_scale = path.endswith("scale")
    flat[path] = (np.ones(shape) if is_scale else random).astype(np.float32)
  base = flax.traverse_util.unflatten_dict(flat, sep="/")
  weights.save(folder, llama, config, base)


def stopping_at(step):
  """Sends a signal in the middle of an iteration, as an operator would."""
  import pytest

  from zofo_jax import train

  make = train.iteration_batch

  def batch(*arguments):
    if arguments[-1] == step - 1:
      os.kill(os.getpid(), signal.SIGTERM)
    return make(*arguments)

  patch = pytest.MonkeyPatch()
  patch.setattr(train, "iteration_batch", batch)
  return patch


def record(test, command_line, name, place):
  """Writes what is known of a run: stopped, and uninterrupted."""
  fields, stop = RUNS[name]
  arguments = [f"--config.{x}" for x in (COMMON + fields).split()]
  train = [
    "train",
    f"--config={test.CONFIG}:task=rotten_tomatoes",
    "--workdir=run",
    *arguments,
  ]
  halted, whole = place / f"{name}_stopped", place / f"{name}_whole"
  for folder in (halted, whole):
    folder.mkdir()
    test.lay(folder)
  with contextlib.chdir(whole):
    assert command_line(*train) == 0
  run = whole / "run"
  metrics = test.rows_of(run / "metrics.jsonl")
  summary = json.loads((run / "summary.json").read_text())
  known = {
    "arguments": arguments,
    "metric_names": [sorted(row) for row in metrics],
    "metrics": [test.without_clock(row) for row in metrics],
    "summary_names": sorted(summary),
    "summary": test.without_clock(summary),
    "ledger": (run / "ledger.txt").read_text(),
  }
  write_arrays(f"{name}.npz", test.final_state(run))
  patch = stopping_at(stop)
  with contextlib.chdir(halted):
    assert command_line(*train) == 143
    patch.undo()
    write(f"{name}.tar.gz", archived(halted / "run"))
    run = halted / "run"
    theta = run / ("bases" if (run / "bases").is_dir() else "checkpoints")
    known["theta_sha256"] = {
      str(step): test.fingerprint(run, step)
      for step in sorted(int(path.name) for path in theta.iterdir())
    }
    known["export"] = {}
    for what in ("merged", "base", "adapter") if name == "whole" else ("base",):
      out = place / f"{name}_{what}"
      assert test.module(test.EXPORT, "run", out, f"--what={what}") == 0
      known["export"][what] = test.tensors(out)
    assert command_line("evaluate", "--workdir=run") == 0
    known["evaluation"] = json.loads((run / "evaluation.json").read_text())
  write_json(f"{name}.json", known)


def main():
  """Writes everything, under the settings of the tests."""
  sys.path.insert(0, str(GOLDEN.parent))
  import conftest
  import golden_test as test

  about = {"zofo_jax": "0.1.0", "commit": "02af5ed"}
  write_json("about.json", about | {"arithmetic": test.arithmetic()})
  for name in test.SAMPLERS:
    write_arrays(f"z_{name}.npz", test.draw(name))
  for case in ("one_task", "two_tasks", "per_example"):
    write_arrays(f"step_{case}.npz", test.take_steps(case))
  write_model(conftest.tiny, GOLDEN / "model")
  (GOLDEN / "rows").mkdir()
  conftest.tiny["write_rows"](GOLDEN / "rows")
  command_line = conftest.command_line.__wrapped__()
  with tempfile.TemporaryDirectory() as place:
    for name in RUNS:
      record(test, command_line, name, pathlib.Path(place))


if __name__ == "__main__":
  main()
