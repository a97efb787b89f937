"""The passes of an iteration."""

from zofo_jax.builders import budget
from zofo_jax.config import defaults


def test_passes_of_every_estimator():
  config = defaults.base_config()
  config.lower.num_steps = 5
  config.zo.num_directions = 3
  counted = {}
  for config.zo.estimator in defaults.FIELDS["zo.estimator"].check.choices:
    counted[config.zo.estimator] = budget.make_budget(config).passes()[:2]
  assert counted == {
    "central": (5 + 2 + 3 * 6, 7),
    "forward": (5 + 2 + 3 * 4, 7),
    "exact": (5 + 2 + 3 * 6, 7),
  }
