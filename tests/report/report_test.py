"""JSON lines, tables and pictures, on real files."""

import html.parser
import io
import json
import math
import pathlib
import shutil
import subprocess

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from etils import epath

from zofo_jax import errors, main, report
from zofo_jax.report import curves
from zofo_jax.report import html as html_report


def rows_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_row_is_on_disk_at_once(tmp_path):
  path = tmp_path / "run" / "metrics.jsonl"
  with report.JsonlWriter(path) as writer:
    writer.write(
      {
        "step": np.int64(1),
        "upper_loss": jnp.float32(0.5),
        "coefficients": jnp.array([1.0, jnp.inf]),
        "lower_loss": math.nan,
        "path": pathlib.Path("a"),
        "ok": True,
      }
    )
    assert rows_of(path) == [
      {
        "step": 1,
        "upper_loss": 0.5,
        "coefficients": [1.0, None],
        "lower_loss": None,
        "path": "a",
        "ok": True,
      }
    ]
    writer.write({"step": 2})
    assert len(rows_of(path)) == 2
  with report.JsonlWriter(path) as writer:
    writer.write({"step": 3})
  assert [row["step"] for row in rows_of(path)] == [1, 2, 3]


def test_float32_survives_the_text(tmp_path):
  values = np.random.default_rng(0).normal(size=64).astype(np.float32)
  with report.JsonlWriter(tmp_path / "m") as writer:
    writer.write({"step": 0, "values": values})
  (row,) = report.read_jsonl(tmp_path / "m")
  assert np.float32(row["values"]).tobytes() == values.tobytes()


@pytest.mark.parametrize("torn", ["", '{"step": 9', '{"step": 1}', '{"a": "é'])
def test_truncation_leaves_a_file_as_if_never_interrupted(tmp_path, torn):
  path = tmp_path / "metrics.jsonl"
  whole = tmp_path / "whole.jsonl"
  rows = [{"note": "start"}, *({"step": i, "loss": i / 3} for i in range(7))]
  for target in (path, whole):
    with report.JsonlWriter(target) as writer:
      for row in rows:
        writer.write(row)
  with path.open("ab") as file:
    # The tear may be inside a character of two bytes.
    file.write(torn.encode()[: -1 if "é" in torn else None])
  with report.JsonlWriter(path) as writer:
    writer.truncate_after(4)
    assert rows_of(path) == rows[:6]
    for row in rows[6:]:
      writer.write(row)
  assert path.read_bytes() == whole.read_bytes()
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    "metrics.jsonl",
    "whole.jsonl",
  ]


def test_truncation_within_one_writer_and_of_no_file(tmp_path):
  path = tmp_path / "metrics.jsonl"
  with report.JsonlWriter(path) as writer:
    writer.truncate_after(3)
    assert path.read_bytes() == b""
    for step in range(4):
      writer.write({"step": step})
    writer.truncate_after(1)
    writer.write({"step": 2, "again": True})
  assert rows_of(path)[-1] == {"step": 2, "again": True}
  assert len(rows_of(path)) == 3


@pytest.mark.parametrize("broken", ["{nonsense}", "[1]", '{"step": 1', ""])
def test_a_broken_line_before_the_last_is_named(tmp_path, broken):
  path = tmp_path / "metrics.jsonl"
  text = '{"step": 0}\n' + broken + '\n{"step": 2}\n'
  path.write_text(text)
  with pytest.raises(
    errors.UserError, match=r"metrics.jsonl' line 2: expected"
  ):
    report.JsonlWriter(path).truncate_after(1)
  assert path.read_text() == text


def test_write_json_replaces_in_one_piece(tmp_path, monkeypatch):
  path = tmp_path / "run" / "summary.json"
  report.write_json(path, {"accuracy": np.float32(0.5), "n": jnp.int32(3)})
  assert json.loads(path.read_text()) == {"accuracy": 0.5, "n": 3}

  def full(self, text):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(type(epath.Path(path)), "write_text", full)
  with pytest.raises(OSError, match="No space"):
    report.write_json(path, {"accuracy": 0.75})
  assert json.loads(path.read_text()) == {"accuracy": 0.5, "n": 3}


class Clock:
  now = 100.0

  def __call__(self):
    return self.now


def test_table_has_a_row_for_each():
  stream = io.StringIO()
  report.results_table(
    [
      {"weights": "zero-shot", "accuracy": 0.61234, "rows": 400}
      | {"interval": (0.5, 0.71234)},
      {"weights": "adapter [p]", "accuracy": np.float32(0.875), "note": "kept"},
    ],
    title="Test rows never used before",
    stream=stream,
  )
  text = stream.getvalue()
  for part in ("zero-shot", "0.612", "400", "adapter [p]", "0.875", "kept"):
    assert part in text
  assert "0.500 to 0.712" in text
  assert "Test rows never used before" in text


@pytest.mark.parametrize("accuracy", [True, False])
def test_picture_of_the_curves(tmp_path, accuracy):
  path = tmp_path / "metrics.jsonl"
  with report.JsonlWriter(path) as writer:
    for step in range(30):
      row = {
        "step": step,
        "lower_loss": 1 / (1 + step),
        "upper_loss": 2 / (1 + step),
        "coefficients": [1.0, -2.0, math.nan],
      }
      if accuracy and step % 10 == 0:
        row["selection_accuracy"] = 0.6 + step / 100
      writer.write(row)
  out = tmp_path / "pictures" / "curves.png"
  report.plot_curves(path, out)
  picture = matplotlib.image.imread(out)
  assert picture.shape[0] > 400 and picture.shape[1] > 1000
  # Lines were drawn in both halves: pixels that are neither white nor grey.
  coloured = np.ptp(picture[..., :3], axis=-1) > 0.2
  half = picture.shape[1] // 2
  assert coloured[:, :half].sum() > 500 and coloured[:, half:].sum() > 500


def test_nothing_to_draw_is_told(tmp_path):
  (tmp_path / "metrics.jsonl").write_text("")
  with pytest.raises(errors.UserError, match="no row with a step"):
    report.plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")


def make_run(folder, name, eps, *, ended=True):
  run = folder / name
  with report.JsonlWriter(run / "metrics.jsonl") as writer:
    for step in range(1, 41):
      row = {"step": step, "upper_loss": 1 / step, "seconds": step / 2}
      writer.write({**row, "forward_passes": 3 * step})
    writer.write({"step": 40, "selection_accuracy": 0.75})
  report.write_json(run / "config.json", {"zo": {"eps": eps}, "seed": 0})
  if ended:
    report.write_json(run / "summary.json", {"test_accuracy": 0.8125})
  return str(run)


def test_a_page_compares_runs_and_needs_nothing_else(tmp_path, capsys):
  runs = [
    make_run(tmp_path, "one", 1e-3),
    make_run(tmp_path, "<two>", 1e-2, ended=False),
  ]
  out = tmp_path / "new" / "page.html"
  assert main.main(["report", *runs, f"--out={out}"]) == 0
  text = out.read_text()

  class Reader(html.parser.HTMLParser):
    def __init__(self):
      super().__init__()
      self.tags, self.words = [], []

    def handle_starttag(self, tag, attributes):
      self.tags.append(tag)
      for name, value in attributes:
        # All of the page is in the page.
        assert name != "src" and not (name == "href" and value[0] != "#")

    def handle_data(self, data):
      self.words.append(data.strip())

  reader = Reader()
  reader.feed(text)
  assert reader.tags.count("svg") == 2 and reader.tags.count("table") == 2
  assert "script" not in reader.tags and "two" not in reader.tags
  for word in ("one", "<two>", "0.8125", "zo.eps", "0.01", "0.001", "ended"):
    assert word in reader.words, word
  assert "seed" not in reader.words  # the same in both


def test_curves_are_of_the_score_that_selects_the_checkpoint(tmp_path):
  rows = [{"selection_accuracy": 0.75, "selection_macro_f1": 0.5}]
  assert curves.selecting_score(rows, "macro_f1") == "selection_macro_f1"
  assert curves.selecting_score(rows) == "selection_accuracy"
  assert curves.selecting_score(rows, "mean") is None
  run = make_run(tmp_path, "one", 1e-3)
  (found,) = html_report.find([run])
  found.metrics[-1]["selection_matthews"] = 0.25
  found.summary["selection_metric"] = "matthews"
  page = html_report.page([found])
  assert "selection matthews" in page and "selection accuracy" not in page


BROWSER = next(
  filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None
)


@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
def test_a_browser_shows_the_page(tmp_path):
  runs = [make_run(tmp_path, "one", 1e-3), make_run(tmp_path, "two", 1e-2)]
  page = tmp_path / "page.html"
  assert main.main(["report", *runs, f"--out={page}"]) == 0
  picture = tmp_path / "page.png"
  options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
  options += [
    f"--user-data-dir={tmp_path / 'profile'}",
    "--window-size=1200,1600",
  ]
  for more in (["--dump-dom"], [f"--screenshot={picture}"]):
    shown = subprocess.run(
      [BROWSER, *options, *more, page.as_uri()],
      capture_output=True,
      text=True,
      timeout=120,
    )
    assert shown.returncode == 0, shown.stderr
    if "--dump-dom" in more:  # as the browser understood it
      assert shown.stdout.count("<svg") == 2
      assert shown.stdout.count("<table") == 2
  pixels = matplotlib.image.imread(picture)[..., :3]
  assert pixels.shape[:2] == (1600, 1200)
  # A table above and curves in the first two colours of matplotlib below.
  for colour in ("#1f77b4", "#ff7f0e"):
    wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    assert (np.abs(pixels - wanted).max(-1) < 0.02).sum() > 20, colour


def test_a_page_of_no_run(tmp_path, capsys):
  assert main.main(["report", str(tmp_path)]) == 2
  assert "holds no run" in capsys.readouterr().err
  run = make_run(tmp_path, "one", 1e-3)
  (tmp_path / "one" / "config.json").write_text("{")
  assert main.main(["report", run]) == 2
  assert "config.json' is not JSON" in capsys.readouterr().err
