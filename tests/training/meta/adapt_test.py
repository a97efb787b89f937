"""The table of adaptation."""

import pytest

from zofo_jax.training.meta import adapt


def test_the_spread_is_that_of_a_sample():
  outcome = [
    {"task": "cr", "backbone": name, "zero_shot": 0.5, "few_shot": few_shot}
    | {"in_context": [0.5]}
    for name, few_shot in (("base", [0.5, 0.7]), ("meta", [0.5]))
  ]
  base, meta = adapt.table(outcome)[:2]
  assert base["few-shot"] == pytest.approx(0.6)
  assert base["±"] == pytest.approx(0.02**0.5)  # sqrt((0.1² + 0.1²) / (2 - 1))
  assert "±" not in meta
