"""Fingerprints of rows: equal for equal rows, in the same order."""

from zofo_jax import tasks
from zofo_jax.data import fingerprints, splits


def rows(*texts):
  return [
    tasks.Row({"text": text, "label": i % 2}, f"row {i}")
    for i, text in enumerate(texts)
  ]


def test_rows():
  first = fingerprints.of_rows(rows("a", "b"))
  elsewhere = [
    tasks.Row({"label": i, "text": text}, "another file")
    for i, text in enumerate("ab")
  ]
  assert fingerprints.of_rows(elsewhere) == first
  others = [
    rows("a"),
    rows("a", "b", "c"),
    rows("b", "a"),
    rows("a", "b")[::-1],
    rows("a", "é"),
    rows("a", "\ud83d"),
    rows("a\nb"),
  ]
  digests = {first, *map(fingerprints.of_rows, others)}
  assert len(digests) == 1 + len(others)


def test_splits():
  members = rows("a", "b", "c", "d")
  parts = splits.Splits(members[:1], members[1:2], members[2:3], members[3:])
  described = fingerprints.of_splits(parts._asdict())
  for name in ("lower", "upper", "selection", "test"):
    of_set = getattr(parts, name)
    assert described[name] == {
      "count": 1,
      "blake2b": fingerprints.of_rows(of_set),
    }
