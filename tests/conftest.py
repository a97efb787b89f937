"""Settings of every test, made before any device is used, and tiny data.

The fixtures are a checkpoint folder as Hugging Face's, of two layers and with
random weights, a folder of rows whose label one word decides, and the command
line as a function.
"""

import gc
import os
import platform
import re
import shutil
import tempfile
from importlib import metadata

# Programs here are compiled for a call or two: LLVM's expensive passes do not
# pay, nor does XLA's expensive way of writing loops; without that, and with
# fused multiply-adds, bits would differ. For the processes that tests start as
# well; read when jax is imported. XLA_FLAGS= tests what users run, in twice the
# time. A flag that jaxlib does not know ends the process, under pytest without
# a word: each has the first jaxlib that is not given it, be it one that has
# lost it (0.11.1 has but one way of writing loops) or one that was never tried.
os.environ.setdefault(
  "XLA_FLAGS",
  " ".join(
    flag
    for flag, end, machine in (
      ("--xla_backend_optimization_level=0", (0, 13), ""),
      ("--xla_llvm_disable_expensive_passes=true", (0, 13), ""),
      ("--xla_cpu_use_fusion_emitters=false", (0, 11, 1), "x86_64"),
      ("--xla_cpu_max_isa=AVX", (0, 13), "x86_64"),
    )
    if machine in platform.machine()
    and (*map(int, re.findall(r"\d+", metadata.version("jaxlib"))),) < end
  ),
)

# What one process has compiled, no other compiles: neither a test's own
# processes nor pytest's workers. pytest's first process removes the folder.
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR",
  os.path.join(tempfile.gettempdir(), f"zofo_jax_programs_{os.getpid()}"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax
import pytest

from tests import tiny

# Tests of one device run on others, too: ZOFO_TEST_PLATFORM=cuda
jax.config.update("jax_platforms", os.environ.get("ZOFO_TEST_PLATFORM", "cpu"))
# Sharding is tested on one machine: eight devices in one process.
jax.config.update("jax_num_cpu_devices", 8)
# Broadcasting between different ranks is written out, or it is a mistake.
jax.config.update("jax_numpy_rank_promotion", "raise")
# Comparisons see rounding of float32, never of a faster matrix product.
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_collection_modifyitems(items):
  """Skips what needs eight devices where there are fewer, as on one GPU."""
  if jax.device_count() >= 8:
    return
  skip = pytest.mark.skip(reason="needs eight devices")
  for item in items:
    if item.get_closest_marker("many_devices"):
      item.add_marker(skip)


def pytest_collection_finish():
  """Makes the garbage collector rare, which is a tenth of the tests' time."""
  # What is imported by now stays: it need not be looked through again.
  gc.collect()
  gc.freeze()
  gc.set_threshold(50_000)


def pytest_unconfigure():
  """Removes the compiled programs, unless they are kept for other runs."""
  folder = os.environ["JAX_COMPILATION_CACHE_DIR"]
  if folder.endswith(f"zofo_jax_programs_{os.getpid()}"):
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory):
  """A folder with train.jsonl (192 rows) and validation.jsonl (64 rows)."""
  folder = tmp_path_factory.mktemp("rows")
  tiny.write_rows(folder)
  return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
  """A Llama checkpoint of two layers, width 32 and 64 tokens of context."""
  folder = tmp_path_factory.mktemp("model")
  tiny.write_model(folder)
  return folder


@pytest.fixture(scope="session")
def command_line():
  """The command line as a function of its arguments; returns the exit code."""
  from zofo_jax import main

  def run(*arguments):
    arguments = [*map(str, arguments)]
    given = lambda start: any(a.startswith(start) for a in arguments)
    if given("--config="):
      # A run uses all eight devices unless it is given a mesh.
      if not given("--config.mesh."):
        arguments.append("--config.mesh.data=1")
      # Every weight that moves is more to compile. With these, an adapter moves
      # or says what does.
      by_adapter = any("mezo_peft" in a or "guided" in a for a in arguments)
      if not given("--config.zo.select=") and not by_adapter:
        arguments.append(f"--config.zo.select={tiny.MOVED}")
    return main.main(arguments)

  return run
