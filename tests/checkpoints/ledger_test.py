"""The ledger: its file, damage to it, and theta rebuilt from it bit for bit."""

import functools
import json
from importlib import metadata

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from zofo_jax import errors, main
from zofo_jax.checkpoints import ledger
from zofo_jax.checkpoints.ledger import replay
from zofo_jax.config import defaults
from zofo_jax.core import bilevel, directions, outer, perturbed
from zofo_jax.core import keys as keys_lib
from zofo_jax.core import sampler as sampler_lib
from zofo_jax.core.types import BilevelBatch, BilevelHParams, InPlaceUpdate
from zofo_jax.core.zeroth_order import ZerothOrder
from zofo_jax.models.decoder import STACKED


def line(step, *weights, move=True):
  """A step whose coefficients are its weights, doubled."""
  weights = np.asarray(weights, np.float32)
  return ledger.LedgerEntry(
    step,
    2 * weights,
    InPlaceUpdate(weights, np.float32(1e-30), np.float32(0.1))
    if move
    else None,
  )


def content(*lines):
  return ledger.Ledger({"key": [0, 1]}, list(lines)).serialize().encode()


GOOD = content(line(1, 0.1, -3e-45), line(2, np.inf), line(3, 2.0, move=False))


# The file.


def test_numbers_come_back_to_the_bit():
  parsed = ledger.parse(GOOD, "f")
  assert parsed.serialize().encode() == GOOD and not parsed.truncated
  assert parsed.header == {"key": [0, 1]}
  one, two, three = parsed.lines
  np.testing.assert_array_equal(
    one.move.weights.view(np.uint32),
    np.array([0.1, -3e-45], np.float32).view(np.uint32),
  )
  assert one.move.decay == np.float32(1e-30)
  assert two.coefficients == [np.inf]
  assert three.move is None and three.coefficients == [4.0]


def test_a_truncated_last_line_is_dropped():
  cut = GOOD.rstrip(b"\n").rpartition(b"\n")[0] + b"\n"
  for end in range(len(cut) + 1, len(GOOD)):
    parsed = ledger.parse(GOOD[:end], "f")
    assert parsed.truncated and [x.step for x in parsed.lines] == [1, 2]


def test_every_flipped_bit_is_noticed():
  whole = ledger.parse(GOOD, "f")
  for place in range(len(GOOD)):
    for bit in range(8):
      broken = bytearray(GOOD)
      broken[place] ^= 1 << bit
      try:
        parsed = ledger.parse(bytes(broken), "f")
      except errors.UserError as error:
        assert "'f'" in str(error)
        continue
      # What ends the file became something else: the line is truncated.
      assert place == len(GOOD) - 1 and parsed.truncated
      assert len(parsed.lines) == len(whole.lines) - 1


def test_a_damaged_line_is_named():
  broken = GOOD.replace(b"\n2 1", b"\n2 2")
  with pytest.raises(errors.UserError, match="'f' line 3 is corrupt: its chec"):
    ledger.parse(broken, "f")
  first, *rest = GOOD.splitlines(keepends=True)
  with pytest.raises(errors.UserError, match="line 2: expected step 1; found"):
    ledger.parse(b"".join([first, *rest[1:]]), "f")
  with pytest.raises(errors.UserError, match="line 1: expected the header of"):
    ledger.parse(b"".join(rest), "f")


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=500, deadline=None, database=None)
def test_anything_is_read_or_refused_in_a_sentence(data):
  kind = data.draw(st.sampled_from(["bytes", "spliced", "sealed"]))
  if kind == "bytes":
    text = data.draw(st.binary(max_size=200))
  elif kind == "spliced":
    where = data.draw(st.integers(0, len(GOOD)))
    text = GOOD[:where] + data.draw(st.binary(max_size=20)) + GOOD[where + 3 :]
  else:  # the checksum is right, what is in it may be anything
    written = data.draw(st.text(max_size=40).filter(lambda t: "\n" not in t))
    sealed = written.encode("utf-8", "replace").decode()
    text = GOOD + ledger.format._sealed(sealed).encode()
  try:
    parsed = ledger.parse(text, "f")
  except errors.UserError as error:
    assert "\n" not in str(error)
    return
  assert [x.step for x in parsed.lines] == list(range(1, len(parsed.lines) + 1))


def test_writer_appends(tmp_path):
  path = tmp_path / "l"
  writer = ledger.Writer(path, ledger.start({"key": [0, 1]}))
  for number in (1, 2):
    writer.append(line(number, 0.5))
    # On the disk before the call returns.
    assert path.read_text() == writer.serialize()
  writer.close()
  assert path.read_bytes() == content(line(1, 0.5), line(2, 0.5))


def test_info_and_diff(tmp_path, capsys):
  one, two = tmp_path / "one", tmp_path / "two"
  one.write_bytes(content(line(1, 0.5), line(2, 0.25)))
  two.write_bytes(content(line(1, 0.5), line(2, 0.125)) + b"3 1")
  assert main.main(["ledger", "info", "--ledger", str(two)]) == 0
  output = capsys.readouterr().out
  assert (
    "steps: 2, and a truncated line" in output and "coefficients 0.25" in output
  )
  assert main.main(["ledger", "diff", "--ledger", str(one), str(one)]) == 0
  assert main.main(["ledger", "diff", "--ledger", str(one), str(two)]) == 1
  assert "step 2: " in capsys.readouterr().out
  assert main.main(["ledger", "info", "--ledger", str(tmp_path / "none")]) == 2
  assert main.main(["ledger", "replay", "--ledger", str(one), "--to", "3"]) == 2
  assert "has steps 1 to 2; found 3" in capsys.readouterr().err
  # A header that is none of a run's.
  assert main.main(["ledger", "replay", "--ledger", str(one), "--to", "1"]) == 2
  assert "not the header of a run" in capsys.readouterr().err


def test_an_optimizer_with_a_memory_cannot_be_taken_again():
  zo = {"optimizer": "adam"}
  header = {"model": {"name": "m"}, "zo": zo, "key": [0, 1]}
  with pytest.raises(errors.UserError, match="'adam' keeps more than a ledger"):
    ledger.advance({}, header, [line(1, 0.5)], "f")


def test_a_header_does_not_say_how_many_updates_are_written_together():
  zo = defaults.base_config().zo
  every_step, deferred = (
    ledger.make_header(
      {"name": "m"}, {**zo, "write_every": n}, {}, keys_lib.seed_key(0), {}
    )
    for n in (1, 4)
  )
  assert every_step == deferred
  assert ledger.advance({}, deferred, [], "f") == {}


# Theta.


def loss_fn(base, adapter, batch, key):
  del key

  def layer(x, weights):
    x = jnp.tanh(perturbed.dot(x, weights["kernel"]))
    return x + perturbed.read(weights["bias"])[None], None

  x = perturbed.dot(batch, base["embed"]) + batch @ adapter
  x, _ = jax.lax.scan(layer, x, base["layers"])
  return jnp.mean((perturbed.dot_transposed(x, base["head"]) - 1) ** 2)


def weights_of(dtype):
  keys = jax.random.split(jax.random.key(1), 3)
  base = {
    "embed": jax.random.normal(keys[0], (8, 40)),
    "layers": {
      "kernel": 0.3 * jax.random.normal(keys[1], (3, 40, 40)),
      "bias": jnp.zeros((3, 40)),
    },
    "head": 0.2 * jax.random.normal(keys[2], (130, 40)),
  }
  return jax.tree.map(lambda x: x.astype(dtype), base)


@pytest.mark.parametrize(
  ("direction", "dtype", "num_directions", "tx", "layers"),
  [
    (
      directions.Rademacher(),
      "bfloat16",
      1,
      outer.sgd(1e-3, outer.scale_by_running_rms()),
      None,
    ),
    (
      directions.Gaussian(),
      "float32",
      3,
      outer.sgd(1e-2, outer.scale_by_std(), weight_decay=0.1),
      None,
    ),
    pytest.param(
      directions.LowRank(2),
      "float32",
      1,
      outer.conservative(1e-2),
      (0, 2),
      marks=pytest.mark.slow,
    ),
    pytest.param(
      directions.PerExample(),
      "bfloat16",
      1,
      outer.sgd(1e-2),
      None,
      marks=pytest.mark.slow,
    ),
  ],
)
def test_theta_is_rebuilt_bit_for_bit(
  direction, dtype, num_directions, tx, layers
):
  sampler = sampler_lib.Sampler(
    direction, layers=layers, stacked=STACKED, lazy=True
  )
  algorithm = bilevel.make_bilevel_step(
    loss_fn,
    lower_tx=optax.sgd(1e-2),
    upper_tx=optax.sgd(1e-2),
    base_tx=tx,
    zo=ZerothOrder(
      sampler,
      num_directions=num_directions,
      per_example=isinstance(direction, directions.PerExample),
      subspace_steps=2,
    ),
  )
  step_fn = jax.jit(algorithm.step, donate_argnums=0)
  again_fn = jax.jit(
    functools.partial(outer.replay_update, sampler=sampler, subspace_steps=2),
    donate_argnums=0,
  )
  adapter = jnp.zeros((8, 40))
  key = jax.random.key(3)
  state = algorithm.init(key, weights_of(dtype), adapter, adapter + 0)
  state = state._replace(key=jax.random.clone(key))
  theta = weights_of(dtype)
  text = b""
  for step in range(3):
    x = jax.random.normal(jax.random.key(step), (4, 5, 8))
    batch = BilevelBatch(lower=x[:2], penalty=x[2], upper=x[3])
    state, info = step_fn(state, batch, BilevelHParams(penalty=1.0))
    written = ledger.LedgerEntry(
      step + 1, np.asarray(info.coefficients), info.move
    )
    text += written.serialize().encode()
  lines = ledger.parse(ledger.start({}).encode() + text, "f").lines
  for number, read in enumerate(lines):
    move = jax.tree.map(jnp.asarray, read.move)
    theta = again_fn(theta, key, jnp.int32(number), move)
  begun = weights_of(dtype)
  for actual, expected, first in zip(
    jax.tree.leaves(theta), jax.tree.leaves(state.base), jax.tree.leaves(begun)
  ):
    assert np.asarray(actual).tobytes() == np.asarray(expected).tobytes()
    assert not np.array_equal(actual, first)


def test_fingerprint_sees_names_types_and_bits():
  trees = [
    {"a": jnp.zeros(2)},
    {"b": jnp.zeros(2)},
    {"a": -jnp.zeros(2)},
    {"a": jnp.zeros(2, jnp.bfloat16)},
    {"a": jnp.zeros((1, 2))},
  ]
  assert len({ledger.fingerprint(tree) for tree in trees}) == len(trees)
  json.dumps(ledger.fingerprint(trees[0]))


def test_a_checkout_that_is_not_installed_has_a_ledger(monkeypatch):
  def missing(name):
    raise metadata.PackageNotFoundError(name)

  monkeypatch.setattr(metadata, "version", missing)
  assert replay.versions()["zofo_jax"] == "not installed"
