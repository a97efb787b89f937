"""The fields of a run, their defaults and their checks.

A config is data: `train` turns it into explicit arguments, and nothing below
`train` ever sees it. Fields in the paper's letters: `lower` trains s (T =
`lower.num_steps`), `upper` trains p, `zo` moves theta, `penalty` is lambda.
"""

from typing import Any

import ml_collections
from flax import traverse_util
from ml_collections import config_dict

from zofo_jax import errors
from zofo_jax.config import presets as presets_lib

ADAPTERS = ("lora", "prefix", "prompt")


def base_config() -> ml_collections.ConfigDict:
  """Returns every field with its default; configs/*.py change some."""
  config = ml_collections.ConfigDict()
  config.command = "train"  # what main does with this, if it is not told
  config.method = "bilevel"  # or what it is compared with; see README
  config.seed = 0
  config.penalty = 100.0  # lambda: weight of L(theta, p) - L(theta, s) on D_p
  config.penalty_schedule = "constant"  # or "linear": up to it, from near 0
  config.keep = "p"  # or "s": the adapter that selects, predicts, is exported
  config.loss = "likelihood"  # or "classification" over the label words

  config.model = ml_collections.ConfigDict()
  config.model.name = config_dict.placeholder(str)  # hub id or local folder
  config.model.revision = config_dict.placeholder(str)  # of the hub id
  config.model.dtype = "float32"  # or "bfloat16"
  config.model.pickle = False  # open pytorch_model.bin, as weights alone
  config.model.remat = False  # recompute activations in the adapters' backward

  config.mesh = ml_collections.ConfigDict()  # axes; one may be -1: the rest
  config.mesh.data = -1  # divides the rows of a batch
  config.mesh.fsdp = 1  # divides rows and weights, gathered for each layer
  config.mesh.model = 1  # divides weights and their products
  config.mesh.pert = 1  # divides the directions of an estimate

  config.adapter = ml_collections.ConfigDict()  # of p and of s
  config.adapter.kind = "lora"  # or "prefix", "prompt"; several: "lora+prefix"
  config.adapter.init_from = config_dict.placeholder(str)  # folder of PEFT

  config.lora = ml_collections.ConfigDict()
  config.lora.rank = 8
  config.lora.alpha = 16.0
  config.lora.targets = r"attention/(query|value)$"  # module paths
  config.lora.dropout = 0.0  # of its input, in first-order steps only
  config.lora.rslora = False  # scale by alpha / sqrt(rank), not alpha / rank

  config.prefix = ml_collections.ConfigDict()
  config.prefix.length = 5  # positions, taken from the model's context
  config.prefix.init = "tokens"  # as random tokens would act; or "random"
  config.prefix.projection = 0  # width of a network that computes it; 0: none

  config.prompt = ml_collections.ConfigDict()
  config.prompt.length = 10  # virtual tokens, taken from the model's context
  config.prompt.init = "tokens"  # embeddings of random ones; "text", "random"
  config.prompt.text = ""  # for init "text"; repeated or cut to the length

  config.lower = ml_collections.ConfigDict()  # s, first order, on D_p
  config.lower.num_steps = 10  # T
  config.lower.optimizer = "adam"
  config.lower.learning_rate = 1e-4
  config.lower.schedule = "constant"  # or "linear", "cosine": to 0 at the end
  config.lower.clip_norm = 1.0  # 0 for none
  config.lower.batch_size = 8

  config.upper = ml_collections.ConfigDict()  # p, first order, on D_f and D_p
  config.upper.optimizer = "adam"
  config.upper.learning_rate = 1e-4
  config.upper.schedule = "constant"
  config.upper.clip_norm = 0.0
  config.upper.batch_size = 8  # of D_f and of D_p, for p and for theta

  config.zo = ml_collections.ConfigDict()  # theta, zeroth order
  config.zo.direction = "rademacher"
  config.zo.estimator = "central"
  config.zo.rank = 4  # of low_rank directions
  config.zo.frame_steps = 1  # outer steps that share their subspace
  config.zo.threshold = 0.67  # sparse: weights up to this times their row's rms
  config.zo.objective = "loss"  # of theta; or accuracy, token_f1, MODULE:SCORE
  config.zo.select = ""  # paths of the weights that move; "" for all
  config.zo.layers = ()  # numbers of the layers that move; () for all
  config.zo.num_directions = 1  # per_example: always one an example
  config.zo.eps = 1e-3
  config.zo.optimizer = "sgd"  # in place; the others keep trees like theta
  config.zo.learning_rate = 1e-8
  config.zo.scaling = "none"  # of the coefficients: sign, std or running_rms
  config.zo.clip = 0.0  # largest coefficient; 0 for no limit
  config.zo.weight_decay = 0.0  # sgd only; matrices, times the learning rate

  config.data = ml_collections.ConfigDict()
  config.data.task = "sst2"
  config.data.template = 0  # version of the task's prompt
  config.data.dir = config_dict.placeholder(str)  # JSONL files; else the hub
  config.data.seed = 0  # which rows are drawn
  config.data.num_lower = 666  # D_p
  config.data.num_upper = 334  # D_f
  config.data.pooled = False  # D_p and D_f are both all of these rows
  config.data.num_selection = 500  # to choose a checkpoint; 0: D_f, as in [1]
  config.data.num_test = 1000
  config.data.max_length = 2048  # tokens a row, prompt and option
  config.data.long_rows = "error"  # or "truncate" at the left, or "drop"
  config.data.test_split = ""  # "validation" or "test"; else the first of these
  config.data.shots = 0  # rows of each label in D_p, and in D_f; 0: the counts
  config.data.metric = ""  # else the task's own
  # A task of one's own, under a new name in data.task.
  config.data.prompt = ""  # such as "{review} It was"; braces name columns
  config.data.options = ()  # such as (" bad", " good"); none: text is generated
  config.data.label = "label"  # the column of the label, or of the answer
  config.data.labels = ()  # its values in that order, if not 0, 1, ...

  config.train = ml_collections.ConfigDict()
  config.train.num_steps = 500  # outer iterations
  config.train.num_first_steps = 250  # of a method with _then_, the first part
  config.train.eval_every_steps = 50
  config.train.trackers = ()  # of tensorboard, wandb, mlflow
  config.train.profile_steps = 0  # traced into WORKDIR/profile; 0: none
  config.train.max_nonfinite = 10  # steps in a row that are not; 0: no limit
  config.train.max_loss_ratio = 0.0  # of D_f's mean to its start; 0: no limit

  config.meta = ml_collections.ConfigDict()  # command metatrain: many tasks
  config.meta.train = ("sentiment",)  # groups, tasks, or MetaICL's .json files
  config.meta.target = ("sentiment",)  # held out, for the command adapt
  config.meta.num_tasks = 4  # M, drawn for each outer iteration
  config.meta.size_power = 0.0  # a task's chance: its rows to this; 1/T, 1
  config.meta.weight_power = 0.0  # its weight in the mean, likewise
  config.meta.on_host = False  # adapters of tasks that are not drawn
  config.meta.metaicl = "16384_100"  # k and seed in MetaICL's file names

  config.adapt = ml_collections.ConfigDict()  # command adapt: a few rows
  config.adapt.runs = ()  # folders of metatrain; the bare model comes first
  config.adapt.tasks = ()  # as meta.target; () for those of the config
  config.adapt.start = "mean"  # of the run's p, if it has any; or "fresh"
  config.adapt.shots = 16  # rows of each label; in all where options vary
  config.adapt.num_seeds = 3  # each with rows and a start of its own
  config.adapt.num_steps = 40
  config.adapt.optimizer = "adam"
  config.adapt.learning_rate = 1e-3
  config.adapt.batch_size = 8

  config.icl = ml_collections.ConfigDict()  # command icl: in-context learning
  config.icl.num_shots = 32  # demonstrations before a row; 0: zero-shot
  config.icl.balanced = True  # as many of each label; else at random
  config.icl.separator = "\n\n"  # after each demonstration
  config.icl.num_sets = 1  # sets of demonstrations; figures are their means
  config.icl.calibration = "none"  # or "contextual", or "domain"

  config.probe = ml_collections.ConfigDict()  # command probe: linear probe
  config.probe.c = 1.0  # the regularisation is 1 / c

  config.head = ml_collections.ConfigDict()  # command head: train the head
  config.head.rows = "labels"  # the options' rows of it; or "all"
  config.head.num_steps = 300
  config.head.learning_rate = 1e-3  # Adam
  config.head.batch_size = 8

  config.eval = ml_collections.ConfigDict()
  config.eval.batch_size = 32

  config.generate = ml_collections.ConfigDict()  # answers of squad and drop
  config.generate.max_new_tokens = 50
  config.generate.temperature = 0.0  # 0: the most likely token
  config.generate.top_k = 0  # draw from so many tokens; 0 for all
  config.generate.top_p = 1.0  # draw from the likeliest of this probability
  config.generate.num_beams = 1  # more for beam search
  config.generate.length_penalty = 1.0  # of beam search
  config.generate.stop = ("\n",)  # strings that end an answer

  config.ckpt = ml_collections.ConfigDict()
  config.ckpt.keep = 1  # latest ones, beside the best on the selection rows
  config.ckpt.base_every_steps = 0  # theta this rarely, then from the ledger
  config.ckpt.may_change = ()  # fields that a run may go on with changed
  return config


def parse_arg(arg: str, **defaults: str) -> dict[str, str]:
  """Parses what follows the colon in `--config=FILE:size=1.3b,task=sst2`.

  Args:
    arg: comma-separated `name=value` pairs, or "".
    **defaults: the names there are, with their defaults.

  Returns:
    A value for every name.

  Raises:
    errors.UserError: a pair is malformed or names nothing that is there.
  """
  values = dict(defaults)
  for pair in filter(None, arg.split(",")):
    name, separator, text = pair.partition("=")
    if not separator:
      raise errors.UserError(
        f"--config=...:{arg}: expected name=value, found '{pair}'."
      )
    if name not in defaults:
      raise errors.UserError(
        f"--config=...:{arg}: there is no '{name}' to choose; choose from "
        f"{', '.join(defaults)}.{errors.nearest(name, defaults)}"
      )
    values[name] = text
  return values


def choose(what: str, name: str, table: dict[str, str]) -> str:
  """Looks a chosen name up, suggesting the nearest where there is none."""
  if name not in table:
    raise errors.UserError(
      f"--config: there is no {what} '{name}'; choose from "
      f"{', '.join(table)}.{errors.nearest(name, table)}"
    )
  return table[name]


def apply_preset(config: ml_collections.ConfigDict, preset: str) -> None:
  """Applies `paper` (the defaults) or `reference` (the PyTorch code's)."""
  presets = {"paper": "", "reference": "reference"}
  if choose("preset", preset, presets):
    _apply_reference(config)


def _apply_reference(config: ml_collections.ConfigDict) -> None:
  """Changes a config to the choices of the paper's PyTorch code.

  One-sided differences along one Gaussian direction, Adam on theta with the
  learning rate of p, the selected (lr, outer lr, lambda, T) of each task, the
  upper set D_f used again for selection. Its defects are not reproduced: theta
  is never rounded by being perturbed in place, losses are averaged without
  dropout, and p and s are both scored (README, "Reference preset").

  Args:
    config: changed in place.

  Raises:
    errors.UserError: the reference has no settings for this task or adapter.
  """
  recipe = presets_lib.find(config.adapter.kind, config.data.task)
  config.zo.direction = "gaussian"
  config.zo.estimator = "forward"
  config.zo.num_directions = 1
  config.zo.eps = 1e-3
  config.zo.optimizer = "adam"
  config.zo.learning_rate = recipe.outer_learning_rate
  config.upper.optimizer = "adam"
  config.upper.learning_rate = recipe.outer_learning_rate
  config.lower.optimizer = "adam"
  config.lower.learning_rate = recipe.learning_rate
  config.lower.num_steps = recipe.num_inner_steps
  config.lower.clip_norm = 1.0
  config.upper.clip_norm = 0.0
  config.penalty = recipe.penalty
  config.data.num_selection = 0
  # 5,000 optimizer steps, inner and outer counted together.
  config.train.num_steps = 5000 // recipe.num_inner_steps


def flat(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns all fields of a config as {"zo.eps": 1e-3, ...}."""
  return traverse_util.flatten_dict(config.to_dict(), sep=".")


def adapter_kinds(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """Returns what `config.adapter.kind` joins, in the order of ADAPTERS."""
  kinds = str(config.adapter.kind).split("+")
  return tuple(kind for kind in ADAPTERS if kind in kinds)


def num_virtual(config: ml_collections.ConfigDict) -> int:
  """Counts the positions of the context that the adapters take."""
  kinds = adapter_kinds(config)
  return ("prefix" in kinds) * config.prefix.length + (
    "prompt" in kinds
  ) * config.prompt.length
