"""Trains a run, or resumes it from its latest checkpoint.

zofo train --config=opt:size=125m,task=sst2 --workdir=runs/opt
"""

from collections.abc import Sequence

import ml_collections

from zofo_jax.commands import arguments as arguments_lib


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Runs the command on a config."""
  from zofo_jax.training import train  # takes seconds

  train.train(config, workdir)


def main(arguments: Sequence[str]) -> None:
  """Runs the command."""
  arguments_lib.run_config(arguments, "train", __doc__)
