"""The training methods, as data: what each of them updates, and how."""

from typing import NamedTuple


class Method(NamedTuple):
  """One training method.

  Attributes:
    updates_base: whether it updates the backbone theta.
    updates_adapter: whether it trains an adapter; without, there is none.
    zeroth_order: whether any of its steps uses forward passes alone.
    over_tasks: whether it can train on many tasks at once.
    by_reward: whether it follows the rewards of generated text alone.
  """

  updates_base: bool
  updates_adapter: bool
  zeroth_order: bool
  over_tasks: bool = False
  by_reward: bool = False


METHODS = {
  # Bilevel-ZOFO: zeroth-order steps on the backbone, gradients for adapters.
  "bilevel": Method(True, True, True, over_tasks=True),
  # Gradients: an adapter, or all weights.
  "peft": Method(False, True, False, over_tasks=True),
  "full": Method(True, False, False, over_tasks=True),
  # Zeroth order (MeZO): all weights, or an adapter.
  "mezo": Method(True, False, True, over_tasks=True),
  "mezo_peft": Method(False, True, True),
  # Evolution strategies: all weights, or an adapter, by rewards.
  "es": Method(True, False, True, by_reward=True),
  "es_peft": Method(False, True, True, by_reward=True),
  # Two stages.
  "peft_then_mezo": Method(True, True, True),
  "mezo_then_peft": Method(True, True, True),
}
OVER_TASKS = tuple(name for name, m in METHODS.items() if m.over_tasks)


def uses_reward(method: str, objective: str) -> bool:
  """Returns whether a run is trained by rewards.

  Args:
    method: one of METHODS.
    objective: `zo.objective`.
  """
  return METHODS[method].by_reward or objective == "reward"
