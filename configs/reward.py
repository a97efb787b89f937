"""SmolLM2-135M by scores instead of losses, on one of three tasks.

  zofo train --config=reward --workdir=runs/reward
  zofo train --config=reward:task=squad --config.data.dir=DIR --workdir=runs/f1
  zofo train --config=reward:task=financial --config.data.dir=DIR \
      --workdir=runs/macro

`words`: answers of one word have the reward 1, others 0; no answer is shown.
`squad`: adapters learn the rows' answers, and θ follows the token F1 of what is
written. `financial`: adapters learn labels of which one has an eighth of the
rows, and θ follows the macro F1 of a batch. With outer=loss the last two have
the loss in that place; with outer=none they are an adapter's gradient steps
alone, of as many forward-equivalents. Your own reward:
--config.reward.functions="('my_rewards:reward',)".

A run takes minutes on two cores: rows are short, and of θ only the scales of
the last norm move, 576 numbers, of which a few directions say much. On an
accelerator, clear zo.select, lower zo.eps and the rate, and use more rows. The
rates of `squad` and `financial` are not tuned.
"""

from zofo_jax.builders import assets, budget
from zofo_jax.config import defaults, files

# Forward-equivalents of a run, in rows.
ROWS = {"squad": 1_200, "financial": 3_000}
OUTER = {"words": "reward", "squad": "reward", "financial": "macro_f1"}


def get_config(arg: str = ""):
  """Returns the config of `task=...,outer=...,seed=...`."""
  args = files.parse_arg(arg, task="words", outer="", seed="0")
  task, config = args["task"], defaults.base_config()
  files.choose("task", task, dict.fromkeys(OUTER, ""))
  config.model.name = str(assets.smollm2())
  config.seed = config.data.seed = int(args["seed"])
  outer = args["outer"] or OUTER[task]
  others = ("loss", "none") if task != "words" else ()
  files.choose("outer", outer, dict.fromkeys((OUTER[task], *others), ""))
  if task == "words":
    _words(config)
  else:
    _bilevel(config, task, outer)
  return config


def _words(config):
  """Sets the fields of a run by a reward alone."""
  config.method = "es"
  config.data.task = "one_word"
  config.data.dir = str(assets.movie_reviews())
  config.data.prompt = "{text}\nOne word for this film:"
  config.data.label = ""  # no answer is shown
  config.data.num_upper = 200
  config.data.num_selection = 64
  config.data.num_test = 200
  config.data.max_length = 22
  config.data.long_rows = "drop"
  config.generate.max_new_tokens = 4
  config.eval.batch_size = 64
  config.reward.functions = ("regex",)
  config.reward.pattern = r"^\w+\.?$"
  config.reward.temperature = 1.0
  config.upper.batch_size = 4
  _move_last_norm(config, 8)
  config.zo.learning_rate = 0.1
  config.train.num_steps = 60
  config.train.eval_every_steps = 20


def _bilevel(config, task, outer):
  """Sets the fields of a run whose adapters learn by gradients."""
  config.data.task = {"financial": "financial_phrasebank"}.get(task, task)
  config.data.num_lower, config.data.num_upper = 400, 200
  config.data.num_selection, config.data.num_test = 32, 100
  config.data.max_length = {"squad": 96, "financial": 48}[task]
  config.data.long_rows = "drop"
  config.generate.max_new_tokens = 12
  config.eval.batch_size = 64
  config.loss = "likelihood" if task == "squad" else "classification"
  config.penalty = 1.0
  config.lower.learning_rate = config.upper.learning_rate = 4e-3
  config.lower.schedule = config.upper.schedule = "cosine"
  config.lower.num_steps, config.lower.batch_size = 10, 4
  config.upper.batch_size = {"squad": 4, "financial": 24}[task]
  _move_last_norm(config, {"squad": 4, "financial": 2}[task])
  config.zo.learning_rate = {"reward": 0.03, "none": 0.0}.get(outer, 0.3)
  if outer == "none":  # learns from D_f as well
    config.method = "peft"
    config.lower.num_steps, config.lower.batch_size = 1, 8
  elif outer == "reward":
    config.reward.functions = ("token_f1",)
    config.reward.temperature = 1.0
  if outer != "none":
    config.zo.objective, config.keep = outer, "s"
  passes = budget.make_budget(config).passes()
  steps = max(1, ROWS[task] // passes.forward_equivalents)
  config.train.num_steps = steps
  config.train.eval_every_steps = -(-steps // 2)


def _move_last_norm(config, num_directions):
  """Lets the scales of the last norm follow the scores, all members at once."""
  config.zo.select = "^norm"
  config.zo.direction = "gaussian"
  config.zo.num_directions = num_directions
  config.reward.directions_at_once = num_directions
  config.zo.eps = 0.2
