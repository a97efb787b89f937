"""Presets of a config: recipes of the paper's published runs.

The values that its code selected for each task with OPT-1.3B and OPT-13B, used
unchanged at both sizes. They were chosen with one learning rate for theta and
p, which leaves p almost untrained where that rate is small; see
`apply_preset`.
"""

from collections.abc import Mapping
from typing import NamedTuple

import ml_collections

from zofo_jax import errors
from zofo_jax.config import defaults, files


class Recipe(NamedTuple):
  """The values selected for one task.

  Attributes:
    learning_rate: of s, Adam.
    outer_learning_rate: of theta and p, Adam.
    penalty: lambda.
    num_inner_steps: T.
  """

  learning_rate: float
  outer_learning_rate: float
  penalty: float
  num_inner_steps: int


_LORA = {
  "boolq": Recipe(1e-4, 1e-4, 1e6, 30),
  "cb": Recipe(1e-3, 1e-5, 1e5, 30),
  "copa": Recipe(1e-4, 1e-7, 1e6, 30),
  "drop": Recipe(1e-6, 1e-4, 1.0, 10),
  "multirc": Recipe(1e-4, 1e-7, 1e3, 30),
  "rte": Recipe(1e-4, 1e-7, 1e4, 30),
  "record": Recipe(1e-5, 1e-6, 1e1, 30),
  "squad": Recipe(1e-4, 1e-7, 1e3, 30),
  "sst2": Recipe(1e-4, 1e-4, 1e4, 10),  # an earlier run, not the final sweep
  "wic": Recipe(1e-4, 1e-7, 1e6, 30),
  "wsc": Recipe(1e-5, 1e-7, 1e4, 30),
  "winogrande": Recipe(1e-4, 1e-8, 1e3, 30),
}
_PREFIX = {
  "boolq": Recipe(1e-2, 1e-4, 1e1, 30),
  "cb": Recipe(1e-2, 1e-8, 1e6, 30),
  "copa": Recipe(1e-3, 1e-8, 1e5, 30),
  "drop": Recipe(1e-2, 1e-6, 1e3, 30),
  "multirc": Recipe(1e-2, 1e-6, 1e2, 30),
  "rte": Recipe(1e-2, 1e-4, 1e1, 30),
  "record": Recipe(1e-4, 1e-7, 1e5, 30),
  "squad": Recipe(1e-2, 1e-7, 1e5, 30),
  "wic": Recipe(1e-2, 1e-7, 1e3, 30),
  "wsc": Recipe(1e-3, 1e-4, 1e3, 30),
  "winogrande": Recipe(1e-3, 1e-8, 1e2, 30),
}
_PROMPT = {
  "boolq": Recipe(1e-2, 1e-6, 1e4, 30),
  "cb": Recipe(1e-2, 1e-5, 1e1, 30),
  "copa": Recipe(1e-2, 1e-8, 1e4, 30),
  "drop": Recipe(1e-2, 1e-6, 1e3, 30),
  "multirc": Recipe(1e-2, 1e-7, 1e6, 30),
  "rte": Recipe(1e-2, 1e-6, 1e5, 30),
  "record": Recipe(1e-5, 1e-4, 1e6, 10),
  "squad": Recipe(1e-2, 1e-7, 1e4, 30),
  "wic": Recipe(1e-2, 1e-5, 1e3, 30),
  "wsc": Recipe(1e-4, 1e-7, 1e5, 30),
  "winogrande": Recipe(1e-3, 1e-4, 1e6, 20),
}
ADAPTERS = {"lora": _LORA, "prefix": _PREFIX, "prompt": _PROMPT}


def find(adapter: str, task: str) -> Recipe:
  """Returns the values selected for a task with one kind of adapter.

  The adapters were LoRA of rank 8 and alpha 16, prefixes of 5 positions and
  prompts of 10.

  Raises:
    UserError: the paper has no run of this adapter or task.
  """
  if adapter not in ADAPTERS:
    raise errors.UserError(
      f"preset=reference: the published runs have no adapter '{adapter}'; they "
      f"have {', '.join(ADAPTERS)}.{errors.nearest(adapter, ADAPTERS)}"
    )
  recipes = ADAPTERS[adapter]
  if task not in recipes:
    raise errors.UserError(
      f"preset=reference: the published runs have no task '{task}' with "
      f"{adapter}; they have {', '.join(recipes)}."
      f"{errors.nearest(task, recipes)}"
    )
  return recipes[task]


def apply_preset(config: ml_collections.ConfigDict, preset: str) -> None:
  """Applies a preset: `paper`, the defaults, or `reference`.

  `reference` makes the choices of the paper's PyTorch code: one-sided
  differences along one Gaussian direction, Adam on theta with the learning rate
  of p, the (lr, outer lr, lambda, T) selected for each task, and D_f for
  selection as well. Its defects are not reproduced: theta is not rounded by
  being perturbed in place, losses are averaged without dropout, and both p and
  s are scored.

  Args:
    config: changed in place.
    preset: name of the preset.

  Raises:
    errors.UserError: there is no such preset, or it has no values for the
      config's task or adapter.
  """
  files.choose("preset", preset, dict.fromkeys(("paper", "reference")))
  if preset == "paper":
    return
  recipe = find(config.adapter.kind, config.data.task)
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
  # 5,000 optimizer steps, counting those of s.
  config.train.num_steps = 5000 // recipe.num_inner_steps


def paper_config(
  arg: str, sizes: Mapping[str, str], size: str
) -> ml_collections.ConfigDict:
  """Returns the config of one of the paper's tasks with a family of models.

  Args:
    arg: `size=...,task=...,adapter=...,method=...,preset=...`, all optional.
    sizes: hub id of each size.
    size: the default size.

  Raises:
    errors.UserError: a part of `arg` is malformed or unknown.
  """
  args = files.parse_arg(
    arg,
    size=size,
    task="sst2",
    preset="paper",
    adapter="lora",
    method="bilevel",
  )
  config = defaults.base_config()
  config.model.name = files.choose("size", args["size"], sizes)
  config.data.task = args["task"]
  config.adapter.kind = args["adapter"]
  config.method = args["method"]
  apply_preset(config, args["preset"])
  return config


# MeZO on RoBERTa-large with 16 or 512 rows of a label: batches of 64, 100,000
# steps along one Gaussian direction, (learning rate, eps) by what is trained.
# All weights: the defaults of `medium_models/mezo.sh` in princeton-nlp/MeZO.
# Adapters: the middle one of the learning rates that its paper tried (Malladi
# et al., 2023, "Fine-tuning language models with just forward passes").
_MEZO_MASKED = {
  "full": (1e-6, 1e-3),
  "lora": (5e-5, 1e-3),
  "prefix": (5e-3, 1e-1),
}


# Tasks of two texts, whose rows are up to twice as long there.
_LONG_MASKED = ("mnli", "rte", "snli")


def masked_config(
  arg: str, sizes: Mapping[str, str], size: str
) -> ml_collections.ConfigDict:
  """Returns the config of a few-shot task with a masked language model.

  Args:
    arg: `size=...,task=...,shots=...,adapter=...,method=...`, all optional.
    sizes: hub id of each size.
    size: the default size.

  Raises:
    errors.UserError: a part of `arg` is malformed or unknown.
  """
  args = files.parse_arg(
    arg, size=size, task="sst2", shots="16", adapter="lora", method="mezo"
  )
  if not args["shots"].isdigit() or not int(args["shots"]):
    raise errors.UserError(
      f"shots={args['shots']}: expected how many rows of each label, 16 or 512."
    )
  config = defaults.base_config()
  config.model.name = files.choose("size", args["size"], sizes)
  config.data.task = args["task"]
  config.data.shots = int(args["shots"])
  config.data.max_length = 256 if args["task"] in _LONG_MASKED else 128
  config.data.long_rows = "truncate"
  config.adapter.kind = args["adapter"]
  config.method = args["method"]
  config.loss = "classification"
  if args["method"] in ("mezo", "mezo_peft"):
    trained = "full" if args["method"] == "mezo" else args["adapter"]
    if trained not in _MEZO_MASKED:
      raise errors.UserError(
        f"adapter={trained}: MeZO has values for a lora or a prefix."
      )
    config.zo.learning_rate, config.zo.eps = _MEZO_MASKED[trained]
    config.zo.direction = "gaussian"
    config.upper.batch_size = 64
    config.train.num_steps = 100_000
  return config
