"""What a run leaves for people: metrics as JSON lines, tables, pictures.

`python -m zofo_jax.report RUN...` compares runs on one page.
"""

from zofo_jax.report.curves import plot_curves
from zofo_jax.report.jsonl import (
  JsonlWriter,
  read_jsonl,
  write_json,
  write_lines,
)
from zofo_jax.report.tables import results_table

__all__ = [
  "JsonlWriter",
  "plot_curves",
  "read_jsonl",
  "results_table",
  "write_json",
  "write_lines",
]
