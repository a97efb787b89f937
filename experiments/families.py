"""Measures a zeroth-order step on every family of models.

  python experiments/families.py --json FILE [--only gpt2,bert] [--repeats 7]

Memory is XLA's, of programs compiled from shapes alone for the smallest
published size of each `model_type` from 100 million weights on. Seconds are
those of the processor, for one set of sizes for all families, so that ratios
differ only by what distinguishes the families. FILE is rewritten after each
family; families that are in it are skipped. Prints README.md's table.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import time
from typing import Any

from bench import steps, timing, workload

from zofo_jax import errors, models
from zofo_jax.models import decoder, transformer
from zofo_jax.models.hf import published

KIND = "rademacher"
# Few layers, and so few rows of the table that its share of the weights is that
# of whole models.
TIMED = dataclasses.replace(
  workload.FULL,
  llama=dataclasses.replace(workload.FULL.llama, vocab_size=8192, num_layers=6),
)


def smallest(model_type: str) -> tuple[str, Any]:
  """Returns the name and the module of a family's smallest published model.

  Of those with 100 million weights or more.
  """
  modules = {
    name: models.from_hf(config)[0]
    for name, config in published.CONFIGS.items()
    if config["model_type"] == model_type
  }
  size = lambda name: sum(
    map(math.prod, decoder.parameter_shapes(modules[name]).values())
  )
  name = min((n for n in modules if size(n) >= 1e8), key=size)
  return name, modules[name]


def at_one_size(
  config: transformer.Config, sizes: workload.Decoder
) -> transformer.Config:
  """Returns a family's features with the sizes of all families.

  The number of kv heads is 1 or that of heads where the family's is.
  """
  num_kv_heads = {1: 1, config.num_heads: sizes.num_heads}.get(
    config.num_kv_heads, sizes.num_kv_heads
  )
  layers = slice(sizes.num_layers)
  return dataclasses.replace(
    config,
    vocab_size=sizes.vocab_size,
    hidden_size=sizes.hidden_size,
    embed_size=sizes.hidden_size,
    mlp_size=sizes.mlp_size,
    num_layers=sizes.num_layers,
    num_heads=sizes.num_heads,
    num_kv_heads=num_kv_heads,
    head_dim=sizes.hidden_size // sizes.num_heads,
    max_length=512,
    tied_head=True,
    windows=config.windows and config.windows[layers],
    other_rope_layers=config.other_rope_layers[layers],
  )


def memory(module: transformer.Transformer) -> dict[str, Any]:
  """Compiles a forward pass and a step; returns their temporaries."""
  programs, num_bytes = steps.compile_zo(module, workload.FULL, (KIND,))
  step, forward = (
    programs[name].memory_analysis().temp_size_in_bytes
    for name in (KIND, "forward")
  )
  return timing.bytes_ratio(step - forward, num_bytes)


def seconds(module: transformer.Transformer, repeats: int) -> dict[str, Any]:
  """Times a step against two forward passes, in seconds of the processor."""
  config = at_one_size(module.config, TIMED.llama)
  side = steps.make_zo(TIMED, (KIND,), transformer.Transformer(config))

  def two_forwards():
    side.forward()
    side.forward()

  taken = timing.timed_in_turn(
    {"step": side.steps[KIND], "forwards": two_forwards},
    repeats,
    time.process_time,
  )
  return timing.ratio(taken["step"], taken["forwards"])


def row(model_type: str, measured: dict[str, Any], llama: float | None) -> str:
  """Returns a line of the table."""
  size, cells = measured["memory"], []
  if "seconds" in measured:
    ratio = measured["seconds"]
    cells = [f"{ratio['ratio']:.3f} [{ratio['min']:.2f}, {ratio['max']:.2f}]"]
    cells += [f"{ratio['ratio'] / llama:.2f}" if llama else ""]
  cells = [
    *(f"`{model_type}`", measured["model"]),
    *(f"{size[f'{side}_bytes'] / 1e6:,.0f} MB" for side in "ab"),
    *(f"{size['ratio']:.3f}", *cells),
  ]
  return f"| {' | '.join(cells)} |"


def main() -> None:
  """Measures the families and prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--json", type=pathlib.Path, required=True)
  parser.add_argument("--only", default="", help="model types, by commas")
  parser.add_argument(
    "--repeats", type=int, default=7, help="pairs of timings; 0 for none"
  )
  given = parser.parse_args()
  wanted = [name for name in given.only.split(",") if name] or ["llama"]
  wanted += [] if given.only else [n for n in models.FAMILIES if n != "llama"]
  for name in wanted:
    if name not in models.FAMILIES:
      parser.error(
        f"--only: no model type '{name}'; expected some of "
        f"{', '.join(models.FAMILIES)}.{errors.nearest(name, models.FAMILIES)}"
      )
  results: dict[str, Any] = {}
  if given.json.exists():
    results = json.loads(given.json.read_text())
  about = {"machine": timing.machine(), "versions": timing.versions()}
  for name in wanted:
    if name not in results:
      published_name, module = smallest(name)
      results[name] = {"model": published_name, "memory": memory(module)}
      if given.repeats:
        results[name]["seconds"] = seconds(module, given.repeats)
      given.json.write_text(json.dumps({**results, **about}, indent=2) + "\n")
  columns = ["type", "model", "step − forward", "weights", "memory"]
  columns += ["step / two forwards", "relative to `llama`"]
  print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
  llama = results.get("llama", {}).get("seconds", {}).get("ratio")
  for name in wanted:
    print(row(name, results[name], llama))


if __name__ == "__main__":
  main()
