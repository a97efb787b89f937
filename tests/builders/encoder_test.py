"""How long encoded rows may be."""

import pytest

from tests import tiny
from zofo_jax import errors
from zofo_jax.builders import encoder as encoder_lib
from zofo_jax.builders import model as model_lib
from zofo_jax.sharding import mesh as mesh_lib


def make_encoder(**changes):
  """Makes the encoder of a model with a context of 2,048 tokens."""
  config = tiny.base_config()
  config.model.name = "facebook/opt-125m"
  config.update_from_flattened_dict(changes)
  model = model_lib.published_model(
    config.model.name,
    dtype="float32",
    remat=False,
    mesh=mesh_lib.abstract(config.mesh, 1),
  )
  return encoder_lib.make_encoder(config, model)


def test_virtual_tokens_take_room():
  assert make_encoder().context_length == 2048
  encoder = make_encoder(**{"adapter.kind": "prefix", "prefix.length": 48})
  assert encoder.context_length == encoder.max_train_length == 2000
  with pytest.raises(errors.UserError, match="takes 2048 positions"):
    make_encoder(**{"adapter.kind": "prompt", "prompt.length": 2048})


@pytest.mark.parametrize(
  ("long_rows", "train", "evaluated", "prompt"),
  [
    ("error", 100, 100, 1998),
    ("truncate", 100, 100, 100),
    # Rows that are answered may be as long as the context.
    ("drop", 100, 2048, 1998),
  ],
)
def test_longest_rows(long_rows, train, evaluated, prompt):
  encoder = make_encoder(
    **{"data.max_length": 100, "data.long_rows": long_rows}
  )
  assert encoder.max_train_length == train
  assert encoder.max_eval_length == evaluated
  assert encoder.max_prompt_length() == prompt


def test_answers_need_room():
  encoder = make_encoder(**{"generate.max_new_tokens": 2048})
  with pytest.raises(errors.UserError, match="context of 2048 tokens"):
    encoder.max_prompt_length()


def test_accuracy_and_macro_f1_compare_all_options():
  assert make_encoder().mode == "likelihood"
  for name in ("accuracy", "macro_f1"):
    assert make_encoder(**{"zo.objective": name}).mode == "classification"
