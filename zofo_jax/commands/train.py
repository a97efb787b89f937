"""Trains a run, or resumes it from its latest checkpoint.

zofo train --config=opt:size=125m,task=sst2 --workdir=runs/opt
"""

from collections.abc import Sequence

from zofo_jax.commands import arguments as arguments_lib


def main(arguments: Sequence[str]) -> None:
  """Runs the command."""
  arguments_lib.run_config(arguments, "train", __doc__)
