"""Optax transformations of a run, by name."""

import optax


def make_schedule(
  name: str, learning_rate: float, num_updates: int
) -> optax.ScalarOrSchedule:
  """Makes a learning rate: constant, or decaying to 0 over all updates."""
  if name == "linear":
    return optax.linear_schedule(learning_rate, 0.0, num_updates)
  if name == "cosine":
    return optax.cosine_decay_schedule(learning_rate, num_updates)
  return learning_rate


def make_optimizer(
  name: str, learning_rate: optax.ScalarOrSchedule, clip_norm: float = 0.0
) -> optax.GradientTransformation:
  """Makes an optax transformation whose learning rate lives in its state.

  Args:
    name: one of `defaults.OPTIMIZERS`.
    learning_rate: a number, traced, so that it can change freely, or a
      schedule.
    clip_norm: largest global norm of the gradient; 0 for no limit.

  Returns:
    The transformation.
  """
  factory = {
    "sgd": optax.sgd,
    "momentum": lambda learning_rate: optax.sgd(learning_rate, momentum=0.9),
    "adam": optax.adam,
    "adamw": optax.adamw,
  }[name]
  tx = optax.inject_hyperparams(factory)(learning_rate=learning_rate)
  if clip_norm:
    tx = optax.chain(optax.clip_by_global_norm(clip_norm), tx)
  return tx
