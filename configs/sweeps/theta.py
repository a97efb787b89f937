"""Radius and learning rate of theta, on SST-2.

  zofo sweep --sweep=sweeps/theta \
      --workdir=runs/sweep --jobs=2
"""

CONFIG = "llama:size=smollm2-135m,task=sst2"


def get_sweep():
  """Yields the fields of each run."""
  for eps in (1e-3, 1e-2):
    for learning_rate in (1e-8, 1e-7, 1e-6):
      yield {"zo.eps": eps, "zo.learning_rate": learning_rate}
