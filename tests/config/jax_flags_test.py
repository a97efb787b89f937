"""No setting of a shell changes a number without a word."""

import contextlib

import jax
import numpy as np
import pytest

from zofo_jax import errors
from zofo_jax.config import jax_flags
from zofo_jax.core import keys

OTHERS = {
  "jax_default_prng_impl": "rbg",
  "jax_disable_jit": True,
  "jax_enable_x64": True,
  "jax_high_dynamic_range_gumbel": True,
  "jax_numpy_dtype_promotion": "strict",
  "jax_random_seed_offset": 7,
  "jax_softmax_custom_jvp": True,
  "jax_threefry_partitionable": False,
}


@contextlib.contextmanager
def changed(**values):
  before = {name: getattr(jax.config, name) for name in values}
  try:
    for name, value in values.items():
      jax.config.update(name, value)
    yield
  finally:
    for name, value in before.items():
      jax.config.update(name, value)


def test_every_fixed_setting_is_tried():
  assert OTHERS.keys() == jax_flags.FIXED.keys()


def test_fixed_values_are_those_of_jax():
  for name, value in jax_flags.FIXED.items():
    assert getattr(jax.config, name) == value, name


def test_commands_fix_them_say_so_and_put_them_back(caplog):
  with changed(**OTHERS):
    with jax_flags.fixed():
      for name, value in jax_flags.FIXED.items():
        assert getattr(jax.config, name) == value, name
      jax_flags.check()
    for name, value in OTHERS.items():
      assert getattr(jax.config, name) == value, name
  for name, value in OTHERS.items():
    assert f"{name.upper()} is {value!r} in this shell" in caplog.text
  assert len(caplog.records) == len(OTHERS)


@pytest.mark.parametrize("name", OTHERS)
def test_programs_are_told(name):
  with changed(**{name: OTHERS[name]}):
    with pytest.raises(errors.UserError, match=f"^{name} is .* expected"):
      jax_flags.check()


@pytest.mark.parametrize(
  "value, flag",
  [
    ("--xla_cpu_enable_fast_math=true", "xla_cpu_enable_fast_math"),
    ("--a=1 --xla_cpu_enable_fast_math --b", "xla_cpu_enable_fast_math"),
    ("--xla_gpu_enable_fast_min_max=1", "xla_gpu_enable_fast_min_max"),
    ("--xla_cpu_enable_fast_math=false", None),
    ("--xla_cpu_fast_math_honor_nans=true", None),
  ],
)
def test_fast_math_is_refused(monkeypatch, command_line, capsys, value, flag):
  monkeypatch.setenv("XLA_FLAGS", value)
  if flag is None:
    jax_flags.check()
    return
  assert command_line("tasks") == 2
  assert f"XLA_FLAGS: {flag} " in capsys.readouterr().err


def test_less_precision_is_told(monkeypatch, caplog):
  monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
  with jax_flags.fixed():
    pass
  assert "NVIDIA_TF32_OVERRIDE is '1' in this shell" in caplog.text


def test_what_rounds_is_recorded(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX")
  monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
  with changed(jax_default_matmul_precision="high"):
    recorded = jax_flags.rounding()
  assert recorded["XLA_FLAGS"] == "--xla_cpu_max_isa=AVX"
  assert recorded["jax_default_matmul_precision"] == "high"
  assert recorded["NVIDIA_TF32_OVERRIDE"] is None


def test_keys_are_of_one_generator():
  wanted = jax.random.key_data(jax.random.key(5))
  for impl in ("rbg", "unsafe_rbg"):
    with changed(jax_default_prng_impl=impl):
      key = keys.seed_key(5)
      np.testing.assert_array_equal(jax.random.key_data(key), wanted)
      keys.step_keys(key, 0)
      with pytest.raises(ValueError, match=r"threefry key .* shape \(4,\)"):
        keys.step_keys(jax.random.key(5), 0)


def test_keys_are_not_split_in_another_way():
  key = keys.seed_key(5)
  pair = keys.direction_keys(key, None, 1)._replace(direction=key)
  with changed(jax_threefry_partitionable=False):
    with pytest.raises(ValueError, match="jax_threefry_partitionable"):
      keys.step_keys(key, 0)
    with pytest.raises(ValueError, match="jax_threefry_partitionable"):
      keys.leaf_keys(pair, {"w": np.zeros(3)})
