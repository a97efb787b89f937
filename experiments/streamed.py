"""Times steps with weights in the host's memory against the device's.

  python experiments/streamed.py --size 1.7b [--quantize int8] [--json FILE]

Weights are random. For each memory, host first, prints the seconds of a
zeroth-order step along one ±1 direction and of a first-order step of LoRA, the
peak of the device's memory (of a GPU or TPU; XLA's arguments and temporaries
on a CPU), what a step copies to the device and back, and the rate at which it
does. Losses of the two memories are compared as well. A size that does not fit
the device runs with `--only host`.
"""

import argparse
import gc
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from bench import models, timing, workload

import zofo_jax as zofo
from zofo_jax import adapters, report
from zofo_jax.builders import budget, model, storage
from zofo_jax.core import inner
from zofo_jax.core import tree as tree_lib
from zofo_jax.models.decoder import STACKED
from zofo_jax.report import memory

SIZES = {
  "tiny": workload.TINY.llama,
  "1.7b": workload.Decoder(49152, 2048, 8192, 24, 32, 32),  # SmolLM2-1.7B
  "7b": workload.Decoder(32000, 4096, 11008, 32, 32, 32),  # Llama-2-7B
  "70b": workload.Decoder(32000, 8192, 28672, 80, 64, 8),  # Llama-2-70B
}
MEMORIES = ("host", "device")
Step = Callable[..., tuple[Any, jax.Array]]


def random_base(module: Any, dtype: str, kind: str, on_host: bool) -> Any:
  """Makes weights: every layer of a stack has the same.

  Args:
    module: the decoder.
    dtype: of floats.
    kind: of integers that matrices are stored as; "" for none.
    on_host: whether the layers' matrices are in the host's memory.
  """
  ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), *[ids] * 5)["params"]
  rng = np.random.default_rng(0)
  device = jax.devices()[0]

  def leaf(path, abstract):
    name = tree_lib.path_name(path)
    shape, stacked = abstract.shape, name.startswith("layers/")
    part = shape[1:] if stacked else shape
    axis = storage.summed_axis(name)
    values = np.ones(part, np.float32)
    if axis is not None:
      values = 0.02 * rng.standard_normal(part, np.float32)
    node: Any
    if kind and axis is not None:
      node = zofo.quantized.quantize(values, kind, axis=axis, dtype=dtype)
    else:
      node = values.astype(dtype)
    far = on_host and stacked and axis is not None
    sharding = jax.sharding.SingleDeviceSharding(
      device, memory_kind=zofo.offload.MEMORY_KIND if far else None
    )
    repeated = lambda x: np.broadcast_to(x, (*shape[:1], *x.shape))
    return jax.tree.map(
      lambda x: jax.device_put(repeated(x) if stacked else x, sharding), node
    )

  return jax.tree.map_with_path(leaf, shapes)


def steps(module: Any) -> dict[str, Step]:
  """Returns the steps: (base, adapter, opt, batch, key) -> (new, loss).

  The zeroth-order step returns a base, that of LoRA an adapter and its moments.

  Args:
    module: the decoder.
  """
  loss_fn = model.make_loss_fn("likelihood", module)
  tx = optax.adam(1e-4)
  algorithm = zofo.make_mezo_step(
    lambda base, batch: loss_fn(base, {}, batch, None),
    zofo.outer.sgd(1e-7),
    zofo.ZerothOrder(
      zofo.Sampler(zofo.directions.Rademacher(), stacked=STACKED, lazy=True)
    ),
  )

  def zo(base, adapter, opt, batch, key):
    state, info = algorithm.step(algorithm.init(key, base), batch)
    return (state.params, adapter, opt), info.loss

  def lora(base, adapter, opt, batch, key):
    rows = jax.tree.map(lambda leaf: leaf[None], batch)
    adapter, opt, losses = inner.minimize(
      loss_fn, base, adapter, opt, rows, key, tx=tx
    )
    return (base, adapter, opt), losses[0]

  return {"zo": zo, "lora": lora}


def measure(
  sizes: workload.Decoder,
  shape: tuple[int, int],
  *,
  kind: str,
  on_host: bool,
  repeats: int,
) -> dict[str, dict[str, Any]]:
  """Times the steps in one memory.

  Args:
    sizes: of the model.
    shape: rows, and tokens of each.
    kind: of integers; "" for none.
    on_host: whether the layers' matrices are in the host's memory.
    repeats: calls of each step, after one that is not counted.
  """
  module = models.llama_module(sizes).clone(remat=True)
  base = random_base(module, "bfloat16", kind, on_host)
  adapter = adapters.init_lora(jax.random.key(0), base, rank=8, alpha=16.0)
  opt = optax.adam(1e-4).init(adapter)
  batch = models.make_batch(workload.full_rows(shape, sizes.vocab_size))
  results = {}
  for name, step in steps(module).items():
    keys = jax.random.split(jax.random.key(1), repeats + 1)
    copied = budget.transfers(step, base, adapter, opt, batch, keys[0])
    program = (
      jax.jit(step, donate_argnums=(0, 1, 2))
      .lower(base, adapter, opt, batch, keys[0])
      .compile()
    )
    analysis: Any = program.memory_analysis()
    seconds, losses = [], []
    for key in keys:
      start = time.perf_counter()
      (base, adapter, opt), loss = program(base, adapter, opt, batch, key)
      losses.append(float(jax.block_until_ready((base, loss))[1]))
      seconds.append(time.perf_counter() - start)
    results[name] = {
      "seconds": statistics.median(seconds[1:]),
      "device_bytes": memory.device_bytes("peak_bytes_in_use")
      or memory.program_bytes(program),
      "temp_bytes": analysis.temp_size_in_bytes,
      **copied._asdict(),
      "loss": losses[-1],
    }
  return results


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--size", choices=SIZES, default="1.7b")
  parser.add_argument("--rows", type=int, default=8)
  parser.add_argument("--tokens", type=int, default=512)
  parser.add_argument(
    "--quantize", choices=("", *zofo.quantized.KINDS), default=""
  )
  parser.add_argument("--only", choices=MEMORIES)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--json", type=pathlib.Path)
  options = parser.parse_args()
  results: dict[str, Any] = {
    "kind": jax.devices()[0].device_kind,
    "machine": timing.machine(),
    "versions": timing.versions(),
    "arguments": {k: str(v) for k, v in vars(options).items()},
  }
  rows = []
  for where in (options.only,) if options.only else MEMORIES:
    results[where] = measure(
      SIZES[options.size],
      (options.rows, options.tokens),
      kind=options.quantize,
      on_host=where == "host",
      repeats=options.repeats,
    )
    gc.collect()
    for name, figures in results[where].items():
      copied = figures["to_device"] + figures["to_host"]
      rows.append(
        {
          "step": name,
          "memory": where,
          "s": figures["seconds"],
          "GB on the device": figures["device_bytes"] / 1e9,
          "GB copied": copied / 1e9,
          "GB/s": copied / 1e9 / figures["seconds"],
          "loss": figures["loss"],
        }
      )
    if options.json:  # what is measured is kept if the rest fails
      options.json.write_text(json.dumps(results, indent=2) + "\n")
  report.results_table(
    rows, title=f"{options.size} on {results['kind']}, bfloat16"
  )


if __name__ == "__main__":
  main()
