"""Trains a run: its iterations, and the results at its end.

The one program of an outer iteration is jitted here.
"""

import math
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from zofo_jax import report
from zofo_jax.builders import algorithm, budget, data
from zofo_jax.builders import model as model_lib
from zofo_jax.builders import run as run_lib
from zofo_jax.checkpoints import state_store
from zofo_jax.config import methods
from zofo_jax.core import baselines
from zofo_jax.core.types import BilevelBatch, BilevelInfo
from zofo_jax.data import batching
from zofo_jax.report import progress as progress_lib
from zofo_jax.sharding import multihost
from zofo_jax.training import loop


def iteration_batch(
  config: ml_collections.ConfigDict,
  examples: data.Examples,
  shape: batching.Shape,
  pad: int,
  step: int,
) -> BilevelBatch:
  """Returns the rows of an outer iteration: a pure function of its number."""

  def batch(pool, seed, size, index):
    chosen = batching.batch_indices(seed, len(pool), size, index)
    return batching.collate([pool[i] for i in chosen], shape, pad=pad)

  # Three streams: the inner rows and the penalty's both come from D_p.
  num_inner, seed = config.lower.num_steps, 3 * config.seed
  lower = [
    batch(
      examples.lower, seed, config.lower.batch_size, step * num_inner + index
    )
    for index in range(num_inner)
  ]
  size = config.upper.batch_size
  return BilevelBatch(
    lower=jax.tree.map(lambda *leaves: np.stack(leaves), *lower),
    penalty=batch(examples.lower, seed + 1, size, step),
    upper=batch(examples.upper, seed + 2, size, step),
  )


def train(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
  """Trains a run to its end, from its latest checkpoint if there is one.

  Args:
    config: the run's config.
    workdir: folder of the run; local or gs://.

  Returns:
    What is written to `summary.json`.

  Raises:
    UserError: something in the config, the files or `workdir` is wrong, or
      the run went wrong.
    guards.InterruptedRun: SIGTERM or SIGINT came.
  """
  folder = epath.Path(workdir)
  with multihost.raise_on_all_processes():
    run = run_lib.make_run(config)
    state_store.check_config(config, folder)
    examples = data.load_examples(config, run.model, run.task)
    state_store.make_folder(folder / "checkpoints")
  work = _work(run, examples)
  state, record = loop.run(run, folder, work)
  return _finish(run, examples, state, record, folder, work.spent)


def health(
  info: BilevelInfo | baselines.BaselineInfo,
) -> tuple[list[float], bool]:
  """Returns an iteration's losses, and whether it moved nothing for its NaN."""
  losses = [float(loss) for loss in np.ravel(info.upper_loss)]
  if isinstance(info, baselines.BaselineInfo):
    return losses, not all(map(math.isfinite, losses))
  dropped = int(info.num_nonfinite) == np.size(info.coefficients)
  return [*map(float, np.ravel(info.lower_loss)), *losses], dropped


def row_flops(
  run: run_lib.Run, examples: data.Examples, shape: batching.Shape
) -> float:
  """Counts the operations of a row's forward pass with the run's adapter."""
  config, model = run.config, run.model
  loss_fn = model_lib.make_loss_fn(config.loss, model.module)
  base, adapter = model_lib.abstract_base(config, model), {}
  if methods.METHODS[config.method].updates_adapter:
    adapter = jax.eval_shape(
      lambda base: model_lib.init_adapter(
        config, model, jax.random.key(0), base
      ),
      base,
    )
  return budget.flops(
    lambda *trees: loss_fn(trees[0], trees[1], trees[2], None),
    base,
    adapter,
    batching.collate(examples.upper[:1], shape, pad=model.pad),
  )


def told(info: BilevelInfo | baselines.BaselineInfo) -> dict[str, Any]:
  """Returns what `metrics.jsonl` is told of an iteration."""
  row = info._asdict()
  del row["move"]  # the ledger's
  for name in ("lower_loss", "upper_loss"):
    if name in row:
      row[name] = float(np.mean(row[name]))
  return row


def _work(run: run_lib.Run, examples: data.Examples) -> loop.Work:
  """Says what the loop does."""
  config = run.config
  step_fn = run.jit_step()
  shape = data.train_shape(examples)

  def start():
    base = model_lib.load_base(config, run.model, run.mesh)
    state = run.init(base, model_lib.load_adapter(config, run.model))
    zero_shot = run.evaluate(state.base, {}, examples.test, "zero-shot")
    return state, {"zero_shot": zero_shot.metrics()}

  def arguments(state, number):
    rows = iteration_batch(config, examples, shape, run.model.pad, number)
    return state, run.shard_batch(rows), algorithm.make_hparams(config, number)

  def step(state, number):
    return step_fn(*arguments(state, number))

  def compile_step(state, number):
    return step_fn.lower(*arguments(state, number)).compile()

  of_row = row_flops(run, examples, shape)

  def spent(count):
    found = budget.spent(config, count)
    return {**found._asdict(), "flops": of_row * found.forward_equivalents}

  def select(state):
    result = run.evaluate(
      state.base, run.selected_adapter(state), examples.selection, "selection"
    )
    scores = result.metrics()
    return scores, scores[run.task.metric]

  return loop.Work(
    start=start,
    compile=compile_step,
    step=step,
    told=lambda _, info: told(info),
    health=health,
    select=select,
    spent=spent,
  )


def best_selection(folder: epath.Path) -> dict[str, float]:
  """Returns the highest scores on the selection rows, by which one chooses."""
  found: dict[str, float] = {}
  for row in report.read_jsonl(folder / "metrics.jsonl"):
    for name, score in row.items():
      if name.startswith("selection_"):
        found[name] = max(score, found.get(name, score))
  return found


def _finish(run, examples, state, record, folder, spent) -> dict[str, Any]:
  """Tests p and s, and writes the table, the picture and the summary."""
  config = run.config
  scores = {"zero_shot": record["zero_shot"]}
  # The other adapter's scores have its letter.
  adapters = {"test": run.selected_adapter(state)}
  other = "p" if config.keep == "s" else "s"
  if state.lower:
    adapters[f"test_{other}"] = {"p": state.upper, "s": state.lower}[other]
  for name, adapter in adapters.items():
    result = run.evaluate(state.base, adapter, examples.test, name)
    scores[name] = result.metrics()
  num_steps = config.train.num_steps
  summary: dict[str, Any] = {
    "task": run.task.name,
    "model": config.model.name,
    "method": config.method,
    "keep": config.keep,
    **{f"zero_shot_{k}": v for k, v in scores["zero_shot"].items()},
    **{f"test_{k}": v for k, v in scores["test"].items()},
    **{
      f"test_{k}_{other}": v for k, v in scores.get(f"test_{other}", {}).items()
    },
    **best_selection(folder),
    "num_test_rows": len(examples.test),
    "best_step": int(state.step),
    "num_outer_steps": num_steps,
    "num_inner_steps": num_steps * config.lower.num_steps,
    **spent(num_steps),
    "nonfinite_steps": record["guard"].get("nonfinite", 0),
    "train_seconds": record["seconds"],
    "compile_seconds": record["compile_seconds"],
    "program_bytes": record["program_bytes"],
    "device": jax.devices()[0].device_kind,
    **progress_lib.peaks(),
  }
  report.write_json(folder / "summary.json", summary)
  report.plot_curves(folder / "metrics.jsonl", folder / "curves.png")
  names = {"zero_shot": "zero-shot", "test": config.method}
  if config.method == "bilevel":
    names |= {
      "test": f"adapter {config.keep}, kept",
      f"test_{other}": f"adapter {other}",
    }
  report.results_table(
    [{"model": text, **scores[name]} for name, text in names.items()],
    title=f"{run.task.name}: {len(examples.test)} test rows, never trained on",
  )
  if multihost.is_primary():
    print(
      f"In {folder}: summary.json, metrics.jsonl, curves.png, checkpoints/."
    )
  return summary
