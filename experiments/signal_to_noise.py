"""Compares zeroth-order estimates with the true gradient.

  python experiments/signal_to_noise.py --data DIR [--task sst2]

At the pretrained weights of SmolLM2-135M, on one batch. For each kind of
direction z, averaged over directions:

  cosine      of z with the gradient g of `jax.grad`
  error       of the central difference c, relative to the exact slope <g, z>
  step_batch  the largest decrease of this batch's loss by a step along c z,
              over a grid of step sizes
  step_other  the decrease of another batch's loss by the same step

The same is measured for the gradient itself, for the sum of all directions, and
for `guided`, the change of the weights by one gradient step of a new LoRA,
which is the part of g that the inner level already has. Writes
`signal_to_noise.json` to --results.
"""

import argparse
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np

from zofo_jax import adapters, report
from zofo_jax.builders import data
from zofo_jax.builders import model as model_lib
from zofo_jax.builders import run as run_lib
from zofo_jax.core import directions, sampler
from zofo_jax.core import keys as keys_lib
from zofo_jax.data import batching
from zofo_jax.models.decoder import STACKED

ROOT = pathlib.Path(__file__).parents[1]
KINDS = {
  "rademacher": directions.Rademacher(),
  "gaussian": directions.Gaussian(),
  "low_rank": directions.LowRank(4),
  "sparse": directions.Sparse(),
}
# Lengths of a step, over the length of theta.
LENGTHS = np.geomspace(1e-5, 1e-1, 9)


def dot(one, other):
  """Returns the inner product of two trees, float32."""
  parts = jax.tree.map(lambda a, b: jnp.vdot(a, b), one, other)
  return float(sum(jax.tree.leaves(parts)))


def guided(run, base, rows, length):
  """Returns what a step of a fresh LoRA takes off the weights, of a length."""
  adapter = run.init_adapter(jax.random.key(0), base)
  slope = jax.grad(lambda a: run.loss_fn(base, a, rows, None))(adapter)
  # B is zero, so that the weights are linear in the step.
  scale = length / np.sqrt(dot(slope, slope))
  moved = jax.tree.map(lambda a, s: a - scale * s, adapter, slope)
  return jax.tree.map(jnp.subtract, base, adapters.merge_lora(base, moved))


def main():
  """Measures and writes."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  default = ROOT / "experiments/results"
  parser.add_argument("--results", type=pathlib.Path, default=default)
  parser.add_argument("--data", required=True)
  parser.add_argument("--task", default="sst2")
  parser.add_argument("--rows", type=int, default=16)
  parser.add_argument("--directions", type=int, default=4)
  parser.add_argument("--eps", type=float, default=1e-3)
  given = parser.parse_args()
  compare = runpy.run_path(str(ROOT / "configs/compare.py"))
  config = compare["get_config"](f"task={given.task},method=mezo")
  config.data.dir = given.data
  run = run_lib.make_run(config)
  examples = run.load_examples()
  base = model_lib.load_base(run.model, run.mesh)
  here, there = [
    batching.collate(
      examples.lower[i * given.rows : (i + 1) * given.rows],
      data.train_shape(examples),
      pad=run.model.pad,
    )
    for i in range(2)
  ]

  def loss(base, rows):
    return run.loss_fn(base, {}, rows, None)

  @jax.jit
  def moved(base, tree, step, rows):
    """Returns the loss after a step against a tree."""
    return loss(jax.tree.map(lambda w, d: w - step * d, base, tree), rows)

  value, g = jax.jit(jax.value_and_grad(loss))(base, here)
  value, elsewhere = float(value), float(jax.jit(loss)(base, there))
  norm_g, norm_theta = (np.sqrt(dot(t, t)) for t in (g, base))
  size = sum(leaf.size for leaf in jax.tree.leaves(base))

  def most(tree, sign=1.0):
    """Returns a tree's cosine with g, and the best step against it."""
    norm = np.sqrt(dot(tree, tree))
    steps = sign * LENGTHS * norm_theta / norm
    after = [float(moved(base, tree, step, here)) for step in steps]
    best = int(np.argmin(after))
    return {
      "cosine": float(abs(dot(g, tree)) / (norm_g * norm)),
      "step_batch": value - after[best],
      "step_other": elsewhere - float(moved(base, tree, steps[best], there)),
      "step_length": float(LENGTHS[best]),
    }

  measured = {
    "task": given.task,
    "rows": given.rows,
    "directions": given.directions,
    "weights": size,
    "loss": value,
    "gradient_norm": float(norm_g),
    "theta_norm": float(norm_theta),
    "eps": given.eps,
    # Of a direction that knows nothing: sqrt(2 / (pi d)).
    "cosine_expected": float(np.sqrt(2 / (np.pi * size))),
    "kinds": {},
  }

  def record(name, numbers):
    measured["kinds"][name] = numbers
    print(name, numbers, flush=True)
    report.write_json(given.results / "signal_to_noise.json", measured)

  record("gradient", most(g))
  length = 1e-2 * norm_theta
  record("guided", most(guided(run, base, here, length)))
  for name, kind in KINDS.items():
    every, total = [], jax.tree.map(jnp.zeros_like, base)
    for number in range(given.directions):
      direction_key, frame = jax.random.split(jax.random.key(number))
      key = keys_lib.DirectionKey(direction_key, frame)
      z = sampler.Sampler(kind, stacked=STACKED).weighted_sum(
        base, key._replace(direction=direction_key[None]), jnp.ones(1)
      )
      exact = dot(g, z)
      ends = [float(moved(base, z, s * given.eps, here)) for s in (-1, 1)]
      c = (ends[0] - ends[1]) / (2 * given.eps)
      total = jax.tree.map(lambda t, d, c=c: t + c * d, total, z)
      error = abs(c - exact) / abs(exact)
      every.append({**most(z, np.sign(c)), "error": error})
    means = {k: float(np.mean([e[k] for e in every])) for k in every[0]}
    record(name, means)
    record(f"{name}, all together", most(total))
  report.results_table(
    [{"kind": name, **numbers} for name, numbers in measured["kinds"].items()],
    title=f"{given.task}: loss {value:.3f} here, {elsewhere:.3f} elsewhere",
  )


if __name__ == "__main__":
  main()
