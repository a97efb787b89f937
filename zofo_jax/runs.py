"""A config turned into the functions of a run, for every command.

Everything that the config says becomes an explicit argument here.
"""

import json
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from etils import epath

from zofo_jax import (
  backbone,
  batches,
  bilevel,
  checks,
  directions,
  encode,
  errors,
  evaluate,
  experiment,
  generate,
  inner,
  objectives,
  outer,
  perturbed,
  sampler,
  tasks,
  zo,
)
from zofo_jax import config as config_lib
from zofo_jax import mesh as mesh_lib


def make_schedule(
  name: str, learning_rate: float, num_updates: int
) -> optax.ScalarOrSchedule:
  """Makes a learning rate: constant, or falling to 0 over the run's updates."""
  if name == "linear":
    return optax.linear_schedule(learning_rate, 0.0, num_updates)
  if name == "cosine":
    return optax.cosine_decay_schedule(learning_rate, num_updates)
  return learning_rate


def make_optimizer(
  name: str, learning_rate: optax.ScalarOrSchedule, clip_norm: float = 0.0
) -> optax.GradientTransformation:
  """Makes an optax transformation whose learning rate lives in its state.

  Args:
    name: one of `config.OPTIMIZERS`.
    learning_rate: a number, traced, so that it can change freely, or a
      schedule.
    clip_norm: largest global norm of the gradient; 0 for no limit.

  Returns:
    The transformation.
  """
  factory = {
    "sgd": optax.sgd,
    "momentum": lambda learning_rate: optax.sgd(learning_rate, momentum=0.9),
    "adam": optax.adam,
    "adamw": optax.adamw,
  }[name]
  tx = optax.inject_hyperparams(factory)(learning_rate=learning_rate)
  if clip_norm:
    tx = optax.chain(optax.clip_by_global_norm(clip_norm), tx)
  return tx


ESTIMATORS = {
  "central": zo.central,
  "forward": zo.forward,
  "exact": zo.exact,
}


def make_sampler(zo_config: ml_collections.ConfigDict) -> sampler.Sampler:
  """Makes the directions that `config.zo` asks for."""
  kinds: dict[str, directions.Direction] = {
    "gaussian": directions.Gaussian(),
    "rademacher": directions.Rademacher(),
    "low_rank": directions.LowRank(zo_config.rank),
    "per_example": directions.PerExample(),
    "sparse": directions.Sparse(threshold=zo_config.threshold),
  }
  return sampler.Sampler(
    kinds[zo_config.direction],
    select=lambda path: bool(re.search(zo_config.select, path)),
    layers=tuple(zo_config.layers) or None,
    lazy=True,
  )


def check_sampler(zo_config: ml_collections.ConfigDict, base: Any) -> None:
  """Stops where `zo.select` or `zo.layers` name nothing that is there.

  Args:
    zo_config: `config.zo`.
    base: the backbone's weights, or their shapes.

  Raises:
    UserError: says what there is.
  """
  shapes = {
    perturbed.path_name(path): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(base)
  }
  if not any(re.search(zo_config.select, path) for path in shapes):
    raise errors.UserError(
      f"config.zo.select: '{zo_config.select}' matches no weight; the weights "
      f"are {', '.join(shapes)}."
    )
  stacked = [
    shape
    for path, shape in shapes.items()
    if re.search(perturbed.STACKED, path)
  ]
  wrong = [i for i in zo_config.layers if i not in range(stacked[0][0])]
  if wrong or len(set(zo_config.layers)) < len(zo_config.layers):
    raise errors.UserError(
      "config.zo.layers: expected different numbers from 0 to "
      f"{stacked[0][0] - 1}; found {tuple(zo_config.layers)}."
    )


def make_base_tx(zo_config: ml_collections.ConfigDict) -> outer.OuterTransform:
  """Makes the update of theta that `config.zo` asks for."""
  scalings = [outer.clip(zo_config.clip)] if zo_config.clip else []
  if zo_config.scaling != "none":
    scale = {
      "sign": outer.sign,
      "std": outer.scale_by_std,
      "running_rms": outer.scale_by_running_rms,
    }[zo_config.scaling]
    scalings.append(scale())
  rate = zo_config.learning_rate
  if zo_config.optimizer == "conservative":
    return outer.conservative(rate)
  if zo_config.optimizer == "sgd":
    return outer.sgd(rate, *scalings, weight_decay=zo_config.weight_decay)
  return outer.from_optax(make_optimizer(zo_config.optimizer, rate), *scalings)


def make_level_tx(
  config: ml_collections.ConfigDict, name: Literal["lower", "upper"]
) -> optax.GradientTransformation:
  """Makes the optimizer of s ("lower") or p ("upper"), for a whole run."""
  level = config[name]
  updates = config.lower.num_steps if name == "lower" else 1
  rate = make_schedule(
    level.schedule, level.learning_rate, config.train.num_steps * updates
  )
  return make_optimizer(level.optimizer, rate, level.clip_norm)


def make_hparams(config: ml_collections.ConfigDict) -> bilevel.BilevelHParams:
  """Makes the numbers that are traced."""
  return bilevel.BilevelHParams(
    zo_eps=float(config.zo.eps), penalty=float(config.penalty)
  )


def make_algorithm(
  config: ml_collections.ConfigDict,
  loss_fn: inner.LossFn,
  probe_loss_fn: inner.LossFn | None = None,
  *,
  over_tasks: bool = False,
  map_fn: zo.MapFn = jax.lax.map,
) -> bilevel.BilevelAlgorithm:
  """Makes the (init, step) pair that a config asks for."""
  return bilevel.make_bilevel_step(
    loss_fn,
    probe_loss_fn=probe_loss_fn,
    lower_tx=make_level_tx(config, "lower"),
    upper_tx=make_level_tx(config, "upper"),
    base_tx=make_base_tx(config.zo),
    sampler=make_sampler(config.zo),
    estimator=ESTIMATORS[config.zo.estimator],
    num_directions=config.zo.num_directions,
    per_example=config.zo.direction == "per_example",
    frame_steps=config.zo.frame_steps,
    over_tasks=over_tasks,
    map_fn=map_fn,
  )


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
  model: backbone.Model
  task: tasks.Task
  algorithm: bilevel.BilevelAlgorithm
  score_fn: evaluate.ScoreFn
  mesh: mesh_lib.AnyMesh
  generate_fn: generate.GenerateFn | None = None

  def init(self, base: Any, adapter: Any = None) -> bilevel.BilevelState:
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

  def _init(self, base: Any, adapter: Any = None) -> bilevel.BilevelState:
    key = jax.random.key(self.config.seed)
    upper_key, lower_key, step_key = jax.random.split(key, 3)

    def start(adapter_key: jax.Array) -> Any:
      if adapter is not None:
        return jax.tree.map(jnp.array, adapter)  # each its own: donated
      return backbone.init_adapter(self.config, self.model, adapter_key, base)

    return self.algorithm.init(
      step_key, base, start(upper_key), start(lower_key)
    )

  def abstract_state(self) -> bilevel.BilevelState:
    """Returns the shapes and shardings of a state; reads no weights."""
    base = backbone.abstract_base(self.config, self.model)
    state = jax.eval_shape(self._init, base)
    places = mesh_lib.state_shardings(
      self.mesh, state, self.model.family.SHARDINGS
    )
    return mesh_lib.with_shardings(state, places)

  def jit_step(self) -> jax.stages.Wrapped:
    """Jits the step for the mesh; the state is donated."""
    places = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())
    return jax.jit(
      self.algorithm.step,
      donate_argnums=0,
      out_shardings=(places, mesh_lib.everywhere(self.mesh)),
    )

  def put(
    self, batch: bilevel.BilevelBatch, axis: int = 0
  ) -> bilevel.BilevelBatch:
    """Puts an iteration's rows on the mesh; `axis` is theirs in the batches."""
    return batch._replace(
      lower=mesh_lib.put_rows(self.mesh, batch.lower, axis=axis + 1),
      penalty=mesh_lib.put_rows(self.mesh, batch.penalty, axis=axis),
      upper=mesh_lib.put_rows(self.mesh, batch.upper, axis=axis),
    )

  def judge(
    self, examples: Sequence[encode.Example], scores: np.ndarray
  ) -> evaluate.Evaluation:
    """Returns scores of options [N, O] with what the task measures them by."""
    names = tuple(dict.fromkeys(("accuracy", self.task.metric)))
    return evaluate.Evaluation(examples, scores, names)

  def evaluate(
    self,
    base: Any,
    adapter: Any,
    examples: Sequence[Any],
    label: str,
    *,
    score_fn: evaluate.ScoreFn | None = None,
    shape: batches.Shape | None = None,
  ) -> evaluate.Result:
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
      texts = generate.generate_texts(
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
      return evaluate.Answers(examples, [text.strip() for text in texts])
    scores = evaluate.score_options(
      score_fn or self.score_fn,
      base,
      adapter,
      examples,
      batch_size=size,
      pad=pad,
      label=label,
      shape=shape,
    )
    return self.judge(examples, scores)


def make_run(
  config: ml_collections.ConfigDict, task: tasks.Task | None = None
) -> Run:
  """Checks a config and makes what does not need rows or weights.

  Args:
    config: the run's config.
    task: what the rows mean; None for the config's task.
  """
  checks.check(config)
  mesh = mesh_lib.make(config.mesh)
  checks.check_mesh(config, mesh)
  task = task or experiment.load_task(config)
  model = backbone.load_model(config, mesh)
  experiment.context_length(config, model)
  loss_fn = backbone.make_loss_fn(config.loss, model.module)
  log_probs_fn = backbone.make_log_probs_fn(model.module)
  generate_fn = None
  if task.kind == "generation":
    generate_fn = mesh_lib.on_rows(
      backbone.make_generate_fn(config, model), mesh, 2
    )
  run = Run(
    config=config,
    model=model,
    task=task,
    algorithm=make_algorithm(
      config,
      loss_fn,
      objectives.make_probe_loss_fn(
        config.zo.objective, model.module, model.tokenizer
      ),
      map_fn=mesh_lib.map_directions(mesh),
    ),
    score_fn=mesh_lib.on_rows(evaluate.make_score_fn(log_probs_fn), mesh, 2),
    mesh=mesh,
    generate_fn=generate_fn,
  )
  check_sampler(config.zo, backbone.abstract_base(config, model))
  run.abstract_state()  # adapters that fit nowhere are noticed here
  return run


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
  config = config_lib.base_config()
  try:
    with config.unlocked():
      config.update(json.loads(path.read_text()))
  except (ValueError, TypeError, AttributeError) as error:
    raise errors.UserError(f"{path}: not a run's config ({error}).") from error
  return config
