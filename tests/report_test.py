"""JSON lines, tables and pictures, on real files."""

import io
import json
import math
import pathlib

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from zofo_jax import errors, report


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

  monkeypatch.setattr(type(report.epath.Path(path)), "write_text", full)
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
      {"weights": "zero-shot", "accuracy": 0.61234, "rows": 400},
      {"weights": "adapter [p]", "accuracy": np.float32(0.875), "note": "kept"},
    ],
    title="Test rows never used before",
    stream=stream,
  )
  text = stream.getvalue()
  for part in ("zero-shot", "0.612", "400", "adapter [p]", "0.875", "kept"):
    assert part in text
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
