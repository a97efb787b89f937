"""Compares runs on one HTML page: results, configs, curves.

zofo report runs/opt runs/rte --out=report.html
"""

from collections.abc import Sequence

from etils import epath

from zofo_jax import report
from zofo_jax.commands import arguments as arguments_lib
from zofo_jax.config import paths
from zofo_jax.report import html


def main(arguments: Sequence[str]) -> None:
  """Runs the command."""
  parser = arguments_lib.make_parser("report", __doc__)
  parser.add_argument(
    "runs",
    nargs="+",
    metavar="RUN",
    type=paths.expand,
    help="folders of runs",
  )
  parser.add_argument(
    "--out",
    default="report.html",
    type=paths.expand,
    help="file to write",
  )
  options = parser.parse(arguments)
  runs = html.find(options.runs)
  report.check_output(options.out, "--out")
  epath.Path(options.out).write_text(html.page(runs))
  print(f"Wrote {options.out}.")
