"""Files, tables, pictures and displays for people to read.

`python -m zofo_jax.report RUN...` compares runs on one page.
"""

from zofo_jax.report.curves import plot_curves
from zofo_jax.report.jsonl import (
  JsonlWriter,
  check_output,
  make_folder,
  read_jsonl,
  write_json,
  write_lines,
  write_text,
)
from zofo_jax.report.tables import results_table

__all__ = [
  "JsonlWriter",
  "check_output",
  "make_folder",
  "plot_curves",
  "read_jsonl",
  "results_table",
  "write_json",
  "write_lines",
  "write_text",
]
