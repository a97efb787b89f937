"""Plans many models on many slices; writes a JSON file for each, and a table.

  python experiments/plans.py --out experiments/plans [--only NAME]

Needs the extra `tpu`; takes minutes per cell. Cells whose file exists are
skipped.
"""

import argparse
import importlib.util
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
MODELS = {
  **{f"opt-{s}": f"configs/opt.py:size={s}" for s in ("1.3b", "13b", "30b")},
  "opt-66b": "configs/opt.py:size=66b",
  **{f"llama-{s}": f"configs/llama.py:size={s}" for s in ("7b", "13b", "70b")},
}
SLICES = ("v5e:4x4", "v5p:2x2x4", "v6e:4x4")
FIXED = (
  "--config.model.dtype=bfloat16",
  "--config.data.max_length=512",
  "--config.lower.batch_size=16",
  "--config.upper.batch_size=16",
)


def row(path):
  """Returns a line of the table, in GB per chip."""
  plan = json.loads(path.read_text())
  size, methods = plan["per_chip_bytes"], plan["method_bytes"]
  mesh = [f"{k} {v}" for k, v in plan["mesh"].items() if v > 1]
  name = [path.stem.split("_")[0], plan["topology"], ", ".join(mesh)]
  chip = f"{plan['chip_bytes'] / 1e9:.1f}"
  if plan["refused"]:  # the compiler says only that it does not fit
    gaps = [""] * 3
    cells = [*name, f"{size['weights'] / 1e9:.2f}", "too much", *gaps]
    cells += [f"{chip}, no", *gaps, "", plan["smallest_slice"] or "none", ""]
    return "| " + " | ".join(cells) + " |"
  extra = (size["zo_temp"] - size["forward_temp"]) / size["weights"]
  remat = plan["remat_temp_bytes"]
  cells = [
    *name,
    *(f"{n / 1e9:.2f}" for n in (size["weights"], *methods.values())),
    f"{chip}, {'yes' if plan['fits'] else 'no'}",
    *(f"{extra:.1%}", f"{methods['bilevel'] / methods['lora']:.2f}"),
    *(f"{remat[name] / 1e9:.2f}" for name in ("off", "on")),
    plan["smallest_slice"] or "none",
    f"{plan['compile_seconds']:.0f}",
  ]
  return "| " + " | ".join(cells) + " |"


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    "--out", type=pathlib.Path, default=ROOT / "experiments/plans"
  )
  parser.add_argument("--only", default="")
  arguments = parser.parse_args()
  arguments.out.mkdir(parents=True, exist_ok=True)
  if importlib.util.find_spec("libtpu") is None:
    sys.exit("plans.py: needs the TPU compiler: pip install -e '.[tpu]'")
  for model, config in MODELS.items():
    for topology in SLICES:
      name = f"{model}_{topology.replace(':', '-')}"
      path = arguments.out / f"{name}.json"
      if path.exists() or arguments.only not in name:
        continue
      command = [sys.executable, "-m", "zofo_jax.plan", f"--config={config}"]
      subprocess.run(
        [*command, *FIXED, f"--topology={topology}", f"--json={path}"],
        cwd=ROOT,
        check=False,
      )
  columns = (
    *("model", "slice", "mesh", "weights", "bilevel", "MeZO", "LoRA", "full ≥"),
    *("chip, fits", "zo extra", "/ LoRA", "backward", "remat"),
    *("smallest", "compile s"),
  )
  print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
  for path in sorted(arguments.out.glob("*.json")):
    print(row(path))


if __name__ == "__main__":
  main()
