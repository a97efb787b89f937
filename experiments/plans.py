"""Plans many models on many slices; writes a JSON file for each, and tables.

The second table has single chips, with weights in the host's memory.

  python experiments/plans.py --out experiments/plans [--only NAME]
  python experiments/plans.py --storages

The first needs the extra `tpu` and takes minutes per cell; cells whose file
exists are skipped. The second takes seconds: it estimates single chips from
shapes, for every way of storing weights, and writes single_chips.json.
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
SINGLE = {
  "llama-70b": "configs/llama.py:size=70b",
  "opt-66b": "configs/opt.py:size=66b",
  "opt-175b": "configs/opt.py",
}
SINGLE_CHIPS = ("v5e:1x1", "v5p:1x1", "h100:1")
STORED = (
  *("meta-llama/Llama-2-70b-hf", "facebook/opt-66b", "facebook/opt-175b"),
)
ON_HOST = (
  *("--config.model.offload=host", "--config.model.remat=True"),
  *("--config.mesh.data=1", "--config.zo.select="),
  *("--config.lower.batch_size=8", "--config.upper.batch_size=8"),
)
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


def single_row(path):
  """Returns a line of the table of single chips, in GB and seconds."""
  plan = json.loads(path.read_text())
  size, host = plan["per_chip_bytes"], plan["per_chip_host_bytes"]["total"]
  step, chip = plan["method_bytes"]["mezo"], plan["chip_bytes"]

  def fitting(needed):
    if needed is None:
      return "too much, no"
    return f"{needed / 1e9:.1f}, {'yes' if needed <= chip else 'no'}"

  cells = [
    *(path.stem.split("_")[0], plan["topology"]),
    "shapes" if plan["estimate"] else "compiler",
    f"{chip / 1e9:.1f}",
    fitting(host + step if step else host),
    f"{host / 1e9:.1f}",
    *(fitting(n) for n in (step, size["total"])),
    f"{plan['host_transfers']['seconds']:.0f}",
  ]
  return "| " + " | ".join(cells) + " |"


def storage_rows():
  """Returns what a chip needs for every way of storing weights, in GB."""
  from zofo_jax.config import defaults
  from zofo_jax.plan import estimate, largest, planner, topologies
  from zofo_jax.sharding import mesh as mesh_lib

  mesh = mesh_lib.abstract(dict.fromkeys(mesh_lib.AXES, 1), 1)
  config = defaults.base_config()
  config.model.dtype, config.model.remat = "bfloat16", True
  config.data.max_length = 512
  config.lower.batch_size = config.upper.batch_size = 8
  rows = []
  for name in STORED:
    for changes in largest.STORAGES:
      cell = config.copy_and_resolve_references()
      cell.model.name = name
      cell.update_from_flattened_dict(dict(changes))
      run = planner.make_run(cell, mesh)
      state = run.abstract_state()
      size = estimate.estimate(run, state, mesh)
      step = size["weights"] + size["zo_temp"]
      row = {
        "model": name,
        "weights": ", ".join(changes.values()) or "bfloat16",
        "host": round(estimate.host_bytes(state) / 1e9, 1),
        "ZO step": round(step / 1e9, 1),
        "bilevel": round(size["total"] / 1e9, 1),
      }
      for chip in SINGLE_CHIPS:
        room = 0.9 * topologies.find(chip).chip_bytes
        fitting = [
          what
          for what, needed in (("ZO", step), ("bilevel", size["total"]))
          if needed <= room
        ]
        row[chip] = " and ".join(fitting) or "no"
      rows.append(row)
  return rows


def run_plan(config, flags, path):
  """Plans one cell, unless its file exists."""
  if path.exists():
    return
  command = [sys.executable, "-m", "zofo_jax.plan", f"--config={config}"]
  subprocess.run(
    [*command, *FIXED, *flags, f"--json={path}"], cwd=ROOT, check=False
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    "--out", type=pathlib.Path, default=ROOT / "experiments/plans"
  )
  parser.add_argument("--only", default="")
  parser.add_argument("--storages", action="store_true")
  arguments = parser.parse_args()
  arguments.out.mkdir(parents=True, exist_ok=True)
  if arguments.storages:
    rows = storage_rows()
    path = arguments.out / "single_chips.json"
    path.write_text(json.dumps(rows, indent=2) + "\n")
    print(f"| {' | '.join(rows[0])} |\n|{' --- |' * len(rows[0])}")
    for line in rows:
      print(f"| {' | '.join(map(str, line.values()))} |")
    return
  if importlib.util.find_spec("libtpu") is None:
    sys.exit("plans.py: needs the TPU compiler: pip install -e '.[tpu]'")
  for model, config in MODELS.items():
    for topology in SLICES:
      name = f"{model}_{topology.replace(':', '-')}"
      path = arguments.out / f"{name}.json"
      if arguments.only in name:
        run_plan(config, [f"--topology={topology}"], path)
  for model, config in SINGLE.items():
    for topology in SINGLE_CHIPS:
      name = f"{model}_{topology.replace(':', '-')}_host"
      flags = [f"--topology={topology}", *ON_HOST]
      if model == "opt-175b":  # its weights are not on the hub
        flags.append("--config.model.name=facebook/opt-175b")
      if arguments.only in name:
        run_plan(config, flags, arguments.out / f"{name}.json")
  columns = (
    *("model", "slice", "mesh", "weights", "bilevel", "MeZO", "LoRA", "full ≥"),
    *("chip, fits", "zo extra", "/ LoRA", "backward", "remat"),
    *("smallest", "compile s"),
  )
  print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
  paths = sorted(arguments.out.glob("*_*-*.json"))
  for path in paths:
    if not path.stem.endswith("_host"):
      print(row(path))
  columns = ("model", "chip", "figures", "its memory", "ZO step without")
  columns += ("host", "ZO step", "bilevel", "copies, s at 32 GB/s")
  print(f"\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
  for path in paths:
    if path.stem.endswith("_host"):
      print(single_row(path))


if __name__ == "__main__":
  main()
