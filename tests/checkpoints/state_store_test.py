"""A run on disk: signals, damage, rare theta, what never goes silently wrong.

One uninterrupted run with theta apart from its checkpoints is what the others
must come to; programs are compiled once and cached.
"""

import ast
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors
from etils import epath

import zofo_jax
from tests import tiny
from zofo_jax import errors, main, report
from zofo_jax.builders import run as run_lib
from zofo_jax.checkpoints import (
  inputs,
  ledger,
  manager,
  run_folder,
  state_store,
)
from zofo_jax.commands import export
from zofo_jax.config import defaults
from zofo_jax.training import guards, train

STEPS = 8
CLOCK = (
  "seconds",
  "compile_seconds",
  "rss_bytes",
  "train_seconds",
  "peak_rss_bytes",
)


@pytest.fixture(scope="module")
def config(tiny_model, tiny_rows):
  config = tiny.base_config()
  config.loss = "classification"
  config.penalty = 1.0
  config.model.name = str(tiny_model)
  config.data.task = "rotten_tomatoes"
  config.data.dir = str(tiny_rows)
  config.data.num_selection = config.data.num_test = 16
  config.lower.num_steps = 1
  config.upper.learning_rate = 1e-2
  config.zo.learning_rate = 1e-3
  config.zo.select = tiny.MOVED
  config.train.num_steps = STEPS
  config.train.eval_every_steps = 2
  config.train.max_nonfinite = 2
  config.ckpt.keep = STEPS
  config.ckpt.base_every_steps = 3
  return config


@pytest.fixture(scope="module")
def done(config, tmp_path_factory):
  folder = tmp_path_factory.mktemp("runs") / "done"
  train.train(config, str(folder))
  return folder


@pytest.fixture(scope="module")
def expected(done):
  return states(done)


def states(folder):
  """Reads every state of a run as {(step, name): bytes}."""
  run = run_lib.make_run(run_lib.read_config(epath.Path(folder)))
  contents = {}
  with state_store.open_store(run, epath.Path(folder)) as opened:
    for step in opened.checkpoints.steps():
      state, _ = opened.restore(step)
      state = state._replace(key=jax.random.key_data(state.key))
      for path, leaf in jax.tree.leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        contents[step, name] = np.asarray(leaf).tobytes()
  return contents


def steady(folder):
  rows = report.read_jsonl(folder / "metrics.jsonl")
  rows.append(json.loads((folder / "summary.json").read_text()))
  return [{k: v for k, v in r.items() if k not in CLOCK} for r in rows]


def stopped_at(monkeypatch, config, folder, step, number=signal.SIGTERM):
  """Trains until a signal comes in the middle of a step."""
  make = train.iteration_batch

  def raising(*arguments):
    if arguments[-1] == step - 1:
      os.kill(os.getpid(), number)
    return make(*arguments)

  with monkeypatch.context() as patch:
    patch.setattr(train, "iteration_batch", raising)
    with pytest.raises(errors.InterruptedRun) as caught:
      train.train(config, str(folder))
  return caught.value


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 4
  path.write_bytes(content)


def arrays_of(folder):
  """Returns the first parts of the names of a checkpoint's arrays."""
  metadata = json.loads((folder / "state" / "_METADATA").read_text())
  paths = (ast.literal_eval(name) for name in metadata["tree_metadata"])
  return {path[0] for path in paths if len(path) > 1}


def test_theta_lies_apart_and_the_ledger_gives_it(done, config, capsys):
  assert sorted(p.name for p in (done / "bases").iterdir()) == ["4", "8"]
  assert {"upper", "lower"} <= arrays_of(done / "checkpoints" / "4")
  assert "base" not in arrays_of(done / "checkpoints" / "4")
  assert arrays_of(done / "bases" / "4") == {"base"}
  path = done / "checkpoints" / "8" / "extra" / "metadata"
  extra = json.loads(path.read_text())
  written = json.loads((done / "config.json").read_text())
  assert extra["config"] == written and written["train"]["num_steps"] == STEPS
  assert f'"jax": "{jax.__version__}"' in extra["ledger"].replace('":"', '": "')
  # The theta that was written and the one that the lines give.
  arguments = [f"--ledger={done / 'ledger.txt'}", f"--run={done}"]
  assert main.main(["ledger", "verify", *arguments]) == 0
  assert main.main(["ledger", "verify", *arguments, "--to=4"]) == 0
  output = capsys.readouterr().out
  assert output.count("bit for bit") == 2
  # A ledger of which one number is another's: the checksum is right.
  parsed = ledger.read(done / "ledger.txt")
  move = parsed.lines[1].move
  parsed.lines[1] = parsed.lines[1]._replace(
    move=move._replace(weights=-move.weights)
  )
  other = done.parent / "other.txt"
  other.write_text(parsed.serialize())
  assert main.main(["ledger", "verify", f"--ledger={other}", arguments[1]]) == 2
  assert "differ in ['" in capsys.readouterr().err


# Of variables of a shell: what jax reports to a command, what jax would
# compute with, and what other libraries read.
SHELL = {
  "JAX_DEFAULT_PRNG_IMPL": "rbg",
  "JAX_DISABLE_JIT": "1",
  "JAX_ENABLE_CUSTOM_PRNG": "1",
  "JAX_ENABLE_X64": "1",
  "JAX_HIGH_DYNAMIC_RANGE_GUMBEL": "1",
  "JAX_LEGACY_PRNG_KEY": "error",
  "JAX_NUMPY_DTYPE_PROMOTION": "strict",
  "JAX_RANDOM_SEED_OFFSET": "7",
  "JAX_SOFTMAX_CUSTOM_JVP": "1",
  "JAX_THREEFRY_PARTITIONABLE": "0",
  "LC_ALL": "C",
  "OMP_NUM_THREADS": "1",
  "PYTHONHASHSEED": "5",
  "TZ": "Asia/Tokyo",
}


@pytest.mark.slow
def test_a_shell_changes_no_bit(done, expected, config, tmp_path):
  """Another process, with all of these variables at once, in another folder."""
  text = json.dumps(config.to_dict())
  (tmp_path / "config.py").write_text(
    "import json\n"
    "from zofo_jax.config import defaults\n"
    "def get_config():\n"
    "  config = defaults.base_config()\n"
    f"  config.update(json.loads({text!r}))\n"
    "  return config\n"
  )
  # As `conftest.py` sets it here; another one is another computation.
  shell = SHELL | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
  package = pathlib.Path(zofo_jax.__file__).parents[1]
  process = subprocess.run(
    [
      *(sys.executable, "-m", "zofo_jax.main", "train"),
      *("--config=config.py", "--workdir=run"),
    ],
    env={**os.environ, **shell, "PYTHONPATH": str(package)},
    cwd=tmp_path,
    capture_output=True,
    text=True,
  )
  assert process.returncode == 0, process.stderr
  for name in ("JAX_DEFAULT_PRNG_IMPL", "JAX_THREEFRY_PARTITIONABLE"):
    assert f"zofo_jax: {name} is " in process.stderr
  assert states(tmp_path / "run") == expected
  assert steady(tmp_path / "run") == steady(done)
  lines = [
    (folder / "ledger.txt").read_text().splitlines()[1:]
    for folder in (tmp_path / "run", done)
  ]
  assert lines[0] == lines[1]


def test_a_checkpoint_and_the_ledger_say_what_the_run_rests_on(done):
  described = json.loads((done / inputs.FILE).read_text())
  assert described["rows"]["test"]["count"] == 16
  assert ledger.read(done / "ledger.txt").header["inputs"] == described
  path = done / "checkpoints" / "8" / "extra" / "metadata"
  text = json.loads(path.read_text())["ledger"]
  assert ledger.parse(text.encode(), "").header["inputs"] == described


def test_rows_that_changed_end_a_resumption(
  done, expected, config, tmp_path, tiny_rows
):
  folder = shutil.copytree(done, tmp_path / "run")
  rows = shutil.copytree(tiny_rows, tmp_path / "rows")
  with (rows / "train.jsonl").open("a") as file:
    for number in range(40):
      row = {"text": f"a new film number {number}", "label": number % 2}
      file.write(json.dumps(row) + "\n")
  changed = config.copy_and_resolve_references()
  changed.data.dir = str(rows)
  changed.ckpt.may_change = ("data.dir",)
  message = r"other rows in lower \(118 then, 144 now\), other rows in upper"
  with pytest.raises(errors.UserError, match=message):
    train.train(changed, str(folder))
  assert states(folder) == expected
  changed.ckpt.may_change = ("data.dir", "rows")
  train.train(changed, str(folder))  # it was at its end
  described = json.loads((folder / inputs.FILE).read_text())
  assert described["rows"]["lower"]["count"] == 144


def test_a_signal_and_damage_lose_nothing(
  done, expected, config, tmp_path, monkeypatch, caplog
):
  folder = tmp_path / "run"
  stopped = stopped_at(monkeypatch, config, folder, 7)
  assert stopped.code == 143 and "SIGTERM at step 7 of 8" in str(stopped)
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  with manager.Checkpoints(folder / "checkpoints") as checkpoints:
    assert checkpoints.steps() == [2, 4, 6, 7]
  # The last save is flipped, the one before has lost a file, and so has the
  # newest theta; the ledger has a bit flipped, and a torn line.
  flip(max((folder / "checkpoints/7/state").rglob("d/*")))
  next((folder / "checkpoints/6").rglob("_METADATA")).unlink()
  max((folder / "bases/4").rglob("d/*")).write_bytes(b"")
  flip(folder / "ledger.txt")
  with (folder / "ledger.txt").open("a") as file:
    file.write("8 1 38")
  with pytest.raises(errors.UserError, match=r"line \d is corrupt"):
    ledger.read(folder / "ledger.txt")
  train.train(config, str(folder))
  output = caplog.text
  assert "checkpoints/7' is corrupt: 'state/" in output
  assert "checkpoints/6' lacks 'state/" in output
  assert "bases/4' is corrupt: 'state/" in output
  assert "ledger.txt' is corrupt; it is written anew" in output
  assert sorted(p.name for p in (folder / "damaged/checkpoints").iterdir()) == [
    "6",
    "7",
  ]
  assert states(folder) == expected
  assert steady(folder) == steady(done)
  assert (folder / "ledger.txt").read_bytes() == (
    done / "ledger.txt"
  ).read_bytes()


def test_broken_steps_are_skipped_and_end_a_run(
  done, expected, config, tmp_path, monkeypatch
):
  make = train.iteration_batch

  def broken(*arguments):
    batch = make(*arguments)
    if arguments[-1] < 4:
      return batch
    return jax.tree.map(
      lambda x: np.full_like(x, np.nan) if x.dtype == np.float32 else x, batch
    )

  monkeypatch.setattr(train, "iteration_batch", broken)
  folder = tmp_path / "run"
  with pytest.raises(errors.UserError, match="2 steps in a row were not fin"):
    train.train(config, str(folder))
  actual = states(folder)
  last = max(step for step, _ in actual)
  assert last in (6, 7)  # noticed one step late
  for (step, name), value in expected.items():
    if step == 4 and name != ".step":
      assert actual[last, name] == value, name


def test_a_full_disk_is_one_sentence(
  done, expected, config, tmp_path, monkeypatch
):
  folder = shutil.copytree(done, tmp_path / "run")
  shutil.rmtree(folder / "checkpoints" / "8")

  def full(*arguments):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(os, "fsync", full)
    with pytest.raises(errors.UserError, match=r"\(No space left on device\)"):
      train.train(config, str(folder))
  left = states(folder)
  assert {step for step, _ in left} == {2, 4, 6}
  assert left.items() <= expected.items()
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.UserError, match="cannot be written to"):
    train.train(config, str(tmp_path / "file" / "run"))


def test_another_config_names_its_fields(done, config, tmp_path):
  changed = config.copy_and_resolve_references()
  changed.upper.learning_rate = 1.0
  with pytest.raises(errors.UserError, match=r"upper.learning_rate was 0.01"):
    run_folder.check_config(defaults.flat(changed), epath.Path(done))
  changed.ckpt.may_change = ("upper.learning_rate", "zo.rank")
  run_folder.check_config(defaults.flat(changed), epath.Path(done))
  changed.zo.rank = 7  # would give the ledger's lines another meaning
  with pytest.raises(errors.UserError, match=r"\(zo.rank never may\)"):
    run_folder.check_config(defaults.flat(changed), epath.Path(done))


def test_guard_counts_and_compares():
  guard = guards.Guard({}, max_nonfinite=3, max_loss_ratio=2.0)
  for _ in range(2):
    assert not guard.update([1.0], skipped=True)
    assert not guard.update([1.0, float("nan")], skipped=False)
    assert not guard.update([1.0], skipped=False)
  assert guard.state["nonfinite"] == 4
  # What it knows goes through a checkpoint.
  memory = json.loads(json.dumps(guard.state))
  guard = guards.Guard(memory, max_nonfinite=0, max_loss_ratio=2.0)
  for _ in range(20):
    assert not guard.update([float("inf")], skipped=True)
    assert not guard.update([1.0], skipped=False)
  problems = [guard.update([8.0], skipped=False) for _ in range(3)]
  assert [bool(p) for p in problems] == [False, True, True]  # 1.7, 2.33, ...
  assert "above 2 times the 1 of its start" in problems[1]


# Hand-over.


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_what_is_handed_over_gives_the_same_logits(
  done, config, tmp_path, tiny_model
):
  torch = pytest.importorskip("torch")
  peft = pytest.importorskip("peft")
  import transformers

  for what in export.WHAT:
    export.export(str(done), str(tmp_path / what), what)
  run = run_lib.make_run(config)
  with state_store.open_store(run, epath.Path(done)) as opened:
    state, _ = opened.best()
  tokens = np.arange(20, 32, dtype=np.int32).reshape(2, 6)
  mask = np.ones_like(tokens, bool)

  def our_logits(base, adapter):
    variables = {"params": base, "adapter": adapter}
    return run.model.module.apply(variables, tokens, mask, method="logits")

  def hf_logits(model):
    with torch.no_grad():
      return model(torch.tensor(tokens.astype(np.int64))).logits.numpy()

  def read(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder)

  def close(one, other):
    np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)

  adapted = our_logits(state.base, state.upper)
  bare = our_logits(state.base, {})
  assert np.abs(adapted - bare).max() > 1e-2
  close(hf_logits(read(tmp_path / "base")), bare)
  close(hf_logits(read(tmp_path / "merged")), adapted)
  close(
    hf_logits(
      peft.PeftModel.from_pretrained(
        read(tmp_path / "base"), tmp_path / "adapter"
      )
    ),
    adapted,
  )
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
  assert (
    tokenizer("a film")["input_ids"]
    == (run.model.tokenizer("a film")["input_ids"])
  )
  # And back: a run that starts where this one ended.
  again = config.copy_and_resolve_references()
  again.model.name = str(tmp_path / "base")
  again.adapter.init_from = str(tmp_path / "adapter")
  from zofo_jax.builders import adapter as adapter_lib
  from zofo_jax.builders import model as model_lib

  begun = run_lib.make_run(again)
  start = begun.init(
    model_lib.load_base(begun.model),
    adapter_lib.load_adapter(
      again.adapter.init_from, begun.model, begun.init_adapter
    ),
  )
  np.testing.assert_array_equal(our_logits(start.base, start.upper), adapted)
  np.testing.assert_array_equal(our_logits(start.base, start.lower), adapted)
  again.lora.rank = 4
  with pytest.raises(errors.UserError, match=r"init_from: .* has layers/att"):
    adapter_lib.load_adapter(
      again.adapter.init_from,
      begun.model,
      adapter_lib.make_init_fn(again, begun.model),
    )


def test_export_says_what_is_wrong(done, tmp_path, capsys):
  call = lambda *arguments: main.main(["export", *map(str, arguments)])
  assert call(done, tmp_path / "x", "--what=bas") == 2
  assert "found 'bas'. Did you mean 'base'?" in capsys.readouterr().err
  assert call(tmp_path / "none", tmp_path / "x", "--what=base") == 2
  assert "holds no run" in capsys.readouterr().err
  (tmp_path / "full").mkdir()
  pathlib.Path(tmp_path / "full" / "file").write_text("")
  assert call(done, tmp_path / "full", "--what=base") == 2
  assert "is not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_an_adapters_run_never_writes_theta(
  config, tmp_path, tiny_model, monkeypatch, capsys
):
  alone = config.copy_and_resolve_references()
  alone.method, alone.ckpt.base_every_steps = "peft", 0
  train.train(alone, str(tmp_path / "done"))
  written = arrays_of(tmp_path / "done" / "checkpoints" / "8")
  assert "upper" in written and "base" not in written
  stopped_at(monkeypatch, alone, tmp_path / "run", 6)
  train.train(alone, str(tmp_path / "run"))
  assert states(tmp_path / "run") == states(tmp_path / "done")
  assert steady(tmp_path / "run") == steady(tmp_path / "done")
  contents = states(tmp_path / "run")
  # Theta is what the model's own file has.
  (file,) = tiny_model.glob("*.safetensors")
  with safetensors.safe_open(file, "numpy") as opened:
    names = {n: opened.get_tensor(n).tobytes() for n in opened.keys()}
  stored = contents[8, ".base['embed']['embedding']"]
  assert stored in names.values()
  arguments = [f"--ledger={tmp_path / 'run/ledger.txt'}"]
  arguments += [f"--run={tmp_path / 'run'}"]
  assert main.main(["ledger", "verify", *arguments]) == 2
  assert "a run that moves theta" in capsys.readouterr().err
