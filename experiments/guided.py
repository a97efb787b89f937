"""Updates theta along the change of the inner level's adapter.

  python experiments/guided.py --data DIR [--tasks sst2 trec] [--seeds 0 1 2]

A random direction is almost orthogonal to the gradient; the change of s by the
inner loop is not. Here theta is updated along

  D = W(s after its T steps) - W(s before), W(s) = theta with s merged into it.

The step size is found with forward passes only: it is the minimum of the
parabola through G at theta - D / 2, theta and theta + D / 2, at most --most
times D. Everything else is configs/compare.py's Bilevel-ZOFO with theta frozen,
for as many iterations as the same work allows. Writes `guided.jsonl` to
--results.
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
from zofo_jax.builders import budget, model
from zofo_jax.builders import data as data_lib
from zofo_jax.builders import run as run_lib
from zofo_jax.training import train

ROOT = pathlib.Path(__file__).parents[1]
HALF = 0.5  # of D: the radius of the difference


def least(values, most=1.0):
  """Returns the minimum of the parabola through values at -1/2, 0, 1/2.

  It is clipped to [-most, most]; for a concave parabola, the lower end.
  """
  left, middle, right = values
  slope = (right - left) / (2 * HALF)
  bend = (right - 2 * middle + left) / HALF**2
  if bend <= 0:
    return -most * float(np.sign(slope))
  return float(np.clip(-slope / bend, -most, most))


def run_one(task, seed, data, most):
  """Trains one cell; returns its scores and step sizes."""
  compare = runpy.run_path(str(ROOT / "configs/compare.py"))
  config = compare["get_config"](
    f"task={task},method=bilevel_still,seed={seed}"
  )
  config.data.dir = data
  per_step = budget.make_budget(config).passes().forward_equivalents
  total = per_step * config.train.num_steps
  # Three points, of three losses each, instead of two.
  config.train.num_steps = total // (per_step + 3 * config.upper.batch_size)
  run = run_lib.make_run(config)
  examples = run.load_examples()
  shape = data_lib.train_shape(examples)
  loss_fn = run.loss_fn
  step_fn = run.jit_step()

  def towards(base, before, after):
    new, old = (adapters.merge_lora(base, s) for s in (after, before))
    return jax.tree.map(jnp.subtract, new, old)

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
  state = run.init(model.load_base(run.model, run.mesh))
  lengths, start_time = [], time.monotonic()
  for number in range(config.train.num_steps):
    rows = train.iteration_batch(config, examples, shape, run.model.pad, number)
    batch = run.shard_batch(rows)
    before, p = (jax.tree.map(jnp.copy, t) for t in (state.lower, state.upper))
    hparams = run.hparams_fn(number)
    state, _ = step_fn(state, batch, hparams)
    values = [
      float(objective(state.base, before, p, state.lower, batch, length))
      for length in (-HALF, 0.0, HALF)
    ]
    lengths.append(least(values, most))
    base = move(state.base, before, state.lower, lengths[-1])
    state = state._replace(base=base)
  seconds = time.monotonic() - start_time
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
  """Runs missing cells and writes a line for each."""
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
  cells = report.read_jsonl(path) if path.exists() else []
  finished = {(c["task"], c["seed"], c["most"]) for c in cells}
  for cell in itertools.product(given.tasks, given.seeds, given.most):
    if cell not in finished:
      task, seed, most = cell
      cells.append(run_one(task, seed, given.data, most))
      report.write_lines(path, cells)
  report.results_table(
    [{k: c[k] for k in c if k != "lengths"} for c in cells],
    title=f"{len(cells)} cells in {path}",
  )


if __name__ == "__main__":
  main()
