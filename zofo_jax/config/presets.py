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
  """Returns the selected values of a task with one kind of adapter.

  LoRA of rank 8 and alpha 16, a prefix of 5 and a prompt of 10 positions.

  Raises:
    UserError: there was no such adapter or task.
  """
  if adapter not in ADAPTERS:
    raise errors.UserError(
      f"preset=reference: the published runs have no adapter '{adapter}'; they "
      f"have {', '.join(ADAPTERS)}.{errors.nearest(adapter, ADAPTERS)}"
    )
  found = ADAPTERS[adapter]
  if task not in found:
    raise errors.UserError(
      f"preset=reference: the published runs have no task '{task}' with "
      f"{adapter}; they have {', '.join(found)}.{errors.nearest(task, found)}"
    )
  return found[task]
