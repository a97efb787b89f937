"""What a Parquet file of 4 million rows costs, against one of 4 thousand.

Starts `zofo train` on each, alternately: seconds and peak memory of a run of
one step with a tiny model.

python experiments/large_table.py
"""

import multiprocessing
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]

SIZES = (4_000, 4_000_000)
REPEATS = 3
FIELDS = {
  "data.task": "texts",
  "data.format": "text",
  "data.long_rows": "truncate",
  "data.max_length": 32,
  "data.num_test": 64,
  "data.num_selection": 64,
  "lower.num_steps": 1,
  "train.num_steps": 1,
  "train.eval_every_steps": 1,
}


def write_model(folder):
  """Writes the tiny model of the tests."""
  sys.path.insert(0, str(ROOT))
  from tests import tiny

  tiny.write_model(folder)


def write_rows(path, num_rows, block=1_000_000):
  """Writes rows of 60 to 120 characters, a million to a group."""
  import pyarrow
  import pyarrow.parquet

  with pyarrow.parquet.ParquetWriter(
    path, pyarrow.schema({"text": pyarrow.string(), "id": pyarrow.int64()})
  ) as writer:
    for start in range(0, num_rows, block):
      ids = range(start, min(start + block, num_rows))
      texts = [
        f"Row {i} of a table, whose text differs: {i * 7919 % 1_000_003} "
        + "and more words " * (i % 5)
        for i in ids
      ]
      writer.write(pyarrow.table({"text": texts, "id": ids}))


def call(function, *args):
  """Calls a function in a process of its own."""
  process = multiprocessing.Process(target=function, args=args)
  process.start()
  process.join()
  assert process.exitcode == 0


def run(table, model, folder):
  """Returns seconds and peak bytes of a run."""
  fields = {**FIELDS, "model.name": model, "data.dir": table}
  started = time.monotonic()
  process = subprocess.Popen(
    [
      *(sys.executable, "-m", "zofo_jax.main", "train", "--config=llama"),
      f"--workdir={folder}",
      *(f"--config.{name}={value}" for name, value in fields.items()),
    ],
    cwd=ROOT,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  _, status, usage = os.wait4(process.pid, 0)
  assert status == 0
  return time.monotonic() - started, usage.ru_maxrss * 1024


def main():
  """Prints medians and ratios."""
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    model = folder / "model"
    model.mkdir()
    tables = {size: folder / f"{size}.parquet" for size in SIZES}
    # In other processes: a run's peak would not be below this process's.
    call(write_model, model)
    for size, path in tables.items():
      call(write_rows, path, size)
    # The first run also fills the cache of compiled programs, if there is one.
    figures = {size: [] for size in SIZES}
    for number in range(REPEATS + 1):
      for size, path in tables.items():
        figure = run(path, model, folder / f"run_{size}_{number}")
        figures[size] += [figure] if number else []
    sizes = [path.stat().st_size / 1e6 for path in tables.values()]
  medians = [
    [statistics.median(column) for column in zip(*figures[size])]
    for size in SIZES
  ]
  for size, megabytes, (seconds, peak) in zip(SIZES, sizes, medians):
    print(
      f"{size} rows, {megabytes:.1f} MB: {seconds:.2f} s, {peak / 1e6:.0f} MB"
    )
  (small, small_peak), (large, large_peak) = medians
  print(f"seconds {large / small:.2f}, peak {large_peak / small_peak:.2f}")


if __name__ == "__main__":
  main()
