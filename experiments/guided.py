"""Does theta gain by moving along what the inner steps have found?

  python experiments/guided.py --data DIR [--tasks sst2 trec] [--seeds 0 1 2]

A random direction knows next to nothing of the gradient; the inner loop knows
some. Here theta moves along

  D = W(s after its T steps) - W(s before), W(s) = theta with s folded in,

and how far is measured, by forward passes alone: G at theta - D / 2, theta and
theta + D / 2, and the least of the parabola through them, within --most of D.
All else is configs/compare.py's Bilevel-ZOFO with theta standing still, and as
many iterations as the same work allows. Writes `guided.jsonl` to --results.
"""

import argparse
import itertools
import pathlib
import runpy
import time

import jax
import jax.numpy as jnp
import numpy as np

from zofo_jax import adapters, report
from zofo_jax.builders import algorithm, budget, model
from zofo_jax.builders import data as data_lib
from zofo_jax.builders import run as run_lib
from zofo_jax.training import train

ROOT = pathlib.Path(__file__).parents[1]
HALF = 0.5  # of D: the radius of the difference


def least(values, most=1.0):
  """Returns where the parabola through values at -1/2, 0, 1/2 is least.

  Between -most and most; where it bends down, the lower of these two.
  """
  left, middle, right = values
  slope = (right - left) / (2 * HALF)
  bend = (right - 2 * middle + left) / HALF**2
  if bend <= 0:
    return -most * float(np.sign(slope))
  return float(np.clip(-slope / bend, -most, most))


def run_one(task, seed, data, most):
  """Trains one cell; returns its scores and the lengths of its steps."""
  compare = runpy.run_path(str(ROOT / "configs/compare.py"))
  config = compare["get_config"](
    f"task={task},method=bilevel_still,seed={seed}"
  )
  config.data.dir = data
  each = budget.passes(config, "bilevel").forward_equivalents
  whole = each * config.train.num_steps
  # Three points, of three losses each, in the place of two.
  config.train.num_steps = whole // (each + 3 * config.upper.batch_size)
  run = run_lib.make_run(config)
  examples = data_lib.load_examples(config, run.model, run.task)
  shape = data_lib.train_shape(examples)
  loss_fn = model.make_loss_fn(config.loss, run.model.module)
  step_fn = run.jit_step()

  def towards(base, before, after):
    there, here = (adapters.merge_lora(base, s) for s in (after, before))
    return jax.tree.map(jnp.subtract, there, here)

  def move(base, before, after, length):
    return jax.tree.map(
      lambda w, d: w + length * d, base, towards(base, before, after)
    )

  @jax.jit
  def objective(base, before, p, s, batch, length):
    moved = move(base, before, s, length)
    return loss_fn(moved, p, batch.upper, None) + config.penalty * (
      loss_fn(moved, p, batch.penalty, None)
      - loss_fn(moved, s, batch.penalty, None)
    )

  move = jax.jit(move)
  state = run.init(model.load_base(config, run.model, run.mesh))
  lengths, began = [], time.monotonic()
  for number in range(config.train.num_steps):
    rows = train.iteration_batch(config, examples, shape, run.model.pad, number)
    batch = run.shard_batch(rows)
    before, p = (jax.tree.map(jnp.copy, t) for t in (state.lower, state.upper))
    hparams = algorithm.make_hparams(config, number)
    state, _ = step_fn(state, batch, hparams)
    values = [
      float(objective(state.base, before, p, state.lower, batch, length))
      for length in (-HALF, 0.0, HALF)
    ]
    lengths.append(least(values, most))
    base = move(state.base, before, state.lower, lengths[-1])
    state = state._replace(base=base)
  seconds = time.monotonic() - began
  scores = {
    f"test_{name}": run.evaluate(
      state.base, adapter, examples.test, name
    ).metrics()[run.task.metric]
    for name, adapter in (("p", state.upper), ("s", state.lower), ("bare", {}))
  }
  return {
    **{"task": task, "seed": seed, "most": most},
    "num_steps": config.train.num_steps,
    **{**scores, "lengths": lengths, "seconds": seconds},
  }


def main():
  """Runs the cells that are not there, and writes a line for each."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  default = ROOT / "experiments/results"
  parser.add_argument("--results", type=pathlib.Path, default=default)
  parser.add_argument("--data", required=True)
  parser.add_argument("--tasks", nargs="+", default=("sst2", "trec"))
  parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
  parser.add_argument("--most", nargs="+", type=float, default=(1.0, 0.1))
  given = parser.parse_args()
  path = given.results / "guided.jsonl"
  found = report.read_jsonl(path) if path.exists() else []
  known = {(c["task"], c["seed"], c["most"]) for c in found}
  for cell in itertools.product(given.tasks, given.seeds, given.most):
    if cell not in known:
      task, seed, most = cell
      found.append(run_one(task, seed, given.data, most))
      report.write_lines(path, found)
  report.results_table(
    [{k: c[k] for k in c if k != "lengths"} for c in found],
    title=f"{len(found)} cells in {path}",
  )


if __name__ == "__main__":
  main()
