"""`zofo models`: every family with published sizes, or one model in detail."""

import json

import pytest

from tests.models.reference import make_logits as hf
from zofo_jax import main, models
from zofo_jax.commands import models as models_command


def test_every_family_has_published_sizes():
  sizes = models_command.families()
  assert sizes.keys() == models.FAMILIES.keys()
  assert all(sizes.values())


@pytest.mark.parametrize(
  "name, words",
  [
    ("phi3", ["0.3 of each head", "longrope", "attention/qkv", "qkv_proj"]),
    ("gemma3_text", ["2 layers with a window of 3", "soft", "q_proj"]),
    ("roberta", ["learned positions, fills masks, does not generate"]),
    ("smollm3", ["1 layers without positions", "tied head", "mlp/gate"]),
  ],
)
def test_one_model(name, words, tmp_path, capsys):
  fields = hf.load(name)[0]
  if name == "phi3":
    fields |= {"hidden_size": 32, "partial_rotary_factor": 0.5}
    fields["rope_parameters"]["partial_rotary_factor"] = 0.5
    words[0] = "0.5 of each head"
  if name == "gemma3_text":
    fields |= {"final_logit_softcapping": 5.0}
  (tmp_path / "config.json").write_text(json.dumps(fields))
  assert main.main(["models", str(tmp_path)]) == 0
  shown = capsys.readouterr().out
  assert all(word in shown for word in words), shown


def test_what_all_models_have(capsys):
  assert main.main(["models"]) == 0
  words = "All but those that fill masks (bert, roberta, xlm-roberta)"
  assert words in capsys.readouterr().out


def test_a_model_that_is_not_known_names_the_nearest(capsys):
  assert main.main(["models", "Qwen/Qwen3-0.6"]) == 2
  assert "mean 'Qwen/Qwen3-0.6B'" in capsys.readouterr().err
