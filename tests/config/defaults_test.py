"""The table of fields."""

import ast
import itertools
import pathlib

import pytest
from ml_collections import config_dict

from zofo_jax.config import defaults, fields


def test_names_are_unique_and_in_known_sections():
  assert len(defaults.FIELDS) == len(defaults._ROWS)
  sections = itertools.groupby(n.rpartition(".")[0] for n in defaults.FIELDS)
  assert [section for section, _ in sections] == list(defaults.SECTIONS)


def test_no_field_has_the_name_of_a_method():
  """`config.reward.keys` would be the method, whatever was set."""
  methods = dir(config_dict.ConfigDict())
  for name in defaults.FIELDS:
    assert not set(name.split(".")) & set(methods), name


def test_every_field_is_read_somewhere():
  read = set()
  package = pathlib.Path(defaults.__file__).parents[1]
  for path in package.rglob("*.py"):
    if path != pathlib.Path(defaults.__file__):
      for node in ast.walk(ast.parse(path.read_text())):
        # config.zo.eps; an argument eps, of f(**config.zo); fields["zo.eps"].
        for part in ("attr", "arg", "value"):
          if isinstance(name := getattr(node, part, None), str):
            read.add(name)
  for field in defaults.FIELDS:
    assert {field, field.rpartition(".")[2]} & read, field


def test_what_the_ledger_s_entries_mean_never_changes():
  """A new field of zo has to be added here or there."""
  by_answer = {fields.NEVER: set(), fields.ON_REQUEST: set()}
  for field in defaults.FIELDS.values():
    if field.name.startswith("zo."):
      by_answer[field.may_change].add(field.name.removeprefix("zo."))
  assert by_answer[fields.NEVER] == set(
    """
    direction rank threshold select layers frame_steps optimizer write_every
    """.split()
  )
  assert by_answer[fields.ON_REQUEST] == set(
    """
    estimator objective num_directions eps learning_rate scaling clip
    weight_decay
    """.split()
  )


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
  flat = defaults.flat(defaults.base_config())
  assert flat.keys() == defaults.FIELDS.keys()
  assert flat["zo.eps"] == 1e-3 and flat["model.name"] is None
