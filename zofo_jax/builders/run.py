"""A run: its model, task, algorithm and mesh, for every command."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from zofo_jax import errors, tasks
from zofo_jax.builders import algorithm as algorithm_lib
from zofo_jax.builders import data
from zofo_jax.builders import model as model_lib
from zofo_jax.config import defaults, methods, validate
from zofo_jax.core.types import BilevelAlgorithm, BilevelBatch, BilevelState
from zofo_jax.data import batching, encode_options
from zofo_jax.evaluation import generation, objectives, scoring
from zofo_jax.models import apply
from zofo_jax.sharding import dispatch, rules
from zofo_jax.sharding import mesh as mesh_lib


class Run(NamedTuple):
  """What training, evaluation and prediction share.

  Attributes:
    config: the resolved config.
    model: the model without weights.
    task: what the rows mean.
    algorithm: the (init, step) pair.
    score_fn: jitted scores of a batch's options.
    mesh: the grid of devices.
    generate_fn: jitted text after prompts; None where the task has options.
  """

  config: ml_collections.ConfigDict
  model: model_lib.Model
  task: tasks.Task
  algorithm: BilevelAlgorithm
  score_fn: scoring.ScoreFn
  mesh: mesh_lib.AnyMesh
  generate_fn: generation.GenerateFn | None = None

  def init(self, base: Any, adapter: Any = None) -> BilevelState:
    """Starts a state at a backbone; p and s begin independently.

    Args:
      base: backbone parameters.
      adapter: what p and s both begin with instead.
    """
    places = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())

    def rest(base, adapter):  # All but the backbone, which is there.
      return self._init(base, adapter)._replace(base=())

    state = jax.jit(rest, out_shardings=places._replace(base=()))(base, adapter)
    return state._replace(base=base)

  def _init(self, base: Any, adapter: Any = None) -> BilevelState:
    key = jax.random.key(self.config.seed)
    upper_key, lower_key, step_key = jax.random.split(key, 3)

    def start(adapter_key: jax.Array) -> Any:
      if not methods.METHODS[self.config.method].updates_adapter:
        return {}
      if adapter is not None:
        return jax.tree.map(jnp.array, adapter)  # each its own: donated
      return model_lib.init_adapter(self.config, self.model, adapter_key, base)

    return self.algorithm.init(
      step_key, base, start(upper_key), start(lower_key)
    )

  def abstract_state(self) -> BilevelState:
    """Returns the shapes and shardings of a state; reads no weights."""
    base = model_lib.abstract_base(self.config, self.model)
    state = jax.eval_shape(self._init, base)
    places = rules.state_shardings(
      self.mesh, state, self.model.family.SHARDINGS
    )
    return rules.with_shardings(state, places)

  def jit_step(self) -> jax.stages.Wrapped:
    """Jits the step for the mesh; the state is donated."""
    places = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())
    return dispatch.jit_step(self.algorithm.step, self.mesh, places)

  def shard_batch(self, batch: BilevelBatch, axis: int = 0) -> BilevelBatch:
    """Puts an iteration's rows on the mesh; `axis` is theirs in the batches."""
    return batch._replace(
      lower=dispatch.shard_batch(self.mesh, batch.lower, axis=axis + 1),
      penalty=dispatch.shard_batch(self.mesh, batch.penalty, axis=axis),
      upper=dispatch.shard_batch(self.mesh, batch.upper, axis=axis),
    )

  def selected_adapter(self, state: BilevelState) -> Any:
    """Returns the adapter that selects, predicts and is exported."""
    return state.lower if self.config.keep == "s" else state.upper

  def score_predictions(
    self, examples: Sequence[encode_options.Example], scores: np.ndarray
  ) -> scoring.OptionPredictions:
    """Returns scores of options [N, O] with what the task measures them by."""
    names = tuple(dict.fromkeys(("accuracy", self.task.metric)))
    return scoring.OptionPredictions(examples, scores, names)

  def evaluate(
    self,
    base: Any,
    adapter: Any,
    examples: Sequence[Any],
    label: str,
    *,
    score_fn: scoring.ScoreFn | None = None,
    shape: batching.Shape | None = None,
  ) -> scoring.Result:
    """Chooses options, or answers questions, with an adapter on a backbone.

    Args:
      base: backbone parameters.
      adapter: adapter parameters; {} for the bare backbone.
      examples: encoded rows, or questions of a task answered by generation.
      label: what the progress is called.
      score_fn: scores options in the place of the run's own function.
      shape: sizes of the batches, but for the length; None for the rows' own.

    Returns:
      What was answered.
    """
    size, pad = self.config.eval.batch_size, self.model.pad
    if self.generate_fn is not None:
      texts = generation.generate_texts(
        self.generate_fn,
        base,
        adapter,
        [question.tokens for question in examples],
        self.model.tokenizer,
        batch_size=size,
        pad=pad,
        stop=self.config.generate.stop,
        seed=self.config.seed,
        label=label,
      )
      return scoring.GeneratedAnswers(
        examples, [text.strip() for text in texts]
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
  config: ml_collections.ConfigDict, task: tasks.Task | None = None
) -> Run:
  """Checks a config and makes what does not need rows or weights.

  Args:
    config: the run's config.
    task: what the rows mean; None for the config's task.
  """
  validate.check(config)
  mesh = mesh_lib.make(config.mesh)
  check_mesh(config, mesh)
  task = task or data.load_task(config)
  model = model_lib.load_model(config, mesh)
  data.context_length(config, model)
  loss_fn = model_lib.make_loss_fn(config.loss, model.module)
  log_probs_fn = apply.make_log_probs_fn(model.module)
  generate_fn = None
  if task.kind == "generation":
    generate_fn = dispatch.jit_on_batches(
      model_lib.make_generate_fn(config, model), mesh, 2
    )
  run = Run(
    config=config,
    model=model,
    task=task,
    algorithm=algorithm_lib.make_algorithm(
      config,
      loss_fn,
      objectives.make_probe_loss_fn(
        config.zo.objective, model.module, model.tokenizer
      ),
      map_fn=dispatch.map_directions(mesh),
    ),
    score_fn=dispatch.jit_on_batches(
      scoring.make_score_fn(log_probs_fn), mesh, 2
    ),
    mesh=mesh,
    generate_fn=generate_fn,
  )
  algorithm_lib.check_sampler(config.zo, model_lib.abstract_base(config, model))
  run.abstract_state()  # adapters that fit nowhere are noticed here
  return run


def check_mesh(
  config: ml_collections.ConfigDict, mesh: mesh_lib.AnyMesh
) -> None:
  """Checks that a mesh divides the config's batches and directions.

  Raises:
    UserError: names the sizes.
  """
  fields = defaults.flat(config)
  names = ("lower.batch_size", "upper.batch_size", "eval.batch_size")
  mesh_lib.check_rows(mesh, {name: fields[name] for name in names})
  mesh_lib.check_directions(mesh, config.zo.num_directions)


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
    with config.unlocked():
      config.update(json.loads(path.read_text()))
  except (ValueError, TypeError, AttributeError) as error:
    raise errors.UserError(
      f"{path}: not a run's config ({errors.first_line(error)})."
    ) from error
  return config
