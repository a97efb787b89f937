"""The fields of a run: one table of names, defaults, checks and helps.

From it come `base_config`, the checks of single fields (`validate.check`), what
may change when a run resumes, `--print_config` and the page of the
documentation. Names follow the paper: `lower` trains s for
T = `lower.num_steps` steps, `upper` trains p, `zo` updates theta, `penalty` is
lambda.
"""

from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
from flax import traverse_util
from ml_collections import config_dict

from zofo_jax.config import methods
from zofo_jax.config.fields import (
  ALWAYS,
  ANY,
  FINITE,
  INTEGERS,
  LABELS,
  MESH_SIZE,
  NAMES,
  NEVER,
  NOT_NEGATIVE,
  NUMBERS,
  PATH,
  PATHS,
  POSITIVE,
  TEXT,
  TEXTS,
  Field,
  integer,
  one_of,
  some_of,
)

ADAPTERS = ("lora", "prefix", "prompt")
COMMANDS = ("train", "icl", "probe", "head", "metatrain", "adapt")
METRICS = (
  *("accuracy", "macro_f1", "matthews", "pearson"),
  *("token_f1", "exact_match", "rouge_l", "token_loss", "token_accuracy"),
)
# Of rows; see `tasks.formatted`.
FORMATS = (
  *("messages", "conversations", "completion", "alpaca", "dolly"),
  *("question", "text"),
)
OPTIMIZERS = ("sgd", "momentum", "adam", "adamw")
SCHEDULES = ("constant", "linear", "cosine")
RANDOM_DIRECTIONS = (
  *("gaussian", "rademacher", "low_rank", "per_example", "sparse"),
)
ZO_DIRECTIONS = (*RANDOM_DIRECTIONS, "guided")
QUANTIZED = ("int8", "int4", "nf4")
TRACKERS = ("tensorboard", "wandb", "mlflow")
ZO_OPTIMIZERS = (*OPTIMIZERS, "conservative")

# NumPy's generators take 32 bits; a run has three streams, up to 3 * seed + 2.
_LARGEST_SEED = (2**32 - 3) // 3

# The sections, in the order in which they are printed.
SECTIONS = {
  "": "the run",
  "model": "the language model",
  "mesh": "devices along each axis; one size may be -1: all that remain",
  "adapter": "the adapters p and s",
  "lora": "adapter kind lora",
  "prefix": "adapter kind prefix",
  "prompt": "adapter kind prompt",
  "lower": "lower level: s, by first-order steps on D_p",
  "upper": "upper level: p, by first-order steps on D_f and D_p",
  "zo": "upper level: theta, by zeroth-order steps on D_f and D_p",
  "guided": "zo.direction guided: theta follows what lower steps change in s",
  "reward": "rewards of generated text: methods es and es_peft, zo.objective "
  "reward",
  "data": "the task and its rows",
  "train": "the training loop",
  "meta": "command metatrain: training on many tasks",
  "adapt": "command adapt: new tasks from a few rows",
  "icl": "command icl: in-context learning",
  "probe": "command probe: linear probing",
  "head": "command head: training the head alone",
  "eval": "evaluation",
  "generate": "answers of tasks without options, such as squad and drop",
  "ckpt": "checkpoints",
}

# Name, default, check, help; whether it may change when a run resumes, if not
# ON_REQUEST.
# fmt: off
_ROWS: tuple[tuple[Any, ...], ...] = (
  ("command", "train", one_of(*COMMANDS), "command to run if none is given"),
  ("method", "bilevel", one_of(*methods.METHODS), "training method"),
  ("seed", 0, integer(0, _LARGEST_SEED),
   "of training: batches, directions, adapters", NEVER),
  ("penalty", 100.0, NOT_NEGATIVE, "lambda, weight of L(p) - L(s) on D_p"),
  ("penalty_schedule", "constant", one_of("constant", "linear"),
   "constant, or linear: rises to `penalty` over the run"),
  ("keep", "p", one_of("p", "s"),
   "adapter by which checkpoints are selected, rows predicted, runs exported"),
  ("loss", "likelihood", one_of("likelihood", "classification"),
   "of the right option's tokens, or a softmax over the options"),
  # The language model.
  ("model.name", str, PATH, "hub id or local folder", NEVER),
  ("model.revision", str, ANY, "branch, tag or commit of the hub id", NEVER),
  ("model.dtype", "float32", one_of("float32", "bfloat16"),
   "of weights and activations", NEVER),
  ("model.quantize", "", one_of("", *QUANTIZED),
   "matrices as integers of eight or four bits with scales; empty: as dtype",
   NEVER),
  ("model.offload", "", one_of("", "host"),
   "host: the layers' matrices stay in the host's memory and are copied to the "
   "device one after another"),
  ("model.pickle", False, ANY, "allow pytorch_model.bin, weights only"),
  ("model.remat", False, ANY, "recompute activations in backward passes"),
  # Devices.
  ("mesh.data", -1, MESH_SIZE, "shards the rows of a batch"),
  ("mesh.fsdp", 1, MESH_SIZE,
   "shards rows, and weights, which are gathered for each layer"),
  ("mesh.model", 1, MESH_SIZE, "shards weights and their matrix products"),
  ("mesh.pert", 1, MESH_SIZE, "shards the directions of an estimate"),
  # Adapters.
  ("adapter.kind", "lora", ANY,
   "lora, prefix or prompt; several are joined by +, as lora+prefix"),
  ("adapter.init_from", str, PATH,
   "PEFT folder to start from, or hub:OWNER/NAME"),
  ("lora.rank", 8, POSITIVE, "rank of the two factors"),
  ("lora.alpha", 16.0, FINITE, "their product is scaled by alpha / rank"),
  ("lora.targets", r"attention/(query|value)$", ANY,
   "regular expression, searched in the paths of the modules"),
  ("lora.dropout", 0.0, NOT_NEGATIVE, "of inputs, in first-order steps only"),
  ("lora.rslora", False, ANY, "scale by alpha / sqrt(rank) instead"),
  ("prefix.length", 5, POSITIVE, "positions, taken from the model's context"),
  ("prefix.init", "tokens", one_of("tokens", "random"),
   "keys and values of random tokens, or random numbers"),
  ("prefix.projection", 0, NOT_NEGATIVE,
   "width of a network that computes the prefix; 0 for none"),
  ("prompt.length", 10, POSITIVE,
   "virtual tokens, taken from the model's context"),
  ("prompt.init", "tokens", one_of("tokens", "random", "text"),
   "embeddings of random tokens, random numbers, or prompt.text"),
  ("prompt.text", "", TEXT, "repeated or cut to the length"),
  # Lower level.
  ("lower.num_steps", 10, POSITIVE, "T, steps on s in each iteration"),
  ("lower.optimizer", "adam", one_of(*OPTIMIZERS), "optimizer of s"),
  ("lower.learning_rate", 1e-4, NOT_NEGATIVE, "at its peak"),
  ("lower.schedule", "constant", one_of(*SCHEDULES),
   "linear and cosine fall to 0 at the end of the run"),
  ("lower.clip_norm", 1.0, NOT_NEGATIVE, "largest norm of a gradient; 0: any"),
  ("lower.batch_size", 8, POSITIVE, "rows of D_p a step"),
  # Upper level.
  ("upper.optimizer", "adam", one_of(*OPTIMIZERS), "optimizer of p"),
  ("upper.learning_rate", 1e-4, NOT_NEGATIVE, "at its peak"),
  ("upper.schedule", "constant", one_of(*SCHEDULES),
   "linear and cosine fall to 0 at the end of the run"),
  ("upper.clip_norm", 0.0, NOT_NEGATIVE, "largest norm of a gradient; 0: any"),
  ("upper.batch_size", 8, POSITIVE, "rows of D_f, and of D_p, for p and theta"),
  # The zeroth-order step.
  ("zo.direction", "rademacher", one_of(*ZO_DIRECTIONS),
   "distribution of z", NEVER),
  ("zo.estimator", "central", one_of("central", "forward", "exact"),
   "two-sided or one-sided differences, or the exact directional derivative"),
  ("zo.rank", 4, POSITIVE, "of low_rank directions", NEVER),
  ("zo.frame_steps", 1, POSITIVE,
   "iterations that share the subspace of their low_rank directions", NEVER),
  ("zo.threshold", 0.67, POSITIVE,
   "sparse: moves weights up to this multiple of their row's rms", NEVER),
  ("zo.objective", "loss", ANY,
   "what steps on theta improve: loss, accuracy, macro_f1, token_f1, reward, "
   "or MODULE:SCORE"),
  ("zo.select", "", ANY,
   "regular expression for the paths of the weights to update; empty: all",
   NEVER),
  ("zo.layers", (), INTEGERS,
   "indices of the layers to update; (): all", NEVER),
  ("zo.num_directions", 1, POSITIVE,
   "directions of an estimate; per_example has one for each row instead"),
  ("zo.eps", 1e-3, POSITIVE, "radius of the finite difference"),
  ("zo.optimizer", "sgd", one_of(*ZO_OPTIMIZERS),
   "sgd and conservative work in place, the others store trees like theta",
   NEVER),
  ("zo.learning_rate", 1e-8, NOT_NEGATIVE, "step size of theta"),
  ("zo.scaling", "none", one_of("none", "sign", "std", "running_rms"),
   "of the coefficients: their signs, or divided by their std or running rms"),
  ("zo.clip", 0.0, NOT_NEGATIVE, "largest absolute coefficient; 0: any"),
  ("zo.weight_decay", 0.0, NOT_NEGATIVE,
   "of matrices, times the learning rate; sgd only"),
  ("zo.write_every", 1, POSITIVE,
   "steps whose updates of weights in the host's memory are written together; "
   "until then, they are computed where a layer is read", NEVER),
  # Steps along what s has learned.
  ("guided.lengths", "all", one_of("all", "parabola", "descend"),
   "how far theta follows: all of it, the least of a parabola, or descent"),
  ("guided.per_matrix", True, ANY,
   "descend: a length for each matrix and layer; else one for all"),
  ("guided.per_task", False, ANY,
   "descend, over many tasks: a length for each task; else one for all"),
  ("guided.num_updates", 4, POSITIVE, "descend: zeroth-order steps on lengths"),
  ("guided.learning_rate", 0.3, POSITIVE,
   "descend: root mean square of such a step"),
  ("guided.radius", 0.25, POSITIVE, "descend: radius of the finite difference"),
  ("guided.largest", 1.0, POSITIVE, "longest length; 1 is all of it"),
  ("guided.batch_size", 0, NOT_NEGATIVE,
   "rows of D_f by which lengths are chosen; 0: those of the step on p"),
  ("guided.penalty", False, ANY,
   "choose lengths by lambda L(p; D_p) as well, not by L(p; D_f) alone"),
  ("guided.reset", False, ANY,
   "set the moments of s to 0 when it stands back"),
  ("guided.history", 1, POSITIVE,
   "descend: h, theta moves along the last h displacements of s, each kept one "
   "with a length of its own and twice the adapter's bytes", NEVER),
  ("guided.random", "", one_of("", *RANDOM_DIRECTIONS),
   "theta also takes a step along these directions; empty: none"),
  # Rewards of generated text.
  ("reward.functions", (), NAMES,
   "what answers are scored by: exact_match, token_f1, number, regex, json, "
   "length, rouge_l, or MODULE:FUNCTION, called as reward(completions, "
   "**columns)"),
  ("reward.weights", (), NUMBERS, "of the functions in their sum; (): 1 each"),
  ("reward.shaping", "z_score", one_of("none", "ranks", "z_score"),
   "of the members' rewards, before they become coefficients"),
  ("reward.temperature", 0.0, NOT_NEGATIVE,
   "of the answers that are scored in training; 0: the most likely token"),
  ("reward.directions_at_once", 0, NOT_NEGATIVE,
   "directions whose members write at the same time; 0: all of low_rank and "
   "of an adapter, one of the others"),
  ("reward.pattern", "", ANY,
   "regex: regular expression, searched in the answer"),
  ("reward.json_keys", (), NAMES, "json: keys that the object must have"),
  ("reward.max_words", 0, NOT_NEGATIVE,
   "length: words of an answer that cost nothing"),
  ("reward.num_samples", 2, NOT_NEGATIVE,
   "prompts of each step whose best and worst answers go to "
   "WORKDIR/samples.jsonl", ALWAYS),
  # The task.
  ("data.task", "sst2", ANY,
   "a task that `zofo tasks` lists, or a new name"),
  ("data.format", "", one_of("", *FORMATS),
   "format of the rows of a new task; empty: known by their columns"),
  ("data.template", 0, ANY, "version of the task's prompt"),
  ("data.dir", str, PATH,
   "folder with JSON, CSV, TSV or Parquet files, or one file; else the hub"),
  ("data.seed", 0, integer(0, 2**32 - 1), "of the draw of rows"),
  ("data.order", "file", one_of("file", "content"),
   "order of the rows before the draw: that of the files, or one that is the "
   "same whatever file or line a row is in"),
  ("data.stream", False, ANY,
   "of a set of the hub, download only the part from which rows are drawn"),
  ("data.num_lower", 666, POSITIVE, "rows of D_p"),
  ("data.num_upper", 334, POSITIVE, "rows of D_f"),
  ("data.pooled", False, ANY, "use all of these rows as both D_p and D_f"),
  ("data.num_selection", 500, NOT_NEGATIVE,
   "rows to select a checkpoint by; 0: D_f"),
  ("data.num_test", 1000, POSITIVE, "rows to test on"),
  ("data.max_length", 2048, POSITIVE, "tokens of a row, prompt and option"),
  ("data.long_rows", "error", one_of("error", "truncate", "drop"),
   "stop at longer rows, cut them at the left, or leave them out"),
  ("data.pack", False, ANY,
   "rows of a data.format: put several into one training row of max_length, "
   "where tokens attend within their own; long texts are split"),
  ("data.bad_rows", "error", one_of("error", "drop"),
   "stop at rows that cannot be used, or leave them out and list them in "
   "WORKDIR/dropped.jsonl"),
  ("data.test_split", "", one_of("", "validation", "test"),
   "split to test on; empty: validation, or test if there is none"),
  ("data.shots", 0, NOT_NEGATIVE,
   "rows of each label in D_p and in D_f, instead of their numbers; 0: unused"),
  ("data.metric", "", one_of("", *METRICS),
   "metric to select by; empty: the task's"),
  ("data.prompt", "", TEXT,
   "prompt of a new task, such as '{review} It was'; braces name columns"),
  ("data.options", (), TEXTS,
   "its options, such as (' bad', ' good'); (): text is generated"),
  ("data.label", "label", ANY,
   "its column of labels or answers; empty if rewards alone score what is "
   "generated"),
  ("data.labels", (), LABELS,
   "its labels in the order of the options; (): 0, 1 and so on"),
  # The loop.
  ("train.num_steps", 500, POSITIVE, "iterations of the run"),
  ("train.num_first_steps", 250, POSITIVE,
   "iterations of the first stage of a method with _then_"),
  ("train.eval_every_steps", 50, POSITIVE,
   "iterations between evaluations, each with a checkpoint"),
  ("train.trackers", (), some_of(*TRACKERS),
   "services that get the rows of metrics as well", ALWAYS),
  ("train.profile_steps", 0, NOT_NEGATIVE,
   "iterations to trace into WORKDIR/profile", ALWAYS),
  ("train.max_nonfinite", 10, NOT_NEGATIVE,
   "stop after so many non-finite steps in a row; 0: never"),
  ("train.max_loss_ratio", 0.0, NOT_NEGATIVE,
   "stop once the mean loss on D_f is this multiple of its start; 0: never"),
  # Many tasks.
  ("meta.train", ("sentiment",), PATHS,
   "groups or tasks to train on, or MetaICL's .json lists"),
  ("meta.target", ("sentiment",), PATHS,
   "groups or tasks that are held out, for the command adapt"),
  ("meta.num_tasks", 4, POSITIVE, "M, tasks drawn in each iteration"),
  ("meta.size_power", 0.0, NOT_NEGATIVE,
   "a task is drawn in proportion to its number of rows to this power"),
  ("meta.weight_power", 0.0, NOT_NEGATIVE,
   "a task's loss is weighted by its number of rows to this power"),
  ("meta.on_host", False, ANY,
   "keep the adapters of tasks that are not drawn in host memory"),
  ("meta.metaicl", "16384_100", ANY, "k and seed in MetaICL's file names"),
  ("adapt.runs", (), PATHS,
   "folders of metatrain runs; the bare model is always evaluated as well"),
  ("adapt.tasks", (), PATHS,
   "as meta.target; (): those of the run"),
  ("adapt.start", "mean", one_of("mean", "fresh"),
   "the run's p (mean over tasks), or a new adapter"),
  ("adapt.shots", 16, POSITIVE,
   "rows of each label; rows in all where options differ from row to row"),
  ("adapt.num_seeds", 3, POSITIVE, "repetitions, with other rows and starts"),
  ("adapt.num_steps", 40, POSITIVE, "first-order steps on the adapter"),
  ("adapt.optimizer", "adam", one_of(*OPTIMIZERS), "optimizer of the adapter"),
  ("adapt.learning_rate", 1e-3, NOT_NEGATIVE, "of the adapter"),
  ("adapt.batch_size", 8, POSITIVE, "rows a step"),
  ("icl.num_shots", 32, NOT_NEGATIVE, "demonstrations; 0: zero-shot"),
  ("icl.balanced", True, ANY, "equally many of each label"),
  ("icl.separator", "\n\n", TEXT, "after each demonstration"),
  ("icl.num_sets", 1, POSITIVE, "draws of demonstrations to average over"),
  ("icl.calibration", "none", one_of("none", "contextual", "domain"),
   "scores of options relative to a prompt without content"),
  ("probe.c", 1.0, POSITIVE, "inverse strength of the L2 regularization"),
  ("head.rows", "labels", one_of("labels", "all"),
   "rows of the head to train: those of the options' tokens, or all"),
  ("head.num_steps", 300, POSITIVE, "steps of Adam"),
  ("head.learning_rate", 1e-3, NOT_NEGATIVE, "of Adam"),
  ("head.batch_size", 8, POSITIVE, "rows a step"),
  # Evaluation.
  ("eval.batch_size", 32, POSITIVE, "rows a batch"),
  ("generate.max_new_tokens", 50, POSITIVE, "longest answer"),
  ("generate.temperature", 0.0, NOT_NEGATIVE,
   "of sampling; 0: the most likely token"),
  ("generate.top_k", 0, NOT_NEGATIVE, "sample among so many tokens; 0: all"),
  ("generate.top_p", 1.0, POSITIVE,
   "sample among the likeliest tokens of this total probability"),
  ("generate.num_beams", 1, POSITIVE, "more than 1 for beam search"),
  ("generate.length_penalty", 1.0, FINITE, "exponent of beam search"),
  ("generate.stop", ("\n",), TEXTS,
   "texts that end an answer; with data.format, ('\\n',) is none"),
  # Checkpoints.
  ("ckpt.keep", 1, POSITIVE,
   "latest checkpoints to keep, besides the best on the selection rows"),
  ("ckpt.base_every_steps", 0, NOT_NEGATIVE,
   "save theta only this often and replay the ledger from there; 0: always",
   NEVER),
  ("ckpt.may_change", (), NAMES,
   "fields that may differ when a run resumes, and rows, tokenizer or "
   "model_config if these may"),
)
# fmt: on
FIELDS = {row[0]: Field(*row) for row in _ROWS}


def base_config() -> ml_collections.ConfigDict:
  """Returns every field with its default; configs/*.py change some.

  Examples:
    >>> config = base_config()
    >>> config.zo.eps
    0.001
  """
  config = ml_collections.ConfigDict()
  for field in FIELDS.values():
    section, _, name = field.name.rpartition(".")
    if section and section not in config:
      config[section] = ml_collections.ConfigDict()
    holder = config[section] if section else config
    unset = isinstance(field.default, type)
    holder[name] = (
      config_dict.placeholder(field.default) if unset else field.default
    )
  return config


def flat(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns all fields of a config as {"zo.eps": 1e-3, ...}."""
  return traverse_util.flatten_dict(config.to_dict(), sep=".")


def map_paths(
  fn: Callable[[str], str], fields: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns fields with a function applied to every path.

  Args:
    fn: path -> path; also called with names, where a field may be either.
    fields: {"data.dir": "~/rows", ...}; unknown ones are unchanged.
  """
  return {
    name: FIELDS[name].map_paths(fn, value) if name in FIELDS else value
    for name, value in fields.items()
  }


def replace_paths(
  config: ml_collections.ConfigDict, fn: Callable[[str], str]
) -> None:
  """Applies a function to every path of a config, in place."""
  fields = flat(config)
  changed = map_paths(fn, fields)
  config.update_from_flattened_dict(
    {name: path for name, path in changed.items() if path != fields[name]}
  )


def adapter_kinds(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """Returns the kinds in `config.adapter.kind`, in the order of ADAPTERS."""
  kinds = str(config.adapter.kind).split("+")
  return tuple(kind for kind in ADAPTERS if kind in kinds)


def num_virtual(config: ml_collections.ConfigDict) -> int:
  """Returns how many positions of the context the adapters take."""
  kinds = adapter_kinds(config)
  return ("prefix" in kinds) * config.prefix.length + (
    "prompt" in kinds
  ) * config.prompt.length
