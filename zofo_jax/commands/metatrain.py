"""Trains one backbone on many tasks.

zofo metatrain --config=metatrain:group=sentiment --workdir=runs/meta
"""

from collections.abc import Sequence

from zofo_jax.commands import arguments as arguments_lib


def main(arguments: Sequence[str]) -> None:
  """Runs the command."""
  arguments_lib.run_config(arguments, "metatrain", __doc__)
