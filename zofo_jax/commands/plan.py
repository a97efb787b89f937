"""Plans a run: whether it fits, on how few chips, at what cost.

Needs neither the devices nor the weights.

  zofo plan --config=llama:size=70b --topology=v5p:4x4x4 --json=PLAN.json
"""

from collections.abc import Sequence

from zofo_jax import errors, report
from zofo_jax.commands import arguments as arguments_lib
from zofo_jax.config import paths, show


def main(arguments: Sequence[str]) -> None:
  """Runs the command."""
  parser = arguments_lib.make_parser("plan", __doc__)
  arguments_lib.add_config(parser)
  parser.add_argument("--topology", help="devices, such as v5e:4x4 or h100:8")
  parser.add_argument(
    "--json",
    metavar="FILE",
    type=paths.expand,
    help="file to write figures to",
  )
  options, config = arguments_lib.parse_config(parser, arguments)
  config = arguments_lib.require(config, *arguments_lib.NEEDED_CONFIG)
  if options.print_config:
    show.print_config(config)
    return
  if not options.topology:
    raise errors.UserError(
      "--topology: expected devices such as v5e:4x4, cpu:8 or h100:8; found "
      "nothing."
    )
  if options.json:
    report.check_output(options.json, "--json")
  from zofo_jax.plan import planner  # takes seconds

  planner.plan(config, options.topology, options.json)
