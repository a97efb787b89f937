"""A run: its model, task, algorithm and mesh, shared by all commands."""

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from zofo_jax import errors, tasks
from zofo_jax.builders import adapter as adapter_lib
from zofo_jax.builders import algorithm as algorithm_lib
from zofo_jax.builders import base_update as base_update_lib
from zofo_jax.builders import budget as budget_lib
from zofo_jax.builders import data, encoder
from zofo_jax.builders import model as model_lib
from zofo_jax.builders import reward as reward_lib
from zofo_jax.builders import task as task_lib
from zofo_jax.config import defaults, jax_flags, methods, paths, validate
from zofo_jax.core import keys as keys_lib
from zofo_jax.core.types import (
  BilevelAlgorithm,
  BilevelBatch,
  BilevelHParams,
  BilevelState,
  LossFn,
)
from zofo_jax.data import batching, encode_options, encode_prompts
from zofo_jax.evaluation import generation, objectives, results, scoring
from zofo_jax.models import apply
from zofo_jax.report import jsonl
from zofo_jax.sharding import dispatch, rules
from zofo_jax.sharding import mesh as mesh_lib


class BatchSizes(NamedTuple):
  """Numbers of rows in a batch.

  Attributes:
    lower: of D_p, in an inner step.
    upper: of D_f and of D_p, for p and for theta.
    eval: of an evaluation.
    probe: of D_f, by which a guided step's lengths are chosen; 0: `upper`.
  """

  lower: int
  upper: int
  eval: int
  probe: int = 0


class Run(NamedTuple):
  """The objects that training, evaluation and prediction share.

  Attributes:
    config: the resolved config, for the top of training and for config.json;
      everything else reads the fields below.
    model: the model without weights.
    task: what the rows mean.
    row_source: where the rows are.
    encoder: turns rows into tokens.
    algorithm: the (init, step) pair.
    base_update: how the algorithm updates theta.
    hparams_fn: iteration's number -> the step's traced numbers.
    loss_fn: of the first-order steps.
    init_adapter: (key, base) -> a fresh adapter.
    trains_adapter: whether the method has an adapter.
    score_fn: jitted scores of a batch's options, or of a text's tokens.
    mesh: the mesh of devices.
    budget: counts what the run computes.
    seed: of everything random except the choice of rows.
    keep: "p" or "s", the adapter that selects, predicts and is exported.
    inner_steps: T.
    batch_sizes: rows at a time.
    generate_fn: jitted text after prompts; None if the task has options.
    stop: strings that end a generated answer.
    reward: what the run is trained by, if it is trained by rewards.
  """

  config: ml_collections.ConfigDict
  model: model_lib.Model
  task: tasks.Task
  row_source: data.RowSource
  encoder: encoder.Encoder
  algorithm: BilevelAlgorithm
  base_update: base_update_lib.BaseUpdate
  hparams_fn: Callable[[int], BilevelHParams]
  loss_fn: LossFn
  init_adapter: adapter_lib.InitAdapterFn
  trains_adapter: bool
  score_fn: scoring.ScoreFn
  mesh: mesh_lib.AnyMesh
  budget: budget_lib.Budget
  seed: int
  keep: str
  inner_steps: int
  batch_sizes: BatchSizes
  generate_fn: generation.GenerateFn | None = None
  stop: tuple[str, ...] = ()
  reward: reward_lib.Reward | None = None

  @property
  def selection_metric(self) -> str:
    """The metric by which a checkpoint is selected."""
    return "reward" if self.reward else self.task.metric

  def init(self, base: Any, adapter: Any = None) -> BilevelState:
    """Initializes a state; p and s are drawn independently.

    Args:
      base: backbone parameters.
      adapter: initial value of both p and s; None for fresh ones.
    """
    shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state())

    def init(base, adapter):  # without the backbone, which exists already
      return self._init(base, adapter)._replace(base=())

    state = jax.jit(init, out_shardings=shardings._replace(base=()))(
      base, adapter
    )
    return state._replace(base=base)

  def _init(self, base: Any, adapter: Any = None) -> BilevelState:
    upper_key, lower_key, step_key = jax.random.split(
      keys_lib.seed_key(self.seed), 3
    )

    def start(adapter_key: jax.Array) -> Any:
      if not self.trains_adapter:
        return {}
      if adapter is not None:
        return jax.tree.map(jnp.array, adapter)  # copies: both are donated
      return self.init_adapter(adapter_key, base)

    return self.algorithm.init(
      step_key, base, start(upper_key), start(lower_key)
    )

  def abstract_state(self) -> BilevelState:
    """Returns the shapes and shardings of a state; reads no weights."""
    state = jax.eval_shape(self._init, model_lib.abstract_base(self.model))
    shardings = rules.state_shardings(
      *(self.mesh, state, self.model.family.SHARDINGS, self.model.on_host)
    )
    return rules.with_shardings(state, shardings)

  def jit_step(self) -> jax.stages.Wrapped:
    """Jits the step for the mesh; the state is donated."""
    shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state())
    return dispatch.jit_step(self.algorithm.step, self.mesh, shardings)

  def jit_flush(self) -> Callable[[BilevelState], BilevelState]:
    """Jits the function that writes a state's deferred updates in place.

    The backbone in a state is up to date after it; see `outer.write_every`.
    """
    tx, sampler = self.base_update.tx, self.base_update.zo.sampler
    if not tx.defers:
      return lambda state: state
    state = self.abstract_state()
    jitted = jax.jit(
      lambda base, base_opt: tx.flush(base, base_opt, sampler),
      donate_argnums=(0, 1),
      out_shardings=jax.tree.map(
        lambda x: x.sharding, (state.base, state.base_opt)
      ),
    )

    def flush(state):
      base, base_opt = jitted(state.base, state.base_opt)
      return state._replace(base=base, base_opt=base_opt)

    return flush

  def shard_batch(self, batch: BilevelBatch, axis: int = 0) -> BilevelBatch:
    """Puts an iteration's rows on the mesh; they lie along `axis`."""
    return batch._replace(
      lower=dispatch.shard_batch(self.mesh, batch.lower, axis=axis + 1),
      penalty=dispatch.shard_batch(self.mesh, batch.penalty, axis=axis),
      upper=dispatch.shard_batch(self.mesh, batch.upper, axis=axis),
      probe=dispatch.shard_batch(self.mesh, batch.probe, axis=axis + 1),
    )

  def load_examples(self) -> data.Examples:
    """Reads, divides and encodes the rows; see `data.load_examples`."""
    return data.load_examples(
      self.task,
      self.row_source,
      self.encoder,
      with_questions=self.reward is not None,
      with_answers=self.reward is None or not self.reward.alone,
    )

  def write_dropped(self, folder: epath.Path) -> None:
    """Writes which rows were left out, and why, to `dropped.jsonl`."""
    dropped = self.encoder.bad_rows.dropped
    if dropped:
      jsonl.write_lines(
        folder / "dropped.jsonl",
        [{"where": row, "reason": text} for row, text in dropped.items()],
      )

  def selected_adapter(self, state: BilevelState) -> Any:
    """Returns the adapter that selects, predicts and is exported."""
    return state.lower if self.keep == "s" else state.upper

  def score_predictions(
    self, examples: Sequence[encode_options.Example], scores: np.ndarray
  ) -> results.OptionPredictions | results.TokenScores:
    """Wraps scores of options [N, O] or tokens with the task's metrics."""
    if self.task.kind == "text":
      return results.TokenScores(examples, scores)
    names = tuple(dict.fromkeys(("accuracy", self.task.metric)))
    return results.OptionPredictions(examples, scores, names)

  def evaluate(
    self,
    base: Any,
    adapter: Any,
    examples: Sequence[Any],
    label: str,
    *,
    score_fn: scoring.ScoreFn | None = None,
    shape: batching.Shape | None = None,
  ) -> results.Result:
    """Chooses options, scores texts, or generates answers.

    Args:
      base: backbone parameters.
      adapter: adapter parameters; {} for none.
      examples: encoded rows, or questions of a task answered by generation.
      label: of the progress display.
      score_fn: scores options instead of the run's own function.
      shape: sizes of the batches, except the length; None for the rows' own.

    Returns:
      The predictions, with their metrics.
    """
    size, pad = self.batch_sizes.eval, self.model.pad
    if self.generate_fn and isinstance(examples[0], encode_prompts.Question):
      texts = generation.generate_texts(
        self.generate_fn,
        base,
        adapter,
        [question.tokens for question in examples],
        self.model.tokenizer,
        batch_size=size,
        pad=pad,
        stop=self.stop,
        seed=self.seed,
        label=label,
      )
      return results.GeneratedAnswers(
        examples,
        [text.strip() for text in texts],
        self.reward and self.reward.functions,
      )
    scores = scoring.score_options(
      score_fn or self.score_fn,
      base,
      adapter,
      examples,
      batch_size=size,
      pad=pad,
      label=label,
      shape=shape,
    )
    return self.score_predictions(examples, scores)


def make_run(
  config: ml_collections.ConfigDict,
  task: tasks.Task | None = None,
  *,
  mesh: mesh_lib.AnyMesh | None = None,
  model: model_lib.Model | None = None,
) -> Run:
  """Checks a config and makes everything that needs no rows or weights.

  Args:
    config: the run's config.
    task: what the rows mean; None for the config's task.
    mesh: the mesh of devices; None for the config's.
    model: the model without weights; None for the config's. Without a
      tokenizer the run can be planned, but reads no rows.

  Raises:
    UserError: something in the config, the files or jax's flags is wrong.
  """
  validate.check(config)
  jax_flags.check()
  mesh = mesh or mesh_lib.make(config.mesh)
  batch_sizes = BatchSizes(
    config.lower.batch_size,
    config.upper.batch_size,
    config.eval.batch_size,
    config.guided.batch_size,
  )
  check_mesh(mesh, batch_sizes, config.zo.num_directions)
  task = task or task_lib.load_task(config)
  model = model or model_lib.load_model(**config.model, mesh=mesh)
  encode = encoder.make_encoder(config, model)
  module = model.module
  loss_fn = model_lib.make_loss_fn(config.loss, module)
  generate_fn = None
  chat = task.document is not None and not task.may_split
  stop = tuple(config.generate.stop)
  if task.document and stop == defaults.FIELDS["generate.stop"].default:
    stop = ()  # the answers of chats have several lines
  if task.kind in ("generation", "text") and model.tokenizer is not None:
    options = dict(config.generate, stop=stop, chat=chat)
    generate_fn = dispatch.jit_on_batches(
      model_lib.make_generate_fn(model, **options), mesh, 2
    )
  log_probs_fn = apply.make_log_probs_fn(module)
  score_fn = (
    scoring.make_token_score_fn(
      log_probs_fn, functools.partial(apply.best_tokens, module)
    )
    if task.kind == "text"
    else scoring.make_score_fn(log_probs_fn)
  )
  base_update = base_update_lib.make_base_update(
    config, dispatch.map_directions(mesh)
  )
  reward, method = None, methods.METHODS[config.method]
  by_reward = methods.uses_reward(config.method, config.zo.objective)
  task_lib.check_answers(task, reward=by_reward, alone=method.by_reward)
  if by_reward:
    reward = reward_lib.make_reward(
      model,
      base_update.zo,
      mesh,
      train_base=method.updates_base,
      alone=method.by_reward,
      max_new_tokens=config.generate.max_new_tokens,
      stop=stop,
      chat=chat,
      functions=config.reward.functions,
      weights=config.reward.weights,
      directions_at_once=config.reward.directions_at_once,
      pattern=config.reward.pattern,
      json_keys=config.reward.json_keys,
      max_words=config.reward.max_words,
      num_samples=config.reward.num_samples,
      temperature=config.reward.temperature,
    )
  run = Run(
    config=config,
    model=model,
    task=task,
    row_source=data.make_row_source(config)._replace(
      bad_rows=encode.bad_rows, check=encode.check_document
    ),
    encoder=encode,
    algorithm=algorithm_lib.make_algorithm(
      config,
      base_update,
      loss_fn,
      objectives.make_probe_loss_fn(
        config.zo.objective, module, model.tokenizer
      ),
    ),
    base_update=base_update,
    hparams_fn=algorithm_lib.make_hparams_fn(
      eps=config.zo.eps,
      penalty=config.penalty,
      penalty_schedule=config.penalty_schedule,
      num_steps=config.train.num_steps,
    ),
    loss_fn=loss_fn,
    init_adapter=adapter_lib.make_init_fn(config, model),
    trains_adapter=method.updates_adapter,
    score_fn=dispatch.jit_on_batches(score_fn, mesh, 2),
    mesh=mesh,
    budget=budget_lib.make_budget(config),
    seed=config.seed,
    keep=config.keep,
    inner_steps=config.lower.num_steps,
    batch_sizes=batch_sizes,
    generate_fn=generate_fn,
    stop=stop,
    reward=reward,
  )
  base = model_lib.abstract_base(model)
  base_update_lib.check_selected(config.zo.select, config.zo.layers, base)
  run.abstract_state()  # raises for adapters that fit nowhere
  return run


def check_mesh(
  mesh: mesh_lib.AnyMesh, batch_sizes: BatchSizes, num_directions: int
) -> None:
  """Checks that a mesh can shard batches and directions.

  Raises:
    UserError: names the sizes.
  """
  counts = {f"{k}.batch_size": v for k, v in batch_sizes._asdict().items()}
  counts["guided.batch_size"] = counts.pop("probe.batch_size")
  mesh_lib.check_rows(mesh, counts)
  mesh_lib.check_directions(mesh, num_directions)


def saved_config(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a config and the folder from which its relative paths lead."""
  return {**fields, "current_folder": os.getcwd()}


def read_config(folder: epath.Path) -> ml_collections.ConfigDict:
  """Reads the config of a saved run.

  Raises:
    UserError: there is no run, or its config is not of this version.
  """
  path = folder / "config.json"
  if not path.exists():
    raise errors.UserError(
      f"--workdir: {folder} holds no run; expected a folder with config.json."
    )
  config = defaults.base_config()
  try:
    fields = json.loads(path.read_text())
    start = fields.pop("current_folder", "")
    with config.unlocked():
      config.update(fields)
  except (ValueError, TypeError, AttributeError) as error:
    raise errors.UserError(
      f"{path}: not a run's config ({errors.first_line(error)})."
    ) from error
  defaults.replace_paths(config, paths.expand)  # of an earlier version
  if start != os.getcwd():
    defaults.replace_paths(config, functools.partial(paths.from_folder, start))
  return config
