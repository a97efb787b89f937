"""Hyper-parameters of the paper's published runs (OPT-1.3B and OPT-13B).

The values its code selected for each task, used unchanged at both sizes. They
were chosen with one learning rate for theta and p, which leaves p almost
untrained where that rate is small; see `config.apply_preset`.
"""

from typing import NamedTuple

from zofo_jax import errors


class Recipe(NamedTuple):
  """Selected values of one task.

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


def lora(task: str) -> Recipe:
  """Returns the selected values of a task with LoRA (rank 8, alpha 16)."""
  if task not in _LORA:
    raise errors.UserError(
      f"preset=reference: the published runs have no task '{task}'; they "
      f"have {', '.join(_LORA)}.{errors.nearest(task, _LORA)}"
    )
  return _LORA[task]
