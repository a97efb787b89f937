"""The table of quantized weights: differences of paired rows."""

import pathlib

import quantized

from zofo_jax.report import jsonl

ROOT = pathlib.Path(__file__).parents[2]


def line(kind, right, seed=0):
  return {
    **{"task": "cr", "mode": "LoRA", "rate": 1e-3, "seed": seed},
    **{"kind": kind, "right": right},
  }


def test_differences_are_of_the_same_rows_and_seeds():
  rows = quantized.table(
    [
      *(line("", "1100"), line("int8", "1000"), line("int8", "1110", seed=1)),
      line("", "1111", seed=1),
    ]
  )
  plain, eight = rows
  assert plain["accuracy"] == "0.750" and plain["minus float32"] == ""
  # Row by row, means over seeds: 0, -0.5, 0, -0.5.
  assert eight["minus float32"] == "-0.2500 ± 0.2829"
  assert eight["each seed"] == "-0.250 -0.250" and eight["rows"] == 4


def test_the_kept_lines_make_a_table():
  lines = jsonl.read_jsonl(ROOT / "experiments/results/quantized.jsonl")
  assert len(quantized.table(lines)) == len(
    {(x["task"], x["mode"], x["rate"], x["kind"]) for x in lines}
  )
