"""Compares runs on one page: python -m zofo_jax.report RUN... --out PAGE."""

import argparse
import sys
from collections.abc import Sequence

from etils import epath

from zofo_jax import errors
from zofo_jax.report import html


def main(arguments: Sequence[str] | None = None) -> int:
  """Writes the page; returns the exit code."""
  parser = argparse.ArgumentParser(
    "python -m zofo_jax.report",
    description="Writes one HTML page on runs: results, configs, curves.",
  )
  parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
  parser.add_argument("--out", default="report.html", help="file to write")
  given = parser.parse_args(arguments)
  try:
    text = html.page(html.find(given.runs))
    path = epath.Path(given.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  except errors.UserError as error:
    print(f"zofo_jax: {error}", file=sys.stderr)
    return 2
  except OSError as error:
    print(
      f"zofo_jax: --out: '{given.out}' cannot be written ({error.strerror}).",
      file=sys.stderr,
    )
    return 2
  print(f"Wrote {given.out}.")
  return 0


if __name__ == "__main__":
  sys.exit(main())
