"""Trains one backbone on many tasks.

zofo metatrain --config=metatrain:group=sentiment --workdir=runs/meta
"""

from collections.abc import Sequence

import ml_collections

from zofo_jax.commands import arguments as arguments_lib


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Runs the command on a config."""
  from zofo_jax.training.meta import train  # takes seconds

  train.metatrain(config, workdir)


def main(arguments: Sequence[str]) -> None:
  """Runs the command."""
  arguments_lib.run_config(arguments, "metatrain", __doc__)
