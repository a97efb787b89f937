"""Tables on the terminal; of several processes only the first prints."""

from collections.abc import Mapping, Sequence
from typing import IO, Any

import numpy as np

from zofo_jax.sharding import multihost


def results_table(
  rows: Sequence[Mapping[str, Any]],
  *,
  title: str | None = None,
  stream: IO[str] | None = None,
) -> None:
  """Prints a table whose columns are the names in the rows.

  Args:
    rows: one mapping per row; missing names are left blank. Numbers with
      a fraction get three digits after the point, those of a tuple as well.
    title: printed above.
    stream: where to write; None for standard output.
  """
  if not multihost.is_primary():
    return
  from rich import console, table  # not needed by a run in a pod

  names = list(dict.fromkeys(name for row in rows for name in row))
  numeric = (int, float, np.number)
  grid = table.Table(title=title, title_justify="left")
  for name in names:
    right = any(isinstance(row.get(name), numeric) for row in rows)
    grid.add_column(name, justify="right" if right else "left")
  for row in rows:
    grid.add_row(*(_cell(row.get(name, "")) for name in names))
  console.Console(file=stream).print(grid, markup=False, highlight=False)


def _cell(value: Any) -> str:
  if isinstance(value, float | np.floating):
    return f"{value:.3f}"
  if isinstance(value, tuple):  # an interval
    return " to ".join(map(_cell, value))
  return str(value)
