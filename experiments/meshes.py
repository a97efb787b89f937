"""Runs the demo's first steps on several meshes, which must give equal losses.

  python experiments/meshes.py [--steps 50] [--out runs/meshes]

Eight CPU devices stand in for a slice. Each mesh is a run of configs/demo.py;
what differs from one device is printed and written to OUT/meshes.json.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import numpy as np

from zofo_jax import report

ROOT = pathlib.Path(__file__).parents[1]
MESHES = {
  "one device": {},
  "data 4": {"data": 4},
  "fsdp 2, model 2": {"fsdp": 2, "model": 2},
  "pert 2, data 2, model 2": {"pert": 2, "data": 2, "model": 2},
}
NAMES = ("lower_loss", "upper_loss", "objective")


def run(folder: pathlib.Path, sizes: dict[str, int], steps: int) -> None:
  """Runs the demo on a mesh, unless that run has finished."""
  if (folder / "summary.json").exists():
    return
  axes = {"pert": 1, "data": 1, "fsdp": 1, "model": 1} | sizes
  command = [
    *(sys.executable, "-m", "zofo_jax.main"),
    *(f"--config={ROOT}/configs/demo.py", f"--workdir={folder}"),
    *(f"--config.mesh.{axis}={size}" for axis, size in axes.items()),
    *(f"--config.train.num_steps={steps}", "--config.zo.num_directions=2"),
    f"--config.train.eval_every_steps={steps}",
    *("--config.data.num_selection=64", "--config.data.num_test=64"),
  ]
  environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}
  subprocess.run(command, env=environment, check=True)


def losses(folder: pathlib.Path) -> np.ndarray:
  """Returns the losses of all steps, [steps, 3]."""
  rows = report.read_jsonl(folder / "metrics.jsonl")
  return np.array(
    [[row[name] for name in NAMES] for row in rows if "upper_loss" in row]
  )


def main() -> None:
  """Runs every mesh and compares."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--steps", type=int, default=50)
  parser.add_argument("--out", type=pathlib.Path, default=ROOT / "runs/meshes")
  parser.add_argument("--only", default="")
  given = parser.parse_args()
  by_mesh = {}
  for number, (name, sizes) in enumerate(MESHES.items()):
    folder = given.out / str(number)
    if given.only in name or not number:
      run(folder, sizes, given.steps)
      by_mesh[name] = losses(folder)
  reference = by_mesh["one device"]
  rows = [
    {
      "mesh": name,
      "largest difference": float(np.abs(curve - reference).max()),
      "relative": float((np.abs(curve - reference) / np.abs(reference)).max()),
      "last loss of p": float(curve[-1, 1]),
    }
    for name, curve in by_mesh.items()
  ]
  report.write_json(given.out / "meshes.json", rows)
  print(json.dumps(rows, indent=2))


if __name__ == "__main__":
  main()
