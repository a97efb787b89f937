"""Bilevel-ZOFO and its baselines on one task, with equal compute.

  zofo train --config=compare:task=sst2,method=mezo --config.data.dir=DIR

`python experiments/single_task.py` makes the whole table; its results are in
experiments/README.md. The compute of a run is counted in forward-equivalents
(`zofo_jax.builders.budget`) and is the same for every method; tasks with long
rows use fewer of them, so that it is also the same in tokens. `size=opt-1.3b`
is the same comparison on an accelerator, with the compute of the paper's runs;
`size=smollm2-135m-long` has ten times that of a laptop.

The learning rates of `bilevel`, `peft`, `mezo` and `bilevel_all20` were chosen
on selection rows of seed 100, by nine trials each on SST-2 and some on COPA and
TREC, and those of longer runs by three; those of the other methods follow from
them or are common values.
"""

from typing import NamedTuple

from zofo_jax.builders import assets, budget
from zofo_jax.config import defaults, files


class Size(NamedTuple):
  """A model and the compute of a run.

  Attributes:
    name: hub id; None for SmolLM2-135M, which `zofo assets` makes.
    rows: forward-equivalents of a run, of rows of up to 40 tokens.
    batch_size: rows of a batch.
    counts: rows of D_p and D_f, to select by and to test on.
    rates: entries of RATES that differ for runs of this length.
  """

  name: str | None
  rows: int
  batch_size: int
  counts: tuple[int, int, int, int]
  rates: dict[str, tuple[float, float, float]]


LONG = {
  "bilevel": (1e-3, 1e-6, 1e-3),
  "peft": (2e-3, 0.0, 1e-3),
  "mezo": (0.0, 1e-5, 1e-3),
  "bilevel_all": (2e-3, 0.0, 1e-3),
  "bilevel_guided": (2e-3, 0.0, 1e-3),
}
SIZES = {
  "smollm2-135m": Size(None, 960, 8, (400, 200, 64, 200), {}),
  "smollm2-135m-long": Size(None, 9_600, 8, (666, 334, 200, 500), LONG),
  "opt-1.3b": Size(
    "facebook/opt-1.3b", 400_000, 16, (666, 334, 500, 1000), LONG
  ),
}

# Longest training rows in tokens; longer ones are left out.
LENGTHS = {
  **{"sst2": 40, "copa": 24, "trec": 32, "wic": 48, "cb": 80, "rte": 80},
  **{"subj": 48, "emotion": 40, "ag_news": 80},
}

# Learning rates of first-order steps (on an adapter or on all weights) and of
# zeroth-order steps, and the radius of the latter.
RATES = {
  "bilevel": (4e-3, 1e-6, 1e-3),
  "bilevel_pooled": (4e-3, 1e-6, 1e-3),
  "bilevel_still": (4e-3, 0.0, 1e-3),  # theta stays fixed
  "bilevel_scaled": (4e-3, 1e-3, 1e-3),  # steps of one length
  # Theta follows s; see GUIDED.
  "bilevel_guided": (4e-3, 0.0, 1e-3),
  "bilevel_all": (4e-3, 0.0, 1e-3),
  "bilevel_all20": (4e-3, 0.0, 1e-3),
  "bilevel_matrices": (4e-3, 0.0, 1e-3),
  "bilevel_history": (4e-3, 0.0, 1e-3),
  "bilevel_metric": (4e-3, 0.0, 1e-3),
  "bilevel_mixed": (4e-3, 1e-6, 1e-3),
  "peft": (4e-3, 0.0, 1e-3),
  "full": (2e-5, 0.0, 1e-3),
  "mezo": (0.0, 3e-5, 1e-3),
  "mezo_scaled": (0.0, 1e-3, 1e-3),
  "mezo_peft": (0.0, 1e-3, 1e-2),
  "peft_then_mezo": (4e-3, 3e-5, 1e-3),
  "mezo_then_peft": (4e-3, 3e-5, 1e-3),
}

# Steps of theta along what s has learned: the length by a parabola, and its
# controls: always all of it, also with T = 20, a length for each matrix, or for
# each of the last three displacements, by accuracy instead of the loss, and a
# random direction in addition.
_PARABOLA = {"guided.lengths": "parabola", "guided.penalty": True}
_ALL = {"guided.lengths": "all"}
_DESCEND = {
  "guided.lengths": "descend",
  "guided.largest": 2.0,
  "guided.num_updates": 1,
  "guided.batch_size": 16,
  "zo.num_directions": 2,
}
GUIDED = {
  "guided": _PARABOLA,
  "all": _ALL,
  "all20": _ALL | {"lower.num_steps": 20},
  "matrices": _DESCEND,
  "history": _DESCEND | {"guided.per_matrix": False, "guided.history": 3},
  "metric": _PARABOLA | {"zo.objective": "accuracy"},
  "mixed": _ALL | {"guided.random": "rademacher"},
}

VARIANTS = ("pooled", "still", "scaled", *GUIDED)  # of methods of the trainer


def get_config(arg: str = ""):
  """Returns the config of `task=...,method=...,adapter=...,seed=...` and more.

  `template` is the version of the task's prompt; `shots`, if not 0, the rows of
  each label at each level.
  """
  args = files.parse_arg(
    arg,
    size="smollm2-135m",
    task="sst2",
    method="bilevel",
    adapter="lora",
    seed="0",
    template="0",
    shots="0",
  )
  for name, table in (("size", SIZES), ("method", RATES)):
    files.choose(name, args[name], dict.fromkeys(table, ""))
  size, method = SIZES[args["size"]], args["method"]
  first_order, zeroth_order, eps = (RATES | size.rates)[method]
  config = defaults.base_config()
  config.model.name = size.name or str(assets.smollm2())
  kind, _, variant = method.partition("_")
  config.method = kind if variant in VARIANTS else method
  config.adapter.kind = args["adapter"]
  config.seed = config.data.seed = int(args["seed"])
  config.data.task = args["task"]
  config.data.template = int(args["template"])
  config.data.shots = int(args["shots"])
  config.data.pooled = variant == "pooled"
  config.zo.scaling = "running_rms" if variant == "scaled" else "none"
  for name, count in zip(
    ("lower", "upper", "selection", "test"), size.counts, strict=True
  ):
    config.data[f"num_{name}"] = count
  config.data.max_length = LENGTHS.get(args["task"], 128)
  config.data.long_rows = "drop"
  if args["task"] not in ("copa", "record", "squad", "drop"):  # as MeZO
    config.loss = "classification"
  config.penalty = 1.0
  config.lower.num_steps = 1
  config.lower.batch_size = size.batch_size
  config.upper.batch_size = size.batch_size
  config.lower.learning_rate = config.upper.learning_rate = first_order
  config.lower.schedule = config.upper.schedule = "cosine"
  if config.method == "bilevel":
    # As in the paper's runs, where T is 10 or more and s is tested.
    config.keep = "s"
    config.lower.num_steps = 10
    config.lower.batch_size = config.upper.batch_size = size.batch_size // 2
    if variant in GUIDED:
      config.zo.direction = "guided"
      config.update_from_flattened_dict(GUIDED[variant])
  elif "mezo" in config.method:
    config.upper.batch_size = 2 * size.batch_size
  config.zo.learning_rate = zeroth_order
  config.zo.eps = eps
  _spend(config, size.rows * 40 // max(40, config.data.max_length))
  return config


def _spend(config, rows: int) -> None:
  """Sets the number of steps from the compute; each stage has half of it."""
  first, _, second = config.method.partition("_then_")
  share = rows // 2 if second else rows
  steps = [
    max(
      1, share // budget.make_budget(config).passes(method).forward_equivalents
    )
    for method in filter(None, (first, second))
  ]
  config.train.num_steps = sum(steps)
  config.train.num_first_steps = steps[0]
  config.train.eval_every_steps = max(1, round(sum(steps) / 8))
