"""What `zofo plan` prints."""

from typing import Any

from zofo_jax import report
from zofo_jax.plan import topologies


def print_plan(plan: dict[str, Any]) -> None:
  """Prints a plan, as `planner.plan` returns it, as tables and sentences."""
  how = "estimated from shapes" if plan["estimate"] else "by the compiler"
  mesh = ", ".join(f"mesh.{k}={v}" for k, v in plan["mesh"].items())
  report.results_table(
    [
      {"a chip": name, "GB": _gigabytes(size)}
      for name, size in plan["per_chip_bytes"].items()
    ],
    title=f"{plan['model']} on {plan['topology']}, {how}",
  )
  report.results_table(
    [
      {"with": name, "GB a chip": _gigabytes(size)}
      for name, size in plan["method_bytes"].items()
    ],
    title="to compare with; full: at least",
  )
  if host := plan["per_chip_host_bytes"]["total"]:
    copied, rate = plan["host_transfers"], topologies.HOST_BANDWIDTH
    print(
      f"In the host's memory: {host / 1e9:.2f} GB a chip. An iteration copies "
      f"{copied['to_device'] / 1e9:.1f} GB to the devices and "
      f"{copied['to_host'] / 1e9:.1f} GB back: at least "
      f"{copied['seconds']:.1f} s at {rate / 1e9:.0f} GB/s a chip."
    )
  if plan.get("collective_bytes"):
    report.results_table(
      [
        {"a chip receives": k, "GB an iteration": v / 1e9}
        for k, v in plan["collective_bytes"].items()
      ]
    )
  if remat := plan.get("remat_temp_bytes"):
    off, on = (
      "an unknown size" if size is None else f"{size / 1e9:.2f} GB"
      for size in (remat["off"], remat["on"])
    )
    print(
      f"Temporaries of a first-order step: {off} without model.remat, {on} "
      f"with it; it is {'on' if plan['remat'] else 'off'}."
    )
  for program, reason in plan["refused"].items():
    print(f"The compiler refused the program of {program}_temp: {reason}.")
  chip = plan["chip_bytes"]
  limit = f" in {chip / 1e9:.1f} GB" if chip else ""
  verdict = "fits" if plan["fits"] else "does not fit"
  print(f"{mesh}: the run {verdict}{limit}.")
  if changes := plan["would_fit"]:
    flags = " ".join(f"--config.{k}={v}" for k, v in changes.items())
    print(f"It is estimated to fit with {flags}.")
  if offloaded := plan["offloaded"]:
    print(
      "With --config.model.offload=host it is estimated to take "
      f"{offloaded['per_chip_bytes'] / 1e9:.1f} GB a chip and "
      f"{offloaded['per_chip_host_bytes'] / 1e9:.1f} GB of the host's memory."
    )
  print(
    f"Smallest slice, estimated: {plan['smallest_slice'] or 'none listed'}."
  )
  if models := plan["largest"]:
    report.results_table(
      [
        {"with": flags or "this config", "largest model": name or "none"}
        for flags, name in models.items()
      ],
      title="of the family, estimated to fit this chip",
    )


def _gigabytes(size: int | None) -> float | str:
  """Returns a size for a table; one that is not known is a question mark."""
  return "?" if size is None else size / 1e9
