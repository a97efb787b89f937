"""The table of fields."""

import pytest
from ml_collections import config_dict

from zofo_jax.config import defaults


def test_names_are_unique_and_in_known_sections():
  assert len(defaults.FIELDS) == len(defaults._ROWS)
  sections = dict.fromkeys(n.rpartition(".")[0] for n in defaults.FIELDS)
  assert list(sections) == list(defaults.SECTIONS)


@pytest.mark.parametrize("name", defaults.FIELDS)
def test_a_row(name):
  field = defaults.FIELDS[name]
  if not isinstance(field.default, type):
    field.validate(field.default)
  assert field.help and not field.help.endswith(".")
  assert "|" not in field.help and "\n" not in field.help


def test_base_config_is_new_every_time():
  one, other = defaults.base_config(), defaults.base_config()
  one.model.name = "a"
  one.zo.eps = 1.0
  assert other.model.name is None and other.zo.eps == 1e-3
  with pytest.raises(TypeError):
    other.model.name = 3
  assert other.get_ref("seed").get_type() is int
  assert other.model.get_ref("name").get_type() is str
  assert isinstance(other.get_ref("seed"), config_dict.FieldReference)


def test_flat():
  fields = defaults.flat(defaults.base_config())
  assert fields.keys() == defaults.FIELDS.keys()
  assert fields["zo.eps"] == 1e-3 and fields["model.name"] is None
