"""What version 0.1.0 wrote is read, continued and drawn again, bit for bit.

The files in `tests/golden` are never written again: a run, a ledger and a
direction belong to the numbers in them, so these tests outlive every renaming.
They use public names and command lines alone. `golden/make.py` wrote the files
with the functions of this module.

Where the arithmetic is the one of that day (`arithmetic`: XLA's flags, the
versions of the libraries, and one computation without this library), everything
has to be equal to the bit. Elsewhere the last bits may be others: what is exact
by its nature (signs, masks, stored arrays) is compared to the bit all the same,
and the rest to the tolerances here.
"""

import ast
import contextlib
import functools
import hashlib
import json
import math
import os
import pathlib
import platform
import re
import runpy
import shutil
import sys
import tarfile
import warnings
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

import zofo_jax as zofo
from zofo_jax.core import keys

# --- All names of the library that these tests use --------------------------

Key = keys.DirectionKey
Sampler = zofo.Sampler
apply_directions = Sampler.apply_directions
weighted_sum = Sampler.weighted_sum
dot = zofo.perturbed.dot
read = zofo.perturbed.read
sgd, clip = zofo.outer.sgd, zofo.outer.clip
scale_by_running_rms = zofo.outer.scale_by_running_rms
# Run as `python -m`; `main` is the fixture `command_line`.
LEDGER, EXPORT = "zofo_jax.ledger", "zofo_jax.export"
CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "llama.py"
# Metrics and figures of the summary that later versions or devices add.
ADDED = frozenset({"selection_metric", "peak_device_bytes"})
# The same of the header of the ledger.
ADDED_HEADER = frozenset(["inputs"])

# --- The files, and how equal is equal ----------------------------------------

GOLDEN = pathlib.Path(__file__).parent / "golden"
STACKED = r"(^|/)layers/"
# float32 has 24 bits: so many units in the last place.
FEW_ULP = {"rtol": 8 * 2.0**-24, "atol": 8 * 2.0**-24}
# The factors of LowRank are in fixed point, in steps of 2^-8: where a last bit
# makes one of them round to the other side, z moves by up to a hundredth.
OF_FACTORS = {"rtol": 0.0, "atol": 2e-2}
# Stochastic rounding may take the other neighbour: one unit of bfloat16.
BFLOAT16 = {"rtol": 2.0**-7, "atol": 2.0**-9}
# After a few steps, whose coefficients divide differences by a small eps.
STEPS = {"rtol": 5e-2, "atol": 2e-2}
# What the clock and the machine decide.
CLOCK = frozenset(
  """
  seconds train_seconds compile_seconds rss_bytes peak_rss_bytes program_bytes
  """.split()
)


def pattern(*shape, start=0):
  """Float32 numbers in (-1, 1) that every machine makes alike."""
  numbers = (np.arange(math.prod(shape)) * 37 + start * 11) % 127 - 63
  return (numbers.reshape(shape) / 64).astype(np.float32)


def arithmetic():
  """What the last bit of a result depends on, but for this library."""
  x = pattern(40, 33)
  canary = jax.jit(lambda x: jax.nn.softmax(jnp.tanh(x @ x.T)))(x)
  return {
    "xla_flags": os.environ.get("XLA_FLAGS", ""),
    "device": jax.devices()[0].device_kind,
    "machine": platform.machine(),
    **{n: metadata.version(n) for n in ("jax", "jaxlib", "flax", "optax")},
    "canary": hashlib.sha256(np.asarray(canary).tobytes()).hexdigest(),
  }


@functools.cache
def load(name):
  if name.endswith(".json"):
    return json.loads((GOLDEN / name).read_text())
  with np.load(GOLDEN / name) as arrays:
    return dict(arrays)


@functools.cache
def same_arithmetic():
  return load("about.json")["arithmetic"] == arithmetic()


def check_arrays(actual, wanted, tolerance=None):
  """Compares {name: array}, to the bit if there is no tolerance."""
  assert actual.keys() == wanted.keys()
  for name, array in wanted.items():
    value = actual[name]
    assert (value.dtype, value.shape) == (array.dtype, array.shape), name
    if array.dtype != np.float32 or not tolerance:
      bits = f"u{array.dtype.itemsize}"
      np.testing.assert_array_equal(value.view(bits), array.view(bits), name)
    else:
      np.testing.assert_allclose(value, array, **tolerance, err_msg=name)


def to_arrays(tree, prefix=""):
  """Flattens to {path: NumPy array}; bfloat16 as float32, which holds it."""
  arrays = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    leaf = np.asarray(leaf)
    if leaf.dtype == jnp.bfloat16:
      leaf = leaf.astype(np.float32)
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    arrays[prefix + name] = leaf
  return arrays


def test_to_the_bit():
  """Says in the report of skipped tests what the others compared."""
  now, then = arithmetic(), load("about.json")["arithmetic"]
  different = {name for name in now if now[name] != then[name]}
  if different:
    pytest.skip(f"compared to tolerances: {', '.join(sorted(different))}")


# --- Directions ---------------------------------------------------------------

KINDS = {
  "gaussian": zofo.directions.Gaussian(),
  "rademacher": zofo.directions.Rademacher(),
  "low_rank": zofo.directions.LowRank(3),
  "per_example": zofo.directions.PerExample(),
  "sparse": zofo.directions.Sparse(threshold=0.5),
}
SAMPLERS = {
  name: Sampler(kind, stacked=STACKED) for name, kind in KINDS.items()
}
SAMPLERS["some_weights"] = Sampler(
  zofo.directions.Rademacher(),
  select=lambda path: path != "norm/scale",
  layers=(1,),
  stacked=STACKED,
)
# Of signs and zeros: no arithmetic rounds them.
EXACT = {"rademacher", "per_example", "sparse", "some_weights"}


def weights(*dtypes):
  """A table, a stack of matrices and one of vectors, a vector and a number.

  Directions are functions of these paths. The types are of table, vectors, and
  the rest.
  """
  table, vector, rest = dtypes or ("float32",) * 3
  return jax.tree.map(
    jnp.asarray,
    {
      "embed": {"embedding": pattern(70, 8)},
      "layers": {
        "attention": {"query": {"kernel": pattern(2, 12, 10, start=2)}},
        "norm": {"scale": pattern(2, 12, start=3)},
      },
      "norm": {"scale": pattern(33, start=4)},
      "temperature": pattern(start=5),
    },
    {
      "embed": {"embedding": table},
      "layers": {
        "attention": {"query": {"kernel": rest}},
        "norm": {"scale": vector},
      },
      "norm": {"scale": vector},
      "temperature": rest,
    },
  )


def draw(name):
  """Everything that one kind of direction gives, as {name: array}."""
  sampler = SAMPLERS[name]
  key = jax.random.key(7)
  frame = jax.random.fold_in(key, np.uint32(2**32 - 1))
  sum_fn = jax.jit(functools.partial(weighted_sum, sampler))
  results = {}
  for step in (0, 1):  # of one subspace
    direction_keys = jax.random.split(jax.random.fold_in(key, step), 3)
    for q in (0, 1):
      keys = Key(direction_keys[q : q + 1], frame)
      z = sum_fn(weights(), keys, jnp.ones(1))
      results |= to_arrays(z, f"step_{step}_z_{q}/")
  applied = jax.jit(functools.partial(apply_directions, sampler))(
    weights("bfloat16", "bfloat16", "float32"),
    Key(direction_keys, frame),
    np.array([0.5, -1.25, 2.0], np.float32) / 64,
    decay=np.float32(0.1),
    rounding_key=key,
  )
  return results | to_arrays(applied, "applied/")


@pytest.mark.parametrize("name", SAMPLERS)
def test_directions(name):
  actual, wanted = draw(name), load(f"z_{name}.npz")
  assert actual.keys() == wanted.keys()
  close = OF_FACTORS if name == "low_rank" else FEW_ULP
  for path, array in wanted.items():
    tolerance = None if name in EXACT else close
    if path.startswith("applied/"):
      tolerance = BFLOAT16 if "temp" not in path else close
    if same_arithmetic():
      tolerance = None
    check_arrays({path: actual[path]}, {path: array}, tolerance)


# --- The bilevel step ---------------------------------------------------------


def loss_fn(base, adapter, batch, key):
  """A perceptron with a scan over its layers and a low-rank adapter."""
  x, y = (leaf.astype(jnp.float32) for leaf in batch)
  if key is not None:
    x = x + 0.01 * jax.random.normal(key, x.shape)
  kernel = base["first"]["kernel"]
  adapted = (x @ adapter["a"]) @ adapter["b"]
  bias = read(base["first"]["bias"]).astype(jnp.float32)
  hidden = jnp.tanh(dot(x, kernel).astype(jnp.float32) + adapted + bias[None])

  def layer(hidden, weights):
    moved = dot(hidden, weights["kernel"]).astype(jnp.float32)
    return hidden + jnp.tanh(moved), None

  hidden, _ = jax.lax.scan(layer, hidden, base["layers"])
  return jnp.mean((hidden - y) ** 2)


def make_algorithm(case):
  """The algorithm of a case, its type of theta and its number of tasks."""
  plain = {
    "lower_tx": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
    "upper_tx": optax.adam(1e-2),
    "base_tx": sgd(3e-2, clip(0.5), weight_decay=0.1),
  }
  zo_options = {"num_directions": 2, "subspace_steps": 2}
  rms = sgd(3e-2, scale_by_running_rms(), weight_decay=0.1)
  kind, lazy, dtype, num_tasks, changes = {
    "one_task": (zofo.directions.LowRank(2), True, "float32", None, {}),
    "two_tasks": (
      *(zofo.directions.Gaussian(), False, "bfloat16", 2),
      {"over_tasks": True},
    ),
    "per_example": (
      *(zofo.directions.PerExample(), True, "float32", None),
      {"base_tx": rms},
    ),
  }[case]
  if case == "per_example":
    zo_options |= {"per_example": True, "num_directions": 1}
  sampler = Sampler(kind, stacked=STACKED, lazy=lazy)
  zo = zofo.ZerothOrder(sampler, **zo_options)
  algorithm = zofo.make_bilevel_step(loss_fn, zo=zo, **(plain | changes))
  return algorithm, dtype, num_tasks


def take_steps(case):
  """The state after two iterations and what both of them told."""
  algorithm, dtype, num_tasks = make_algorithm(case)
  lead = () if num_tasks is None else (num_tasks,)
  base = {
    "first": {"kernel": pattern(5, 6), "bias": pattern(6, start=1)},
    "layers": {"kernel": pattern(2, 6, 6, start=2) / 2},
  }
  base = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), base)
  adapters = [
    jax.tree.map(
      jnp.asarray,
      {
        "a": pattern(*lead, 5, 2, start=start),
        "b": pattern(*lead, 2, 6, start=start + 1) / 4,
      },
    )
    for start in (3, 5)
  ]

  def rows(start, *steps):
    x = pattern(*lead, *steps, 4, 5, start=start)
    return x, pattern(*lead, *steps, 4, 6, start=start + 1)

  state = algorithm.init(jax.random.key(3), base, *adapters)
  step_fn = jax.jit(algorithm.step, donate_argnums=0)
  results = {}
  for step in (0, 1):
    batch = zofo.BilevelBatch(
      lower=rows(10 + step, 2), penalty=rows(20 + step), upper=rows(30 + step)
    )
    if num_tasks:
      batch = batch._replace(weights=np.array([0.25, 0.75], np.float32))
    hparams = zofo.BilevelHParams(np.float32(1e-2), np.float32(2.0))
    state, info = step_fn(state, batch, hparams)
    results |= to_arrays(info, f"info_{step}/")
  return results | to_arrays(state, "state/")


@pytest.mark.parametrize(
  "case",
  [
    "one_task",
    "two_tasks",
    pytest.param("per_example", marks=pytest.mark.slow),
  ],
)
def test_bilevel_step(case):
  tolerance = None if same_arithmetic() else STEPS
  check_arrays(take_steps(case), load(f"step_{case}.npz"), tolerance)


# --- Runs ---------------------------------------------------------------------

# whole: Bilevel-ZOFO, theta in every checkpoint, two low-rank directions of one
# subspace for three steps, on some weights, dropout. apart: MeZO, which has no
# adapter; theta in bfloat16, rebuilt from the ledger.
RUNS = ("whole", "apart")


def rows_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def without_clock(row):
  return {k: v for k, v in row.items() if k not in CLOCK | ADDED}


def stored_state(folder, step):
  """Reads a checkpoint's arrays as they lie on the disk, by orbax alone."""
  place = folder / str(step) / "state"
  described = json.loads((place / "_METADATA").read_text())["tree_metadata"]
  assert described  # and with it the names of what has no arrays
  with ocp.PyTreeCheckpointer() as reader, warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of shardings that are not given
    tree = reader.restore(place.resolve())
  arrays = {}
  for name in sorted(described):
    leaf, path = tree, ast.literal_eval(name)
    for part in path:
      leaf = leaf[int(part) if isinstance(leaf, list | tuple) else part]
    arrays["/".join(map(str, path))] = leaf
  return to_arrays(arrays)


def final_state(run):
  """Reads what a finished run ends with, theta included."""
  last = max(int(p.name) for p in (run / "checkpoints").iterdir())
  state = stored_state(run / "checkpoints", last)
  if (run / "bases").is_dir():
    state |= stored_state(run / "bases", last)
  return state


def fingerprint(run, step):
  """SHA-256 of theta's paths, types, shapes and bytes, as a ledger has it."""
  digest = hashlib.sha256()
  place = "bases" if (run / "bases").is_dir() else "checkpoints"
  with ocp.PyTreeCheckpointer() as reader, warnings.catch_warnings():
    warnings.simplefilter("ignore")
    state = reader.restore((run / place / str(step) / "state").resolve())
  for path, leaf in jax.tree_util.tree_leaves_with_path(state["base"]):
    leaf = np.asarray(leaf)
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    digest.update(f"{name} {leaf.dtype} {leaf.shape}\n".encode())
    digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
  return digest.hexdigest()


def tensors(folder):
  """Digests of every tensor in a folder's safetensors, with type and shape."""
  digests = {}
  for path in sorted(folder.glob("*.safetensors")):
    for name, array in safetensors.numpy.load_file(path).items():
      digest = hashlib.sha256(array.tobytes()).hexdigest()
      digests[name] = [str(array.dtype), list(array.shape), digest]
  return digests


def module(name, *arguments):
  """Runs `python -m` in this process; returns the exit code."""
  with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
    # It may have been imported already, by another test.
    warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)
    patch.setattr(sys, "argv", [name, *map(str, arguments)])
    try:
      runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
      return stop.code or 0
  return 0


def lay(folder, name=None):
  """Puts the model, the rows and a stopped run where its paths lead to."""
  for part in ("model", "rows"):
    shutil.copytree(GOLDEN / part, folder / part)
  if name is not None:
    with tarfile.open(GOLDEN / f"{name}.tar.gz") as archive:
      archive.extractall(folder, filter="data")
  return folder


def train(command_line, name):
  """Trains in the current folder, from a checkpoint if there is one."""
  arguments = load(f"{name}.json")["arguments"]
  return command_line(
    "train",
    f"--config={CONFIG}:task=rotten_tomatoes",
    "--workdir=run",
    *arguments,
  )


@pytest.fixture(scope="module", params=RUNS)
def stopped(request, tmp_path_factory):
  """(name, folder) of a run that a signal stopped; not to be written to."""
  return request.param, lay(tmp_path_factory.mktemp("stopped"), request.param)


@pytest.fixture(scope="module")
def resumed(stopped, command_line, tmp_path_factory):
  """(name, folder of the run) after the same command again."""
  name = stopped[0]
  folder = lay(tmp_path_factory.mktemp("resumed"), name)
  with contextlib.chdir(folder):
    assert train(command_line, name) == 0
  return name, folder / "run"


@pytest.fixture(scope="module")
def fresh(command_line, tmp_path_factory):
  """(name, folder of the run) of one from the beginning."""
  folder = lay(tmp_path_factory.mktemp("fresh"))
  with contextlib.chdir(folder):
    assert train(command_line, "whole") == 0
  return "whole", folder / "run"


def check_run(name, run):
  """Compares a finished run with the one of version 0.1.0."""
  golden = load(f"{name}.json")
  metrics = rows_of(run / "metrics.jsonl")
  summary = json.loads((run / "summary.json").read_text())
  # Names first: a plot, a table and a script know them.
  names = [list(row.keys() - ADDED) for row in metrics]
  assert [sorted(row) for row in names] == golden["metric_names"]
  assert sorted(summary.keys() - ADDED) == golden["summary_names"]
  metrics = [without_clock(row) for row in metrics]
  summary = without_clock(summary)
  state = final_state(run)
  if same_arithmetic():
    assert metrics == golden["metrics"]
    assert summary == golden["summary"]
    check_arrays(state, load(f"{name}.npz"))
    return
  assert [row["step"] for row in metrics] == [
    row["step"] for row in golden["metrics"]
  ]
  for actual, wanted in zip(metrics, golden["metrics"], strict=True):
    for field in wanted:
      if field.endswith("_loss"):
        np.testing.assert_allclose(actual[field], wanted[field], **STEPS)
      if field.endswith("_passes"):
        assert actual[field] == wanted[field]
  check_arrays(state, load(f"{name}.npz"), STEPS)


def check_ledger(name, run):
  """Compares the lines; to the bit, and byte for byte, where all is."""
  header, *lines = (run / "ledger.txt").read_text().splitlines()
  golden_header, *golden = load(f"{name}.json")["ledger"].splitlines()
  number = r"(?:[0-9a-f]{8})"
  for actual, wanted in zip(lines, golden, strict=True):
    assert re.fullmatch(
      rf"\d+ \d+ {number} {number} {number}+ {number}+ {number}", actual
    )
    if same_arithmetic():
      assert actual == wanted
    assert actual.split()[:2] == wanted.split()[:2]  # step, directions
  # A field more may be there, none less, and none of another value.
  header, golden_header = (
    json.loads(text.rpartition(" ")[0]) for text in (header, golden_header)
  )
  assert header.keys() - ADDED_HEADER == golden_header.keys()
  for field in ("format", "key", "base_sha256"):
    assert header[field] == golden_header[field]
  for part in ("model", "zo"):
    assert golden_header[part].items() <= header[part].items()
  assert header["versions"].keys() == golden_header["versions"].keys()


def test_a_stopped_run_goes_on(resumed):
  check_run(*resumed)
  check_ledger(*resumed)


def test_a_new_run_is_the_old_one(fresh):
  check_run(*fresh)
  check_ledger(*fresh)


def test_every_field_of_the_config_is_still_there(resumed, stopped):
  _, folder = stopped
  before, now = (
    json.loads((run / "config.json").read_text())
    for run in (folder / "run", resumed[1])
  )
  assert before.keys() <= now.keys()
  for name, value in before.items():
    if isinstance(value, dict):
      assert value.items() <= now[name].items(), name
    else:
      assert value == now[name], name


def test_the_ledger_gives_theta(stopped, monkeypatch, capsys, tmp_path):
  name, folder = stopped
  monkeypatch.chdir(folder)
  golden = load(f"{name}.json")
  where = "--ledger=run/ledger.txt"
  stored = "bases" if name == "apart" else "checkpoints"
  steps = sorted(int(p.name) for p in (folder / "run" / stored).iterdir())
  assert [str(step) for step in steps] == list(golden["theta_sha256"])
  for step in steps:
    out = tmp_path / str(step)
    code = module(LEDGER, "replay", where, f"--to={step}", f"--out={out}")
    assert code == 0
    (sha256,) = re.findall(r"\b[0-9a-f]{64}\b", capsys.readouterr().out)
    wanted = golden["theta_sha256"][str(step)]
    # What lies on the disk is what it was, whatever the arithmetic.
    assert fingerprint(folder / "run", step) == wanted
    if same_arithmetic():
      assert sha256 == wanted
      assert module(LEDGER, "verify", where, "--run=run", f"--to={step}") == 0


def test_what_is_handed_over(stopped, monkeypatch, tmp_path):
  name, folder = stopped
  monkeypatch.chdir(folder)
  for what, wanted in load(f"{name}.json")["export"].items():
    assert module(EXPORT, "run", tmp_path / what, f"--what={what}") == 0
    actual = tensors(tmp_path / what)
    assert actual.keys() == wanted.keys()
    # Where theta is not stored, or has to be added to, there is arithmetic.
    stored = name == "whole" and what != "merged"
    for tensor, described in wanted.items():
      assert actual[tensor][:2] == described[:2]
      if stored or same_arithmetic():
        assert actual[tensor] == described, (what, tensor)


def test_the_scores_of_a_saved_run(stopped, command_line, tmp_path):
  name, folder = stopped
  shutil.copytree(folder, tmp_path / "copy")
  with contextlib.chdir(tmp_path / "copy"):
    assert command_line("evaluate", "--workdir=run") == 0
    actual = json.loads(pathlib.Path("run/evaluation.json").read_text())
  wanted = load(f"{name}.json")["evaluation"]
  assert actual.keys() - ADDED == wanted.keys()
  if same_arithmetic():
    assert {k: v for k, v in actual.items() if k not in ADDED} == wanted
