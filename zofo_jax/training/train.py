"""Trains a run on one task.

The one program of an outer iteration is jitted here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from zofo_jax import report
from zofo_jax.builders import adapter as adapter_lib
from zofo_jax.builders import budget, data
from zofo_jax.builders import model as model_lib
from zofo_jax.builders import run as run_lib
from zofo_jax.checkpoints import inputs, lock, run_folder, state_store
from zofo_jax.config import defaults
from zofo_jax.core import baselines, keys
from zofo_jax.core.types import BilevelBatch, BilevelInfo
from zofo_jax.data import batching, encode_prompts
from zofo_jax.evaluation import metrics
from zofo_jax.sharding import multihost
from zofo_jax.training import fit, population, summary


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

  # Four streams: the inner rows and the penalty's come from D_p, those of p and
  # of a guided step's lengths from D_f.
  num_inner, seed = config.lower.num_steps, 3 * config.seed
  lower = [
    batch(
      examples.lower, seed, config.lower.batch_size, step * num_inner + index
    )
    for index in range(num_inner)
  ]
  probe, size = None, config.guided.batch_size
  if config.zo.direction == "guided" and size:
    count = config.guided.num_updates
    rows = [
      batch(examples.upper, 2**32 - 1 - seed, size, step * count + index)
      for index in range(count)
    ]
    probe = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
  size = config.upper.batch_size
  return BilevelBatch(
    lower=jax.tree.map(lambda *leaves: np.stack(leaves), *lower),
    penalty=batch(examples.lower, seed + 1, size, step),
    upper=batch(examples.upper, seed + 2, size, step),
    probe=probe,
  )


@lock.locked
def train(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
  """Trains a run to its end, from its latest checkpoint if there is one.

  Args:
    config: the run's config.
    workdir: folder of the run; local or gs://.

  Returns:
    What is written to `summary.json`.

  Raises:
    UserError: something in the config, the files or `workdir` is wrong, or
      the run diverged.
    errors.InterruptedRun: SIGTERM or SIGINT came.
  """
  folder = epath.Path(workdir)
  with multihost.raise_on_all_processes():
    run = run_lib.make_run(config)
    run_folder.check_config(defaults.flat(config), folder)
    examples = run.load_examples()
    rests_on = inputs.check(run, folder, examples.fingerprints)
    report.make_folder(folder / "checkpoints")
    run.write_dropped(folder)
  shape = data.train_shape(examples) if examples.upper else None
  flops_per_row = row_flops(run, examples, shape)
  samples = report.JsonlWriter(folder / "samples.jsonl")
  scorer = make_scorer(run, examples.questions, samples.write)

  def arguments(state, step):
    batch = BilevelBatch(lower=(), penalty=(), upper=())
    if shape is not None:
      batch = iteration_batch(config, examples, shape, run.model.pad, step)
    if scorer is not None:
      batch = batch._replace(scores=scorer.scores(state, step))
    return state, run.shard_batch(batch), run.hparams_fn(step)

  def row_of_metrics(step, info):
    rewards = {} if scorer is None else scorer.metrics(step)
    return {**metrics_row(info), **rewards}

  def init():
    base = model_lib.load_base(run.model, run.mesh)
    start = adapter_lib.load_adapter(
      config.adapter.init_from, run.model, run.init_adapter
    )
    state = run.init(base, start)
    zero_shot = run.evaluate(state.base, {}, examples.test, "zero-shot")
    return state, {"zero_shot": zero_shot.metrics()}

  def compute_used(num_steps):
    return budget_row(run.budget.total(num_steps), flops_per_row)

  def validate(state):
    adapter = run.selected_adapter(state)
    result = run.evaluate(state.base, adapter, examples.selection, "selection")
    scores = result.metrics()
    score = scores[run.selection_metric]
    lowest = run.selection_metric in metrics.LOWER_IS_BETTER
    return scores, -score if lowest else score

  with (
    fit.write_errors(folder),
    state_store.open_store(run, folder, inputs=rests_on, write=True) as store,
    samples,
  ):
    state, run_metadata = fit.fit(
      config,
      folder,
      store,
      fit.Step(run.jit_step(), arguments, flush=run.jit_flush()),
      init=init,
      metrics_row=row_of_metrics,
      logs=() if scorer is None else (samples,),
      budget=compute_used,
      validate=validate,
    )
  return summary.summarize(
    run,
    examples.test,
    state,
    folder,
    run_metadata,
    compute_used(config.train.num_steps),
  )


def make_scorer(
  run: run_lib.Run,
  questions: Sequence[encode_prompts.Question],
  write_sample: Callable[[dict[str, Any]], None],
) -> population.Scorer | None:
  """Makes what scores the answers of a run's population.

  Args:
    run: the run.
    questions: rows of D_f.
    write_sample: gets some answers.

  Returns:
    The scorer; None if the run is not trained by rewards.
  """
  reward = run.reward
  if reward is None:
    return None
  eps = run.hparams_fn(0).zo_eps
  return population.Scorer(
    reward.functions,
    lambda state, *rows: reward.answer(state, eps, *rows),
    questions,
    tokenizer=run.model.tokenizer,
    pad=run.model.pad,
    stop=run.stop,
    seed=3 * run.seed + 2,
    batch_size=run.batch_sizes.upper,
    num_samples=reward.num_samples,
    write_sample=write_sample,
  )


def row_flops(
  run: run_lib.Run, examples: data.Examples, shape: batching.Shape | None
) -> float:
  """Counts the operations of a row's forward pass with the run's adapter.

  Without rows to learn from, a row is the longest prompt with its answer.
  """
  base, adapter = model_lib.abstract_base(run.model), {}
  if run.trains_adapter:
    adapter = jax.eval_shape(run.init_adapter, keys.seed_key(0), base)
  if shape is None:
    longest = max(len(question.tokens) for question in examples.questions)
    size = (1, longest + run.encoder.max_new_tokens)
    return budget.flops(
      lambda base, adapter, tokens, mask: run.model.module.apply(
        {"params": base, "adapter": adapter}, tokens, mask, method="hidden"
      ),
      base,
      adapter,
      jax.ShapeDtypeStruct(size, np.int32),
      jax.ShapeDtypeStruct(size, bool),
    )
  return budget.flops(
    lambda *trees: run.loss_fn(trees[0], trees[1], trees[2], None),
    base,
    adapter,
    batching.collate(examples.upper[:1], shape, pad=run.model.pad),
  )


def budget_row(passes: budget.Passes, flops_per_row: float) -> dict[str, float]:
  """Returns the compute used as fields of a row of metrics."""
  flops = flops_per_row * passes.forward_equivalents
  return {**passes._asdict(), "flops": flops}


def metrics_row(
  info: BilevelInfo | baselines.BaselineInfo,
) -> dict[str, Any]:
  """Returns the fields of an iteration's row in `metrics.jsonl`."""
  row = info._asdict()
  del row["move"]  # in the ledger
  row.pop("aux", None)  # of a loss with has_aux, which no run has
  lengths, earlier = row.pop("lengths", None), row.pop("earlier", None)
  if earlier is not None:
    row["earlier_lengths"] = earlier
  if lengths is not None:
    leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(lengths)]
    if not np.size(row["coefficients"]):
      del row["coefficients"]
    row["length"] = float(np.mean(np.concatenate(leaves)))
  for name in ("lower_loss", "upper_loss"):
    if name in row:
      row[name] = float(np.mean(row[name]))
  return row
