"""Checkpoints on a real file system, and each mistake in one sentence."""

import dataclasses
import functools
import os
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from zofo_jax import errors
from zofo_jax.checkpoints import folders, lock, manager


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["a", "b"],
  meta_fields=["scale"],
)
@dataclasses.dataclass(frozen=True)
class Lora:
  a: jax.Array
  b: jax.Array
  scale: float


class State(NamedTuple):
  step: jax.Array
  base: Any
  upper: Any
  base_opt: Any
  upper_opt: Any
  key: jax.Array


def make_state(seed=0, width=4, dtype=jnp.bfloat16):
  keys = jax.random.split(jax.random.key(seed), 4)
  base = {
    "embedding": jax.random.normal(keys[0], (8, width), dtype),
    "layers": {"kernel": jax.random.normal(keys[1], (2, width, width), dtype)},
  }
  lora = Lora(
    a=jax.random.normal(keys[2], (2, width, 2)),
    b=jnp.full((2, 2, width), jnp.nan),
    scale=2.0,
  )
  upper = {"layers": {"query": {"lora": lora}}}
  adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
  return State(
    step=jnp.int32(seed),
    base=base,
    upper=upper,
    base_opt=optax.sgd(1e-6).init(base),
    upper_opt=adam.init(upper),
    key=keys[3],
  )


def bits(leaf):
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  return leaf.shape, leaf.dtype, np.asarray(leaf).tobytes()


def assert_identical(one, other):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    assert a.dtype == b.dtype
    assert bits(a) == bits(b)


def save(folder, *steps, keep=2, state=None):
  with manager.Checkpoints(folder, keep=keep) as checkpoints:
    for step in steps:
      checkpoints.save(step, make_state(step) if state is None else state, {})


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_round_trip_is_bit_identical(tmp_path, impl):
  state = make_state(5)._replace(key=jax.random.key(9, impl=impl))
  extra = {"config": {"zo": {"eps": 1e-3}}, "row": 17, "versions": ["0.10.2"]}
  with manager.Checkpoints(tmp_path / "c", keep=2) as checkpoints:
    assert checkpoints.latest_step() is None
    assert checkpoints.save(5, state, extra)
  # Opened again, as a resumed run does; from shapes alone.
  with manager.Checkpoints(tmp_path / "c") as checkpoints:
    assert checkpoints.latest_step() == 5
    abstract = jax.eval_shape(lambda: state)
    restored, restored_extra = checkpoints.restore(abstract)
  assert restored_extra == extra
  assert_identical(restored, state)
  assert jax.random.key_impl(restored.key) == jax.random.key_impl(state.key)
  np.testing.assert_array_equal(
    jax.random.bits(restored.key), jax.random.bits(state.key)
  )


def test_a_field_of_none_is_not_stored(tmp_path):
  class Later(NamedTuple):
    step: Any
    base: Any
    history: Any = None

  class Earlier(NamedTuple):
    step: Any
    base: Any

  later = Later(jnp.int32(1), {"w": jnp.arange(3.0)})
  earlier = Earlier(*later[:2])
  with manager.Checkpoints(tmp_path / "c", keep=2) as checkpoints:
    checkpoints.save(1, later, {})
    checkpoints.save(2, earlier, {})
    for step, wanted in ((1, earlier), (2, later), (1, later)):
      restored, _ = checkpoints.restore(wanted, step)
      assert_identical(restored, wanted)
    more = later._replace(history={"layers/w": jnp.zeros(2)})
    with pytest.raises(errors.UserError, match="'history/layers/w' is missing"):
      checkpoints.restore(more, 1)


def test_state_may_be_donated_while_it_is_written(tmp_path):
  width = 512
  state = make_state(1, width)
  expected = jax.tree.map(bits, state)
  # While a buffer is being read XLA may copy it instead; the program donates.
  step = (
    jax.jit(lambda base: jax.tree.map(lambda x: -x, base), donate_argnums=0)
    .lower(state.base)
    .compile()
  )
  nbytes = sum(x.nbytes for x in jax.tree.leaves(state.base))
  assert step.memory_analysis().alias_size_in_bytes >= nbytes
  with manager.Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(1, state, {})
    base = state.base
    for _ in range(5):
      base = step(base)
    jax.block_until_ready(base)
    checkpoints.wait()
    restored, _ = checkpoints.restore(
      jax.eval_shape(lambda: make_state(1, width))
    )
  assert jax.tree.map(bits, restored) == expected


@pytest.mark.many_devices
def test_restores_onto_another_sharding(tmp_path):
  state = make_state()
  save(tmp_path, 0)
  mesh = jax.make_mesh((4,), ("model",))
  spec = jax.sharding.NamedSharding(mesh, jax.P(None, "model"))
  abstract = jax.eval_shape(lambda: state)
  abstract.base["embedding"] = jax.ShapeDtypeStruct(
    (8, 4), jnp.bfloat16, sharding=spec
  )
  with manager.Checkpoints(tmp_path) as checkpoints:
    restored, _ = checkpoints.restore(abstract)
  assert restored.base["embedding"].sharding == spec
  assert_identical(restored, state)


def test_keeps_the_latest_and_restores_the_one_asked_for(tmp_path):
  save(tmp_path, 1, 2, 3, 7)
  with manager.Checkpoints(tmp_path, keep=2) as checkpoints:
    assert checkpoints.steps() == [3, 7]
    restored, _ = checkpoints.restore(make_state(), 3)
    assert_identical(restored, make_state(3))
    # The last save of a run may fall on a step that has one.
    assert not checkpoints.save(7, make_state(1), {})
  assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == [
    "3",
    "7",
  ]


def test_keeps_the_best_beside_the_latest(tmp_path):
  metrics = {1: 0.5, 2: 0.75, 3: 0.75, 4: 0.25, 5: 0.5, 6: 0.0}
  with manager.Checkpoints(tmp_path, keep=2) as checkpoints:
    assert checkpoints.best_step() is None
  for step, metric in metrics.items():
    # Opened anew each time: the metrics come from the disk.
    with manager.Checkpoints(tmp_path, keep=2) as checkpoints:
      checkpoints.save(step, make_state(step), {}, metric=metric)
  with manager.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps() == [3, 5, 6]
    assert checkpoints.latest_step() == 6
    assert checkpoints.best_step() == 3
    assert_identical(checkpoints.restore(make_state(), 3)[0], make_state(3))


def test_an_interrupted_save_is_no_checkpoint(tmp_path):
  save(tmp_path, 1)
  left = tmp_path / "2.orbax-checkpoint-tmp"
  (left / "state").mkdir(parents=True)
  with manager.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps() == [1]
  assert left.exists(), "a reader removes nothing"
  save(tmp_path, 3)
  with manager.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps() == [1, 3]
  assert not left.exists()


def test_incomplete_saves_are_removed_before_a_folder_is_open(tmp_path):
  # Not by a thread, which might remove what the next manager is writing: each
  # of these is opened without a save, as by a run that is complete.
  left = tmp_path / "1.orbax-checkpoint-tmp"
  for _ in range(3):
    (left / "extra.orbax-checkpoint-tmp").mkdir(parents=True)
    with manager.Checkpoints(tmp_path, keep=2):
      assert not left.exists()


def test_paths_of_other_file_systems_stay_as_they_are(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  absolute = folders.absolute
  assert str(absolute("gs://bucket/run/c")) == "gs://bucket/run/c"
  assert str(absolute("run/c")) == str(tmp_path / "run/c")


def test_a_name_that_is_no_text(tmp_path, monkeypatch):
  folder = tmp_path / os.fsdecode(b"caf\xe9")
  for opened in (
    lambda: manager.Checkpoints(folder, keep=1),
    lambda: lock.hold(epath.Path(folder)).__enter__(),
  ):
    with pytest.raises(errors.UserError, match="expected a name in UTF-8"):
      opened()
  assert not folder.exists()
  monkeypatch.setattr(os, "fsencode", lambda text: text.encode("ascii"))
  with pytest.raises(errors.UserError, match=r"such as C\.UTF-8"):
    folders.absolute("café")


def test_reading_makes_no_folder(tmp_path):
  with pytest.raises(
    errors.UserError, match=r"no folder of checkpoints '.*/x'"
  ):
    manager.Checkpoints(tmp_path / "x")
  assert not (tmp_path / "x").exists()
  with manager.Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(errors.UserError, match="no checkpoint in"):
      checkpoints.restore(make_state())
    with pytest.raises(ValueError, match="read only"):
      checkpoints.save(1, make_state(), {})
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.UserError, match="is a file, expected a folder"):
    manager.Checkpoints(tmp_path / "file", keep=1)


def test_a_missing_step_names_those_there(tmp_path):
  save(tmp_path, 3, 7)
  with manager.Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(errors.UserError, match=r"step 4 in .* only of 3, 7\."):
      checkpoints.restore(make_state(), 4)


@pytest.mark.parametrize(
  ("wanted", "message"),
  [
    (
      lambda: make_state(width=6),
      r"leaf 'base/embedding' is bfloat16\[8,4\] there, "
      r"expected bfloat16\[8,6\]\.$",
    ),
    (
      lambda: make_state(dtype=jnp.float32),
      r"leaf 'base/embedding' is bfloat16\[8,4\] there, "
      r"expected float32\[8,4\]\.$",
    ),
    (
      lambda: make_state()._replace(upper_opt=optax.EmptyState()),
      r"leaf 'upper_opt/1/0/count' is int32\[\] there, expected no such leaf",
    ),
    (
      lambda: make_state()._replace(key=jax.random.key(0, impl="rbg")),
      r"leaf 'key' is uint32\[2\] there, expected uint32\[4\]",
    ),
  ],
)
def test_another_shape_names_the_leaf(tmp_path, wanted, message):
  save(tmp_path, 1)
  with manager.Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(errors.UserError, match=message):
      checkpoints.restore(jax.eval_shape(wanted))


def test_a_missing_leaf_suggests_the_nearest(tmp_path):
  state = make_state()
  save(tmp_path, 1, state=state._replace(base={"embeddings": jnp.zeros((2,))}))
  wanted = state._replace(base={"embedding": jnp.zeros((2,))})
  with manager.Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(
      errors.UserError,
      match=r"'base/embedding' is missing .* Did you mean 'base/embeddings'",
    ):
      checkpoints.restore(wanted)


def test_a_foreign_folder_is_reported(tmp_path):
  (tmp_path / "4").mkdir()
  (tmp_path / "4" / "weights.bin").write_bytes(b"x")
  with manager.Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(errors.UserError, match="/4' is not a checkpoint of"):
      checkpoints.restore(make_state())


# To be read, and to go on.
@pytest.mark.parametrize(
  "harm, keep",
  [
    *(("cut", None), ("empty", 2), ("flip", 2), ("gone", None)),
    *(
      pytest.param(*pair, marks=pytest.mark.slow)
      for pair in (("cut", 2), ("empty", None), ("flip", None), ("gone", 2))
    ),
  ],
)
def test_any_harm_to_any_file_is_noticed(tmp_path, harm, keep):
  save(tmp_path / "c", 1, 2)
  whole = {
    path.relative_to(tmp_path / "c")
    for path in (tmp_path / "c" / "2").rglob("*")
    if path.is_file() and path.stat().st_size
  }
  assert len(whole) > 5
  first, second = make_state(1), make_state(2)
  abstract = jax.eval_shape(lambda: first)
  for name in sorted(whole):
    shutil.copytree(tmp_path / "c", tmp_path / "run" / "c")
    path = tmp_path / "run" / "c" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 32
    if harm == "gone":
      path.unlink()
    else:
      changed = {"cut": content[: len(content) // 2], "empty": b""}
      path.write_bytes(changed.get(harm, content))
    with manager.Checkpoints(tmp_path / "run" / "c", keep=keep) as checkpoints:
      assert checkpoints.latest_step() in (1, 2)
      if checkpoints.latest_step() == 2:
        try:
          restored, _ = checkpoints.restore(abstract)
        except manager.CorruptCheckpointError:
          checkpoints.quarantine(2)
        else:
          # Only where the checksums themselves are gone, and all is well.
          assert name.name == "checksums.json" and harm == "gone"
          assert_identical(restored, second)
          checkpoints.quarantine(2)
      restored, _ = checkpoints.restore(abstract)
      assert_identical(restored, first)
    shutil.rmtree(tmp_path / "run")
