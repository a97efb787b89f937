"""What a file of 4 million rows costs, against one of 4 thousand.

Starts `zofo train` on each, alternately: seconds and peak memory of a run of
one step with a tiny model.

python experiments/large_table.py --ending jsonl --repeats 1
"""

import argparse
import json
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


def blocks(num_rows, size=1_000_000):
  """Yields columns of rows of 60 to 120 characters, a million at a time."""
  for start in range(0, num_rows, size):
    ids = range(start, min(start + size, num_rows))
    texts = [
      f"Row {i} of a table, whose text differs: {i * 7919 % 1_000_003} "
      + "and more words " * (i % 5)
      for i in ids
    ]
    yield {"text": texts, "id": ids}


def write_rows(path, num_rows):
  """Writes a file, by its ending."""
  if path.suffix == ".parquet":
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema({"text": pyarrow.string(), "id": pyarrow.int64()})
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
      for columns in blocks(num_rows):
        writer.write(pyarrow.table(columns))
    return
  with path.open("w") as file:
    if path.suffix == ".csv":
      file.write("text,id\n")
    for columns in blocks(num_rows):
      for text, number in zip(*columns.values(), strict=True):
        line = (
          f'"{text}",{number}'
          if path.suffix == ".csv"
          else json.dumps({"text": text, "id": number})
        )
        file.write(line + "\n")


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
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    "--ending", choices=("parquet", "jsonl", "csv"), default="parquet"
  )
  parser.add_argument("--repeats", type=int, default=3)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    model = folder / "model"
    model.mkdir()
    tables = {size: folder / f"{size}.{args.ending}" for size in SIZES}
    # In other processes: a run's peak would not be below this process's.
    call(write_model, model)
    for size, path in tables.items():
      call(write_rows, path, size)
    # The first run also fills the cache of compiled programs, if there is one.
    figures = {size: [] for size in SIZES}
    for number in range(args.repeats + 1):
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
