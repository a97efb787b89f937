"""Meta-training of SmolLM2-135M on short texts: minutes on a laptop.

  make metademo DATA=DIR

DIR has a folder of JSONL files for each task of the group "short"; without it
the rows come from the Hugging Face hub. The weights are those of the demo.
Bilevel-ZOFO and its baselines train in turn, each for about the same time; then
all adapt to the held-out tasks.
"""

from zofo_jax.builders import assets
from zofo_jax.config import defaults, files

# Steps, learning rate of first-order steps (on s, p or all weights), and of
# zeroth-order steps on theta. "guided" is Bilevel-ZOFO whose theta takes all of
# what the tasks' inner steps have changed.
METHODS = {
  "bilevel": (20, 2e-3, 1e-7),
  "peft": (60, 1e-3, 0.0),
  "full": (40, 1e-5, 0.0),
  "mezo": (60, 0.0, 1e-7),
  "guided": (24, 2e-3, 0.0),
}


def get_config(arg: str = ""):
  """Returns the config of `method=...,seed=...`."""
  args = files.parse_arg(arg, method="bilevel", seed="0")
  files.choose("method", args["method"], dict.fromkeys(METHODS, ""))
  num_steps, first_order, zeroth_order = METHODS[args["method"]]
  config = defaults.base_config()
  config.command = "metatrain"
  config.model.name = str(assets.smollm2())
  config.method = args["method"]
  config.seed = config.data.seed = int(args["seed"])
  config.meta.train = ("short",)
  config.meta.target = ("short",)
  config.meta.num_tasks = 2
  config.data.num_lower = 600
  config.data.num_upper = 300
  config.data.num_selection = 20
  config.data.num_test = 20
  config.data.max_length = 32
  config.data.long_rows = "truncate"
  config.eval.batch_size = 20
  config.loss = "classification"
  config.penalty = 1.0
  config.lower.num_steps = 1
  config.lower.learning_rate = first_order
  config.lower.schedule = "cosine"
  config.lower.batch_size = 4
  config.upper.learning_rate = 2e-3
  config.upper.schedule = "cosine"
  config.upper.batch_size = 4
  config.zo.learning_rate = zeroth_order
  config.train.num_steps = num_steps
  config.train.eval_every_steps = num_steps
  if config.method == "guided":
    config.method, config.zo.direction = "bilevel", "guided"
    config.lower.num_steps = 4
  config.adapt.shots = 8
  config.adapt.num_steps = 10
  config.adapt.learning_rate = 2e-3
  config.adapt.batch_size = 4
  config.icl.num_shots = 8
  return config
