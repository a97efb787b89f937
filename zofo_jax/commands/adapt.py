"""Tunes adapters for new tasks from a few rows, and tests them.

zofo adapt --config=adapt:run=runs/meta --workdir=runs/adapt
"""

from collections.abc import Sequence

from zofo_jax.commands import arguments as arguments_lib


def main(arguments: Sequence[str]) -> None:
  """Runs the command."""
  arguments_lib.run_config(arguments, "adapt", __doc__)
