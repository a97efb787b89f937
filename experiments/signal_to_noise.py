"""How much a zeroth-order step knows: its estimate beside the true gradient.

  python experiments/signal_to_noise.py --data DIR [--task sst2]

At the pretrained weights of SmolLM2-135M, on one batch: the cosine between an
estimate c z and the gradient g of `jax.grad`, the error of c against the exact
derivative along z, and the most that a step along either takes off the loss of
that batch, over a grid of step lengths. Averages over directions; writes
`signal_to_noise.json` to --results.
"""

import argparse
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np

from zofo_jax import (
  backbone,
  batches,
  directions,
  experiment,
  perturbed,
  report,
  runs,
  sampler,
)

ROOT = pathlib.Path(__file__).parents[1]
KINDS = {
  "rademacher": directions.Rademacher(),
  "gaussian": directions.Gaussian(),
  "low_rank": directions.LowRank(4),
  "sparse": directions.Sparse(),
}
# Lengths of a step, over the length of theta.
LENGTHS = np.geomspace(1e-4, 1e-1, 7)


def dot(one, other):
  """Returns the inner product of two trees, float32."""
  parts = jax.tree.map(lambda a, b: jnp.vdot(a, b), one, other)
  return sum(jax.tree.leaves(parts))


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
  parser.add_argument("--directions", type=int, default=2)
  parser.add_argument("--eps", type=float, default=1e-3)
  given = parser.parse_args()
  compare = runpy.run_path(str(ROOT / "configs/compare.py"))
  config = compare["get_config"](f"task={given.task},method=mezo")
  config.data.dir = given.data
  run = runs.make_run(config)
  examples = experiment.load_examples(config, run.model, run.task)
  base = backbone.load_base(config, run.model, run.mesh)
  loss_fn = backbone.make_loss_fn(config.loss, run.model.module)
  rows = [
    batches.collate(
      examples.lower[i * given.rows : (i + 1) * given.rows],
      experiment.train_shape(examples),
      pad=run.model.pad,
    )
    for i in range(2)
  ]
  loss = jax.jit(lambda base, rows: loss_fn(base, {}, rows, None))
  value, g = jax.jit(jax.value_and_grad(loss))(base, rows[0])
  before = float(loss(base, rows[1]))
  norm_g, norm_theta = (float(jnp.sqrt(dot(t, t))) for t in (g, base))
  size = sum(leaf.size for leaf in jax.tree.leaves(base))

  @jax.jit
  def moved(base, tree, step, rows):
    shifted = jax.tree.map(lambda w, d: w - step * d, base, tree)
    return loss_fn(shifted, {}, rows, None)

  def most(tree, norm):
    """Returns the most taken off the batch's loss and another batch's."""
    steps = LENGTHS * norm_theta / norm
    after = [float(moved(base, tree, step, rows[0])) for step in steps]
    best = int(np.argmin(after))
    other = float(before - moved(base, tree, steps[best], rows[1]))
    return {
      "batch": float(value) - after[best],
      "other": other,
      "length": float(LENGTHS[best]),
    }

  found = {
    "task": given.task,
    "rows": given.rows,
    "weights": size,
    "loss": float(value),
    "gradient_norm": norm_g,
    "theta_norm": norm_theta,
    "eps": given.eps,
    "gradient_step": most(g, norm_g),
    "kinds": {},
  }
  for name, kind in KINDS.items():
    every = []
    for number in range(given.directions):
      own, frame = jax.random.split(jax.random.key(number))
      key = perturbed.Key(own, frame)
      z = sampler.Sampler(kind).write(
        base, key._replace(own=own[None]), jnp.ones(1)
      )
      norm_z = float(jnp.sqrt(dot(z, z)))
      exact = float(dot(g, z))
      ends = [
        float(moved(base, z, sign * given.eps, rows[0])) for sign in (-1, 1)
      ]
      c = (ends[0] - ends[1]) / (2 * given.eps)
      down = jax.tree.map(lambda leaf, c=c: np.sign(c) * leaf, z)
      every.append(
        {
          "cosine": abs(exact) / (norm_g * norm_z),
          "error": abs(c - exact) / abs(exact),
          "coefficient": abs(c),
          **{f"step_{k}": v for k, v in most(down, norm_z).items()},
        }
      )
    means = {k: float(np.mean([e[k] for e in every])) for k in every[0]}
    # Of a direction that knows nothing: sqrt(2 / (pi d)).
    means["cosine_expected"] = float(np.sqrt(2 / (np.pi * size)))
    means["steps_for_one_gradient_step"] = (
      found["gradient_step"]["batch"] / means["step_batch"]
    )
    found["kinds"][name] = means
    print(name, means, flush=True)
  report.write_json(given.results / "signal_to_noise.json", found)
  report.results_table(
    [{"kind": name, **means} for name, means in found["kinds"].items()],
    title=f"{given.task}: one gradient step takes off {found['gradient_step']}",
  )


if __name__ == "__main__":
  main()
