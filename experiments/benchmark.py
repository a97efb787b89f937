"""Benchmarks zofo_jax against two forward passes and against PyTorch.

`python experiments/benchmark.py --json FILE` measures every field of FIELDS,
one program after the other in pairs (A B A B ...), and writes FILE after each
group. README.md describes the fields.
"""

import argparse
import gc
import importlib.util
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import rich.console
import rich.table
from bench import memory, timing, workload

from zofo_jax import errors


class Field(NamedTuple):
  """One number of the benchmark.

  Attributes:
    group: the function of GROUPS that measures it.
    reach: target; None for numbers that only explain others.
    at_most: whether the target is an upper bound; else it is a lower bound.
    torch: whether it needs torch.
  """

  group: str
  reach: float | None = None
  at_most: bool = True
  torch: bool = False


FIELDS = {
  "zo_over_two_forwards.rademacher": Field("zeroth_order", 1.05),
  "zo_over_two_forwards.low_rank": Field("zeroth_order", 1.08),
  "zo_over_two_forwards.gaussian": Field("zeroth_order", 1.25),
  "temp_over_params.step": Field("zeroth_order", 0.10),
  "temp_over_params.step.low_rank": Field("zeroth_order"),
  "temp_over_params.step.gaussian": Field("zeroth_order"),
  "torch_mezo_over_ours": Field("zeroth_order", 2.7, False, True),
  "torch_mezo_over_ours.gaussian": Field("zeroth_order", None, False, True),
  "torch_bilevel_over_ours.outer": Field("bilevel", 5.0, False, True),
  "torch_bilevel_over_ours.iteration": Field("bilevel", 3.0, False, True),
  "metatrain_over_single": Field("metatrain", 1.25),
  "guided_over_published": Field("guided", 1.05),
  "population_over_batch.low_rank": Field("population", 0.85, False),
  "population_over_batch.low_rank.rank_1": Field("population", 0.85, False),
  "population_over_batch.rademacher": Field("population", None, False),
  "temp_over_params.population": Field("population", 0.05),
  "temp_over_params.population.rank_1": Field("population", 0.05),
  "rss_over_params.bilevel": Field("rss", 2.0),
  "rss_over_params.torch": Field("rss_torch", None, torch=True),
  "evaluate_over_torch": Field("evaluate", 1.5, False, True),
  "evaluate_over_torch.one_forward": Field("evaluate", None, False, True),
}

Results = dict[str, dict[str, Any]]
# By kind of direction.
TEMP_OF = {
  "rademacher": "temp_over_params.step",
  "low_rank": "temp_over_params.step.low_rank",
  "gaussian": "temp_over_params.step.gaussian",
}
MEZO_OF = {
  "rademacher": "torch_mezo_over_ours",
  "gaussian": "torch_mezo_over_ours.gaussian",
}


class Wanted(NamedTuple):
  """What to measure: names of fields and the number of pairs."""

  names: list[str]
  repeats: int


def zeroth_order(work: workload.Work, wanted: Wanted) -> Iterator[Results]:
  """Times zeroth-order steps against two forward passes and MeZO's step."""
  from bench import steps

  kinds = tuple(
    kind
    for kind in steps.DIRECTIONS
    if any(
      name in wanted.names
      for name in (
        f"zo_over_two_forwards.{kind}",
        TEMP_OF[kind],
        MEZO_OF.get(kind),
      )
    )
  )
  side = steps.make_zo(work, kinds)
  for kind in kinds:
    extra = side.temp_bytes[kind] - side.temp_bytes["forward"]
    yield {TEMP_OF[kind]: timing.bytes_ratio(extra, side.base_bytes)}

  def two_forwards():
    side.forward()
    side.forward()

  for kind in kinds:
    name = f"zo_over_two_forwards.{kind}"
    if name in wanted.names:
      programs = {"step": side.steps[kind], "forwards": two_forwards}
      seconds = timing.timed_in_turn(programs, wanted.repeats)
      yield {name: timing.ratio(seconds["step"], seconds["forwards"])}

  compared = [kind for kind in MEZO_OF if MEZO_OF[kind] in wanted.names]
  if compared:
    from bench import theirs

    programs = {kind: side.steps[kind] for kind in compared}
    seconds = timing.timed_in_turn(
      {"torch": theirs.make_mezo(work), **programs}, wanted.repeats
    )
    for kind in compared:
      yield {MEZO_OF[kind]: timing.ratio(seconds["torch"], seconds[kind])}


def bilevel(work: workload.Work, wanted: Wanted) -> Iterator[Results]:
  """Times the reference's bilevel iteration in PyTorch against ours."""
  from bench import iterations, theirs

  torch_side = theirs.make_bilevel(work)
  our_side = iterations.make_bilevel(work)
  seconds = timing.timed_in_turn(
    {
      "torch_outer": torch_side.outer,
      "outer": our_side.outer,
      "torch_inner": torch_side.inner,
      "iteration": our_side.iteration,
    },
    wanted.repeats,
  )
  whole = [
    inner + outer
    for inner, outer in zip(
      seconds["torch_inner"], seconds["torch_outer"], strict=True
    )
  ]
  yield {
    "torch_bilevel_over_ours.outer": timing.ratio(
      seconds["torch_outer"], seconds["outer"]
    ),
    "torch_bilevel_over_ours.iteration": timing.ratio(
      whole, seconds["iteration"]
    ),
  }


def metatrain(work: workload.Work, wanted: Wanted) -> Iterator[Results]:
  """Times an iteration over tasks against one over as many rows of one task."""
  from bench import iterations

  sides = iterations.make_metatrain(work)._asdict()
  seconds = timing.timed_in_turn(sides, wanted.repeats)
  yield {
    "metatrain_over_single": timing.ratio(seconds["tasks"], seconds["single"])
  }


def guided(work: workload.Work, wanted: Wanted) -> Iterator[Results]:
  """Times an iteration whose theta follows s against the published one."""
  from bench import iterations

  sides = iterations.make_guided(work)._asdict()
  seconds = timing.timed_in_turn(sides, wanted.repeats)
  yield {
    "guided_over_published": timing.ratio(
      seconds["guided"], seconds["published"]
    )
  }


def population(work: workload.Work, wanted: Wanted) -> Iterator[Results]:
  """Times the answers of a population against as many of one model."""
  from bench import answers

  fields = {
    "low_rank": "temp_over_params.population",
    "low_rank.rank_1": "temp_over_params.population.rank_1",
    "rademacher": None,
  }
  kinds = tuple(
    kind
    for kind, temp in fields.items()
    if {f"population_over_batch.{kind}", temp} & {*wanted.names}
  )
  side = answers.make_population(work, kinds)
  for kind in kinds:
    if name := fields[kind]:
      extra = side.temp_bytes[kind] - side.temp_bytes["plain"]
      yield {name: timing.bytes_ratio(extra, side.base_bytes)}
  for kind in kinds:
    name = f"population_over_batch.{kind}"
    if name in wanted.names:
      programs = {"plain": side.plain, "members": side.members[kind]}
      seconds = timing.timed_in_turn(programs, wanted.repeats)
      yield {name: timing.ratio(seconds["plain"], seconds["members"])}


def _resident(side: str, work: workload.Work) -> dict[str, Any]:
  """Returns a run's peak minus a toy model's, and the backbone's bytes."""
  name = next(n for n, other in workload.WORKS.items() if other is work)
  whole, toy = memory.measure(side, name), memory.measure(side, name, "toy")
  return timing.bytes_ratio(
    whole["peak_bytes"] - toy["peak_bytes"], whole["base_bytes"]
  )


def rss(work: workload.Work, wanted: Wanted) -> Iterator[Results]:
  """Measures the resident memory of our bilevel run."""
  del wanted  # a peak is measured once
  yield {"rss_over_params.bilevel": _resident("ours", work)}


def rss_torch(work: workload.Work, wanted: Wanted) -> Iterator[Results]:
  """Measures the resident memory of PyTorch's bilevel run."""
  del wanted
  yield {"rss_over_params.torch": _resident("theirs", work)}


def evaluate(work: workload.Work, wanted: Wanted) -> Iterator[Results]:
  """Times the scoring of rows in PyTorch against ours."""
  from bench import answers, theirs

  torch_side = theirs.make_evaluation(work)
  seconds = timing.timed_in_turn(
    {
      "by_option": torch_side.by_option,
      "ours": answers.make_evaluation(work),
      "by_row": torch_side.by_row,
    },
    wanted.repeats,
  )
  yield {
    "evaluate_over_torch": timing.ratio(seconds["by_option"], seconds["ours"]),
    "evaluate_over_torch.one_forward": timing.ratio(
      seconds["by_row"], seconds["ours"]
    ),
  }


GROUPS = {
  "zeroth_order": zeroth_order,
  "bilevel": bilevel,
  "metatrain": metatrain,
  "population": population,
  "guided": guided,
  "rss": rss,
  "rss_torch": rss_torch,
  "evaluate": evaluate,
}


def print_table(results: Results) -> None:
  """Prints the results and their targets."""
  table = rich.table.Table()
  for column in ("field", "reach", "reached", "least", "most", "A", "B", "n"):
    table.add_column(column, justify="left" if column == "field" else "right")
  for name, measured in results.items():
    field = FIELDS[name]
    target, colour = "", None
    if field.reach is not None:
      target = f"{'≤' if field.at_most else '≥'} {field.reach:g}"
      met = (measured["ratio"] <= field.reach) == field.at_most
      colour = "green" if met or measured["ratio"] == field.reach else "red"
    if "a_seconds" in measured:
      sides = [f"{measured[f'{side}_seconds']:.3f} s" for side in "ab"]
    else:
      sides = [f"{measured[f'{side}_bytes'] / 1e6:.0f} MB" for side in "ab"]
    numbers = [f"{measured[n]:.3f}" for n in ("ratio", "min", "max")]
    table.add_row(
      name, target, *numbers, *sides, str(measured["pairs"]), style=colour
    )
  rich.console.Console().print(table)


def _parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--json", type=pathlib.Path, required=True)
  parser.add_argument("--only", default="", help="fields, by commas")
  parser.add_argument("--repeats", type=int, default=5, help="pairs")
  parser.add_argument(
    "--work",
    choices=workload.WORKS,
    default="full",
    help="sizes: large for a GPU, tiny to try the benchmark itself out",
  )
  args = parser.parse_args()
  args.only = [name for name in args.only.split(",") if name]
  for name in args.only:
    if name not in FIELDS:
      parser.error(
        f"--only: no field '{name}'; expected some of {', '.join(FIELDS)}."
        f"{errors.nearest(name, FIELDS)}"
      )
  if args.repeats < 1:
    parser.error(f"--repeats is {args.repeats}; expected at least 1.")
  if not args.json.absolute().parent.is_dir():
    parser.error(f"--json: no folder '{args.json.parent}'.")
  return args


def main() -> None:
  """Measures the requested fields."""
  args = _parse()
  work = workload.WORKS[args.work]
  wanted = args.only or list(FIELDS)
  has_torch = importlib.util.find_spec("torch") is not None
  left_out = [name for name in wanted if FIELDS[name].torch and not has_torch]
  if left_out:
    print(f"Left out, since torch is not installed: {', '.join(left_out)}.")
    wanted = [name for name in wanted if name not in left_out]
  if any(FIELDS[name].torch for name in wanted):
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    # Both frameworks share one GPU; neither may preallocate its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  results: Results = {}
  about = {"machine": timing.machine(), "versions": timing.versions()}
  for group, measure in GROUPS.items():
    if not any(FIELDS[name].group == group for name in wanted):
      continue
    for measured in measure(work, Wanted(wanted, args.repeats)):
      results |= {name: measured[name] for name in measured if name in wanted}
      args.json.write_text(json.dumps({**results, **about}, indent=2) + "\n")
    gc.collect()
  print_table(results)


if __name__ == "__main__":
  main()
