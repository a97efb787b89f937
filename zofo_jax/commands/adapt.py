"""Tunes adapters for new tasks from a few rows, and tests them.

zofo adapt --config=adapt:run=runs/meta --workdir=runs/adapt
"""

from collections.abc import Sequence

import ml_collections

from zofo_jax.commands import arguments as arguments_lib


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Runs the command on a config."""
  from zofo_jax.training.meta import adapt  # takes seconds

  adapt.adapt(config, workdir)


def main(arguments: Sequence[str]) -> None:
  """Runs the command."""
  arguments_lib.run_config(arguments, "adapt", __doc__)
