"""Checks of the fields by which a run is trained by rewards."""

from collections.abc import Mapping
from typing import Any

from zofo_jax import errors
from zofo_jax.config import methods

# The built-in reward functions, and the field that each needs, if any.
BUILT_IN = {
  "exact_match": "",
  "token_f1": "",
  "number": "",
  "regex": "reward.pattern",
  "json": "",
  "length": "reward.max_words",
  "rouge_l": "",
}


def check(fields: Mapping[str, Any]) -> None:
  """Checks that rewards have all that they need, and that they are used.

  Args:
    fields: dotted names and values.

  Raises:
    errors.UserError: names the field, what was found and what was expected.
  """
  method, functions = fields["method"], fields["reward.functions"]
  if not methods.uses_reward(method, fields["zo.objective"]):
    if functions:
      raise errors.UserError(
        "config.reward.functions: only methods 'es' and 'es_peft' and "
        "zo.objective 'reward' take rewards; expected one of these, or no "
        f"functions; found method '{method}' and zo.objective "
        f"'{fields['zo.objective']}'."
      )
    return
  _check_use(fields, method)
  _check_functions(fields, functions)


def _check_use(fields: Mapping[str, Any], method: str) -> None:
  """Checks that the method and the step can follow rewards."""
  if method != "bilevel" and not methods.METHODS[method].by_reward:
    raise errors.UserError(
      "config.zo.objective: 'reward' goes with method 'bilevel'; expected "
      f"method 'es' for rewards alone; found '{method}'."
    )
  if fields["zo.objective"] not in ("loss", "reward"):
    raise errors.UserError(
      f"config.zo.objective: method '{method}' follows rewards; expected "
      f"'reward'; found '{fields['zo.objective']}'."
    )
  if fields["command"] == "metatrain":
    raise errors.UserError(
      "config.zo.objective: rewards are of one task; expected 'loss' with "
      "command 'metatrain'; found 'reward'."
    )
  if fields["zo.estimator"] != "central":
    raise errors.UserError(
      "config.zo.estimator: rewards are compared in pairs on both sides of "
      f"theta; expected 'central'; found '{fields['zo.estimator']}'."
    )
  if fields["zo.optimizer"] == "conservative":
    raise errors.UserError(
      "config.zo.optimizer: 'conservative' evaluates a loss inside the step; "
      "expected another with rewards."
    )
  if "per_example" in (fields["zo.direction"], fields["guided.random"]):
    raise errors.UserError(
      "config.zo.direction: members of a population have a direction each; "
      "expected another than 'per_example' with rewards."
    )
  if fields["train.max_loss_ratio"] and methods.METHODS[method].by_reward:
    raise errors.UserError(
      "config.train.max_loss_ratio: a ratio of losses, and there are rewards "
      f"alone; expected 0; found {fields['train.max_loss_ratio']}."
    )
  if fields["zo.direction"] == "guided" and not fields["guided.random"]:
    raise errors.UserError(
      "config.guided.random: the lengths of guided steps follow the loss; "
      "expected random directions, which follow the reward, as 'low_rank'; "
      "found ''."
    )


def _check_functions(
  fields: Mapping[str, Any], functions: tuple[str, ...]
) -> None:
  """Checks the names of the functions and the fields that they read."""
  if not functions:
    raise errors.UserError(
      "config.reward.functions: expected some of "
      f"{', '.join(BUILT_IN)}, or MODULE:FUNCTION, as ('exact_match',); found "
      "nothing."
    )
  for name in functions:
    if ":" not in name and name not in BUILT_IN:
      raise errors.UserError(
        f"config.reward.functions: expected some of {', '.join(BUILT_IN)}, or "
        f"MODULE:FUNCTION; found '{name}'.{errors.nearest(name, BUILT_IN)}"
      )
    needed = BUILT_IN.get(name)
    if needed and not fields[needed]:
      raise errors.UserError(
        f"config.{needed}: expected a value, which '{name}' of "
        f"reward.functions needs; found {fields[needed]!r}."
      )
  if fields["reward.weights"] and len(fields["reward.weights"]) != len(
    functions
  ):
    raise errors.UserError(
      "config.reward.weights: expected one for each of "
      f"{len(functions)} reward.functions; found "
      f"{len(fields['reward.weights'])}."
    )
