"""SmolLM2-135M by a reward: 1 for an answer of one word, 0 for any other.

  zofo train --config=reward --workdir=runs/reward

θ follows the reward by evolution strategies; no answer is shown. At the start
about a quarter of the answers have one word; the learning rate is not tuned.
Weights and rows are those of configs/demo.py. Your own reward:
--config.reward.functions="('my_rewards:reward',)".
"""

from zofo_jax.builders import assets
from zofo_jax.config import defaults


def get_config():
  """Returns the config of a run by a reward."""
  config = defaults.base_config()
  config.method = "es"
  config.model.name = str(assets.smollm2())
  config.data.task = "one_word"
  config.data.dir = str(assets.movie_reviews())
  config.data.prompt = "{text}\nOne word for this film:"
  config.data.label = ""  # no answer is shown
  config.data.num_selection = 32
  config.data.num_test = 100
  config.data.max_length = 64
  config.data.long_rows = "truncate"
  config.generate.max_new_tokens = 8
  config.reward.functions = ("regex",)
  config.reward.pattern = r"^\w+\.?$"
  config.reward.temperature = 1.0
  config.upper.batch_size = 8
  config.zo.direction = "low_rank"
  config.zo.rank = 1
  config.zo.num_directions = 8
  config.zo.eps = 1e-2
  config.zo.learning_rate = 1e-4
  config.train.num_steps = 60
  config.train.eval_every_steps = 20
  return config
