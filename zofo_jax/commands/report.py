"""Compares runs on one HTML page: results, configs, curves.

zofo report runs/opt runs/rte --out=report.html
"""

from collections.abc import Sequence

from etils import epath

from zofo_jax import errors
from zofo_jax.commands import arguments as arguments_lib
from zofo_jax.report import html


def main(arguments: Sequence[str]) -> None:
  """Runs the command."""
  parser = arguments_lib.make_parser("report", __doc__)
  parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
  parser.add_argument("--out", default="report.html", help="file to write")
  options = parser.parse(arguments)
  text = html.page(html.find(options.runs))
  path = epath.Path(options.out)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  except OSError as error:
    raise errors.UserError(
      f"--out: '{options.out}' cannot be written ({error.strerror})."
    ) from error
  print(f"Wrote {options.out}.")
