"""Option scores and features of a real model, against Hugging Face's."""

import json
import pathlib

import jax
import numpy as np
import pytest

from tests import tiny
from zofo_jax import tasks
from zofo_jax.builders import model as model_lib
from zofo_jax.data import encode_options
from zofo_jax.evaluation import linear_probe, scoring
from zofo_jax.models import apply

FOLDER = pathlib.Path("~/.cache/zofo_jax/smollm2-135m-instruct").expanduser()

pytestmark = [
  pytest.mark.parity,
  pytest.mark.slow,
  pytest.mark.skipif(
    not (FOLDER / "config.json").exists(), reason="make demo fetches the model"
  ),
]

ROWS = {
  "sst2": [
    {"sentence": "a dull and cold film", "label": 0},
    {"sentence": "a warm , bright and funny tale of two friends", "label": 1},
  ],
  "cb": [
    {"premise": "It froze.", "hypothesis": "It was cold", "label": 0},
    {"premise": "Ann sang all night.", "hypothesis": "Ann slept", "label": 1},
  ],
  "copa": [
    {
      "premise": "The rope snapped.",
      "choice1": "The climber fell down.",
      "choice2": "I drank tea.",
      "question": "effect",
      "label": 0,
    },
  ],
}


@pytest.fixture(scope="module")
def real():
  config = tiny.base_config()
  config.model.name = str(FOLDER)
  model = model_lib.load_model(**config.model)
  return model, model_lib.load_base(model)


@pytest.fixture(scope="module")
def reference():
  torch = pytest.importorskip("torch")
  import transformers

  return torch, transformers.AutoModelForCausalLM.from_pretrained(
    FOLDER, dtype=torch.float32
  )


def encoded(task, model):
  return encode_options.encode_rows(
    task,
    [tasks.Row(f, f"row {i}") for i, f in enumerate(ROWS[task.name], 1)],
    model.tokenizer,
    max_length=128,
  )


@pytest.mark.parametrize("name", ROWS)
def test_scores_one_row_and_one_option_at_a_time(real, reference, name):
  (model, base), (torch, hf) = real, reference
  task = tasks.get(name)
  score_fn = jax.jit(
    scoring.make_score_fn(apply.make_log_probs_fn(model.module))
  )
  scores = scoring.score_options(
    score_fn, base, {}, encoded(task, model), batch_size=2, pad=model.pad
  )
  for i, fields in enumerate(ROWS[name]):
    row = tasks.Row(fields, "row")
    prompt = task.prompt(row)
    for j, option in enumerate(task.options(row)):
      start = len(model.tokenizer(prompt)["input_ids"])
      ids = torch.tensor([model.tokenizer(prompt + option)["input_ids"]])
      with torch.no_grad():
        log_probs = hf(ids).logits[0].log_softmax(-1)
      picked = [log_probs[t - 1, ids[0, t]] for t in range(start, ids.shape[1])]
      expected = float(sum(picked)) / len(picked)
      assert scores[i, j] == pytest.approx(expected, abs=2e-3)


def test_probe_is_sklearn_s_on_their_features(real, reference):
  from sklearn import linear_model

  (model, base), (torch, hf) = real, reference
  task, examples = tasks.get("sst2"), encoded(tasks.get("sst2"), model)
  hidden = linear_probe.hidden_states(
    jax.jit(apply.make_hidden_fn(model.module)),
    base,
    examples,
    batch_size=2,
    pad=model.pad,
  )[:, 0, 0]
  features = []
  for fields in ROWS["sst2"]:
    ids = model.tokenizer(task.prompt(tasks.Row(fields, "")))["input_ids"]
    with torch.no_grad():
      features.append(hf.model(torch.tensor([ids])).last_hidden_state[0, -1])
  features = np.stack([f.numpy() for f in features])
  np.testing.assert_allclose(hidden, features, atol=2e-2, rtol=2e-3)
  score = linear_probe.fit_logistic(hidden, [0, 1], c=1.0, num_options=3)(
    hidden
  )
  expected = linear_model.LogisticRegression(C=1.0, max_iter=5000).fit(
    features, [0, 1]
  )
  np.testing.assert_allclose(
    score[:, :2], expected.predict_log_proba(features), atol=2e-3
  )
  assert (score.argmax(-1) < 2).all()  # an option that never occurs
  assert json.dumps(score.tolist())  # finite
