"""The results of a run: test scores, a table, plots and a summary."""

from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from zofo_jax import report
from zofo_jax.builders import run as run_lib
from zofo_jax.core.types import BilevelState
from zofo_jax.evaluation import metrics
from zofo_jax.report import memory
from zofo_jax.sharding import multihost


def summarize(
  run: run_lib.Run,
  examples: Sequence[Any],
  state: BilevelState,
  folder: epath.Path,
  run_metadata: dict[str, Any],
  compute: dict[str, float],
) -> dict[str, Any]:
  """Tests the adapters of a run over one task and writes its summary.

  Args:
    run: the run.
    examples: encoded test rows.
    state: the best on the selection rows.
    folder: of the run.
    run_metadata: of `fit.fit`.
    compute: that the whole run used.

  Returns:
    What is written to `summary.json`.
  """
  config = run.config
  scores = {"zero_shot": run_metadata["zero_shot"]}
  # The scores of the other adapter have its letter in their names.
  adapters = {"test": run.selected_adapter(state)}
  other = "p" if config.keep == "s" else "s"
  if state.lower:
    adapters[f"test_{other}"] = {"p": state.upper, "s": state.lower}[other]
  if config.zo.direction == "guided":
    adapters["test_base"] = {}
  for name, adapter in adapters.items():
    result = run.evaluate(state.base, adapter, examples, name)
    scores[name] = result.metrics()
  num_steps = config.train.num_steps
  fields: dict[str, Any] = {
    "task": run.task.name,
    "model": config.model.name,
    "method": config.method,
    "keep": config.keep,
    **{f"zero_shot_{k}": v for k, v in scores["zero_shot"].items()},
    **{f"test_{k}": v for k, v in scores["test"].items()},
    **{
      f"test_{k}_{name}": v
      for name in (other, "base")
      for k, v in scores.get(f"test_{name}", {}).items()
    },
    **best_selection(folder),
    "selection_metric": run.selection_metric,
    "num_test_rows": len(examples),
    "best_step": int(state.step),
    "num_outer_steps": num_steps,
    "num_inner_steps": num_steps * config.lower.num_steps,
    **compute,
    **tied_steps(folder, run),
    **cost(run_metadata),
  }
  names = {"zero_shot": "zero-shot", "test": config.method}
  if config.method == "bilevel":
    names |= {
      "test": f"adapter {config.keep}, kept",
      f"test_{other}": f"adapter {other}",
    }
  if "test_base" in scores:
    names["test_base"] = "no adapter"
  write(
    folder,
    fields,
    [{"model": text, **scores[name]} for name, text in names.items()],
    f"{run.task.name}: {len(examples)} test rows, never trained on",
  )
  return fields


def best_selection(folder: epath.Path) -> dict[str, float]:
  """Returns the best of each score on the selection rows."""
  best: dict[str, float] = {}
  for row in report.read_jsonl(folder / "metrics.jsonl"):
    for name, score in row.items():
      if name.startswith("selection_"):
        metric = name.removeprefix("selection_")
        better = min if metric in metrics.LOWER_IS_BETTER else max
        best[name] = better(score, best.get(name, score))
  return best


def tied_steps(folder: epath.Path, run: run_lib.Run) -> dict[str, int]:
  """Returns how many steps moved nothing, as no direction changed the reward.

  Args:
    folder: of the run.
    run: the run; nothing is counted if it is not trained by rewards.
  """
  if run.reward is None:
    return {}
  count = run.base_update.zo.num_directions
  rows = report.read_jsonl(folder / "metrics.jsonl")
  return {
    "tied_steps": sum(row.get("tied_directions") == count for row in rows)
  }


def cost(run_metadata: dict[str, Any]) -> dict[str, Any]:
  """Returns what every run's summary says of its program and its devices."""
  return {
    "nonfinite_steps": run_metadata["guard"].get("nonfinite", 0),
    "train_seconds": run_metadata["seconds"],
    "compile_seconds": run_metadata["compile_seconds"],
    "program_bytes": run_metadata["program_bytes"],
    "device": jax.devices()[0].device_kind,
    **memory.peaks(),
  }


def write(
  folder: epath.Path,
  fields: dict[str, Any],
  table: Sequence[dict[str, Any]],
  title: str,
) -> None:
  """Writes a summary, draws the curves and prints a table of results."""
  report.write_json(folder / "summary.json", fields)
  report.plot_curves(
    folder / "metrics.jsonl",
    folder / "curves.png",
    fields.get("selection_metric"),
  )
  report.results_table(table, title=title)
  if multihost.is_primary():
    print(
      f"In {folder}: summary.json, metrics.jsonl, curves.png, checkpoints/."
    )
