"""Text after prompts, against full forwards and against transformers."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zofo_jax as zofo
from tests.models.recorded import load
from tests.models.reference import make_logits as hf
from zofo_jax import adapters, models
from zofo_jax.core import directions, perturbed, population, sampler
from zofo_jax.core import keys as keys_lib
from zofo_jax.data import batching
from zofo_jax.data import tokenizer as tokenizer_lib
from zofo_jax.evaluation import beam_search, generation
from zofo_jax.models import kv_cache
from zofo_jax.models.decoder import STACKED
from zofo_jax.models.hf import weights

# Grouped kv heads, windows in all layers and in some, both kinds of OPT.
CASES = ["llama", "mistral", "qwen2_window", "opt", "opt_350m"]
PAD, VOCABULARY = 1, 96
NO_STOPS = np.zeros(VOCABULARY, bool)
LENGTH = 20  # of all full forwards: one program each


def recorded(name):
  model, _, base, tokens, mask, _ = load(name)
  return model, base, tokens, mask


@functools.partial(jax.jit, static_argnums=0)
def forward(module, base, tokens, mask):
  return module.apply({"params": base}, tokens, mask, method="logits")


def next_logits(module, base, texts):
  """Scores the token after each text, without a cache.

  A causal model does not see what follows the text.
  """
  rows = np.array([text + [PAD] * (LENGTH - len(text)) for text in texts])
  last = np.array([len(text) - 1 for text in texts])
  logits = forward(module, base, rows, np.ones_like(rows, bool))
  return np.asarray(logits)[np.arange(len(texts)), last]


def left(texts):
  """Stacks texts padded at the left."""
  batch = next(batching.prompt_batches(texts, len(texts), pad=PAD))
  order = np.argsort(batch.indices)
  return batch.tokens[order], batch.mask[order]


def prompts(seed=0, lengths=(12, 5, 8, 1)):
  draw = np.random.default_rng(seed)
  return [draw.integers(4, VOCABULARY, n).tolist() for n in lengths]


def new_tokens(name, texts, *, keys=None, **options):
  module, base, _, _ = recorded(name)
  options = {"max_new_tokens": 6, "stops": NO_STOPS, "pad": PAD, **options}
  generate_fn = jax.jit(generation.make_generate_fn(module, **options))
  if keys is None:
    keys = jax.random.split(jax.random.key(0), len(texts))
  return generate_fn(base, {}, *left(texts), keys)


def stops_at(tokens):
  return np.isin(np.arange(VOCABULARY), tokens)


# The cache.


@pytest.mark.parametrize("name", CASES + ["llama_yarn"])
def test_decoding_scores_as_a_full_forward(name):
  """Rows are not padded, padded left, and padded right."""
  module, base, tokens, mask = recorded(name)
  more = np.random.default_rng(1).integers(4, VOCABULARY, (3, 4))
  apply = functools.partial(module.apply, {"params": base})
  decode = jax.jit(functools.partial(apply, method="decode"))
  logits, cache = jax.jit(
    lambda tokens, mask: apply(tokens, mask, 4, method="prefill")
  )(tokens, mask)
  texts = [row[real].tolist() for row, real in zip(tokens, mask)]
  for step in range(5):
    expected = next_logits(module, base, texts)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    if step < 4:
      logits, cache = decode(more[:, step], cache)
      texts = [t + [int(new)] for t, new in zip(texts, more[:, step])]


@pytest.mark.slow
def test_perturbed_weights_and_adapters_generate():
  module, base, _, _ = recorded("llama")
  lora = adapters.init_lora(jax.random.key(1), base, rank=2, alpha=8.0)
  lora = jax.tree.map(
    lambda leaf: jax.random.normal(jax.random.key(2), leaf.shape) / 4, lora
  )
  key = keys_lib.DirectionKey(jax.random.key(3), jax.random.key(4))
  lazy = sampler.Sampler(directions.Rademacher(), stacked=STACKED, lazy=True)
  perturb = jax.jit(lambda scale: lazy.perturb(base, key, scale))
  nodes = perturb(0.05)
  generate_fn = jax.jit(
    generation.make_generate_fn(
      module, max_new_tokens=6, stops=NO_STOPS, pad=PAD
    )
  )
  batch = *left(prompts()), jax.random.split(jax.random.key(0), 4)
  actual = generate_fn(nodes, lora, *batch).tokens
  whole = jax.jit(adapters.merge_lora)(perturbed.materialize(nodes), lora)
  np.testing.assert_array_equal(actual, generate_fn(whole, {}, *batch).tokens)
  # The same program without one of the two.
  zeros = jax.tree.map(jnp.zeros_like, lora)
  for other in ((perturb(0.0), lora), (nodes, zeros)):
    assert (actual != generate_fn(*other, *batch).tokens).any()


def some_adapter(module, base, kinds):
  key = jax.random.key(7)
  made = {
    "lora": lambda: jax.tree.map(
      lambda leaf: leaf + 0.1,
      adapters.init_lora(key, base, rank=2, alpha=8.0),
    ),
    "prefix": lambda: adapters.init_prefix(key, module, base, length=3),
    "projected": lambda: adapters.init_prefix(
      key, module, base, length=3, init="random", projection=4
    ),
    "prompt": lambda: adapters.init_prompt(key, base, length=2),
  }
  return adapters.join(*(made[kind]() for kind in kinds.split("+")))


@functools.cache
def bare_tokens(name, lengths):
  return new_tokens(name, prompts(lengths=lengths), max_new_tokens=4).tokens


# Every kind in one model, and all kinds in every model.
@pytest.mark.parametrize(
  "name, kinds",
  [
    ("llama", "projected"),
    *(
      pytest.param("llama", kind, marks=pytest.mark.slow)
      for kind in ("prefix", "prompt")
    ),
    *((name, "lora+prefix+prompt") for name in ("llama", "opt")),
    pytest.param("mistral", "lora+prefix+prompt", marks=pytest.mark.slow),
  ],
)
def test_adapters_generate_as_in_full_forwards(name, kinds):
  """Rows padded left with a cache, against whole texts without one."""
  module, base, _, _ = recorded(name)
  adapter = some_adapter(module, base, kinds)
  lengths = 9, 5, 1
  texts = prompts(lengths=lengths)
  generate_fn = jax.jit(
    generation.make_generate_fn(
      module, max_new_tokens=4, stops=NO_STOPS, pad=PAD
    )
  )
  keys = jax.random.split(jax.random.key(0), 3)
  actual = np.asarray(generate_fn(base, adapter, *left(texts), keys).tokens)
  whole = np.full((3, 13), PAD)
  for row, text in enumerate(texts):
    whole[row, : len(text) + 4] = [*text, *actual[row]]
  mask = np.arange(13) < np.array(lengths)[:, None] + 4
  logits = np.asarray(
    jax.jit(functools.partial(module.apply, method="logits"))(
      {"params": base, "adapter": adapter}, whole, mask
    )
  )
  for row, length in enumerate(lengths):
    for step, token in enumerate(actual[row]):
      scores = logits[row, length - 1 + step]
      assert scores[token] > scores.max() - 1e-4
  assert (actual != bare_tokens(name, lengths)).any()


# Against transformers.


def hf_tokens(name, texts, **options):
  """Generates by transformers, on the recorded weights."""
  torch = pytest.importorskip("torch")
  import transformers

  fields = dict(hf.CASES[name])
  config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
  config._attn_implementation = "eager"
  model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
  tensors = hf.load(name)[1]
  with torch.no_grad():
    for path, parameter in model.named_parameters():
      # In files, GPT-NeoX's head has another name.
      tensor = tensors.get(path, tensors.get("embed_out.weight"))
      parameter.copy_(torch.tensor(tensor))
  tokens, mask = left(texts)
  out = model.generate(
    torch.tensor(tokens.astype(np.int64)),
    attention_mask=torch.tensor(mask.astype(np.int64)),
    **{"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD, **options},
  )
  return out[:, tokens.shape[1] :].numpy()


def assert_same_tokens(actual, expected):
  """Theirs ends with the longest text."""
  length = expected.shape[1]
  np.testing.assert_array_equal(actual.tokens[:, :length], expected)
  assert (np.asarray(actual.tokens)[:, length:] == PAD).all()


parity = lambda test: pytest.mark.parity(
  pytest.mark.filterwarnings("ignore")(test)
)


# Their full forwards are transformers', and their caches give the same. In a
# batch, transformers stretches Phi-3's angles by the longest row.
OTHERS = sorted({*models.FAMILIES} - {"llama", "opt", "phi3", *hf.MASKED})


@parity
@pytest.mark.parametrize(
  "name",
  [
    *("llama", "opt"),
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in ("qwen2_window", "opt_350m", *OTHERS)
    ),
  ],
)
def test_greedy_tokens_are_those_of_transformers(name):
  actual = new_tokens(name, prompts())
  assert_same_tokens(actual, hf_tokens(name, prompts(), eos_token_id=None))
  np.testing.assert_array_equal(actual.lengths, 6)
  # Now a token ends a text.
  end = int(actual.tokens[1, 2])
  actual = new_tokens(name, prompts(), stops=stops_at(end))
  assert actual.lengths.min() < 6
  assert_same_tokens(actual, hf_tokens(name, prompts(), eos_token_id=end))


@parity
@pytest.mark.parametrize(
  "name, lengths",
  [
    ("llama_dynamic", (12, 5, 8, 1)),
    # On either side of the 8 tokens at which its factors change.
    pytest.param("phi3", (12, 1), marks=pytest.mark.slow),
  ],
)
def test_dynamic_rope_grows_as_in_transformers(name, lengths):
  for text in prompts(lengths=lengths):
    actual = new_tokens(name, [text])
    assert_same_tokens(actual, hf_tokens(name, [text], eos_token_id=None))


@parity
@pytest.mark.parametrize(
  "name, length_penalty, num_beams",
  [("llama", 1.0, 3), ("llama", -2.0, 2), ("opt", 3.0, 3)],
)
def test_beams_are_those_of_transformers(name, length_penalty, num_beams):
  """Rows end early, late and not at all; some stop being improved."""
  texts = prompts(lengths=(9, 5, 8, 1, 7, 3, 6, 4))
  ends = list(range(10, 18))
  same = {"max_new_tokens": 10, "length_penalty": length_penalty}
  greedy = new_tokens(name, texts, max_new_tokens=10, stops=stops_at(ends))
  same["num_beams"] = num_beams
  actual = new_tokens(name, texts, stops=stops_at(ends), **same)
  expected = hf_tokens(name, texts, eos_token_id=ends, **same)
  assert_same_tokens(actual, expected)
  assert (actual.tokens != greedy.tokens).any()


def test_many_beams_find_the_best_text():
  """With a beam for each text in progress the search leaves nothing out."""
  module, base, _, _ = recorded("llama")
  ends, text = 7, prompts()[0]
  first = jax.nn.log_softmax(next_logits(module, base, [text])[0])
  rows = np.array([text + [token] for token in range(VOCABULARY)])
  logits = forward(module, base, rows, np.ones_like(rows, bool))
  second = jax.nn.log_softmax(logits[:, -1])
  scores = np.array((first[:, None] + second) / 2)
  scores[ends] = -np.inf  # no text goes on from there
  best = np.unravel_index(scores.argmax(), scores.shape)
  expected = [ends, PAD] if first[ends] > scores.max() else best
  actual = new_tokens(
    "llama",
    [text],
    num_beams=VOCABULARY,
    max_new_tokens=2,
    stops=stops_at(ends),
  )
  np.testing.assert_array_equal(actual.tokens[0], expected)


def test_a_row_is_over_when_no_beam_can_improve():
  """A beam that looks worse is not followed, though its end is certain."""
  p = np.array([[0.6, 0.4, 0.0], [1.0, 0.0, 0.0]]) + 1e-9
  cache = kv_cache.empty((1, 1, 1), 1, 2, jnp.dtype("float32"))
  search = functools.partial(
    beam_search.search,
    lambda token, cache: (jnp.log(p[None, 1]), cache),
    num_beams=1,
    max_new_tokens=3,
    stops=jnp.arange(3) == 0,
    pad=2,
  )
  actual = jax.jit(search)(jnp.log(p[None, 0]), cache)
  np.testing.assert_array_equal(actual, [[0, 2, 2]])


# Sampling.


@pytest.mark.parametrize(
  "options, kept",
  [
    ({}, [0, 1, 2, 3, 4]),
    ({"top_k": 2}, [0, 1]),
    ({"top_p": 0.5}, [0]),
    ({"top_p": 0.51}, [0, 1]),
    ({"top_p": 0.9}, [0, 1, 2]),
    ({"top_k": 3, "top_p": 0.83}, [0, 1]),  # of the three they have 0.833
    ({"top_k": 9}, [0, 1, 2, 3, 4]),
  ],
)
def test_what_may_be_drawn_and_how_often(options, kept):
  p = np.array([0.5, 0.25, 0.15, 0.06, 0.04])
  place = np.array([3, 0, 4, 2, 1])
  logits = np.empty(5, np.float32)
  logits[place] = 2.0 * np.log(p) + 3.0
  options = {"temperature": 2.0, **options}
  weights, ids = generation.candidates(jnp.asarray(logits)[None], **options)
  actual = {int(i): w for i, w in zip(ids[0], weights[0]) if w > -jnp.inf}
  assert sorted(actual) == sorted(place[kept])
  keys = jax.random.split(jax.random.key(5), 20_000)
  rows = jnp.broadcast_to(jnp.asarray(logits), (20_000, 5))
  drawn = generation.choose(rows, keys, **options)
  share = np.bincount(drawn, minlength=5) / 20_000
  expected = np.zeros(5)
  expected[place[kept]] = p[kept] / p[kept].sum()
  np.testing.assert_allclose(share, expected, atol=0.015)
  assert (share[expected == 0] == 0).all()


def test_every_token_is_drawn_from_the_logits_of_a_full_forward():
  module, base, _, _ = recorded("opt")
  keys = jax.random.split(jax.random.key(6), 4)
  options = {"temperature": 1.5, "top_k": 20, "top_p": 0.9}
  drawn = new_tokens("opt", prompts(), keys=keys, **options).tokens
  texts = prompts()
  for step in range(6):
    chosen = generation.choose(
      jnp.asarray(next_logits(module, base, texts)),
      jax.vmap(jax.random.fold_in, (0, None))(keys, step),
      **options,
    )
    np.testing.assert_array_equal(drawn[:, step], chosen)
    texts = [t + [int(new)] for t, new in zip(texts, chosen)]
  assert (drawn != new_tokens("opt", prompts()).tokens).any()


def test_beams_draw_nothing():
  with pytest.raises(ValueError, match="expected temperature 0; got"):
    new_tokens("opt", prompts(), num_beams=2, temperature=0.5)


# Texts.


def test_stop_table_and_cut(tiny_model):
  tokenizer = tokenizer_lib.load_tokenizer(tiny_model)
  table = generation.stop_table(tokenizer, 400, ids=[1], texts=["\n", "at"])
  assert table.dtype == bool and table.shape == (400,) and table[1]
  for text in ("\n", " great", " terrible", " a"):
    (token, *rest) = tokenizer(text)["input_ids"]
    assert not rest
    assert table[token] == ("\n" in text or "at" in text)
  assert generation.stop_table(tokenizer, 400, ids=[1]).sum() == 1
  assert generation.cut("a b\nc\n", ["\n", "b"]) == "a "
  assert generation.cut("a b", ["\n"]) == "a b"


def test_texts_do_not_depend_on_the_batch_size(tiny_model):
  tokenizer = tokenizer_lib.load_tokenizer(tiny_model)
  module, family = models.from_hf(
    json.loads((tiny_model / "config.json").read_text())
  )
  base = weights.load(tiny_model, family, module.config, jnp.dtype("float32"))
  texts = ["a dull film", "a", "a bright and warm tale by the sea", "It was"]
  ids = [tokenizer(text)["input_ids"] for text in texts]
  generate_fn = jax.jit(
    generation.make_generate_fn(
      module,
      max_new_tokens=8,
      stops=generation.stop_table(tokenizer, 400, ids=[1], texts=["e"]),
      pad=1,
      temperature=1.0,
    )
  )

  def write(batch_size, seed=0, stop=("e",)):
    return generation.generate_texts(
      generate_fn,
      *(base, {}, ids, tokenizer),
      batch_size=batch_size,
      pad=1,
      stop=stop,
      seed=seed,
    )

  actual = write(1)
  assert actual == write(3) and actual != write(3, seed=1)
  assert not any("e" in text for text in actual)
  # The stop string ended them on the device; only the host cuts it off.
  assert any(text.count("e") == 1 for text in write(3, stop=()))


# A population: several perturbed models in one program.

SAMPLED = {
  "max_new_tokens": 5,
  "temperature": 0.8,
  "stops": stops_at(range(4, 20)),
  "pad": PAD,
}


@functools.cache
def sampled():
  """Writes after prompts of several lengths; (weights, key) -> Generated."""
  module, _, _, _ = recorded("llama")
  generate_fn = generation.make_generate_fn(module, **SAMPLED)
  rows = left(prompts())

  def write(base, key):
    return generate_fn(base, {}, *rows, jax.random.split(key, 4))

  return write, jax.jit(write)


@pytest.mark.parametrize(
  "direction",
  [
    directions.LowRank(2),
    pytest.param(directions.Sparse(), marks=pytest.mark.slow),
    pytest.param(directions.Gaussian(), marks=pytest.mark.slow),
  ],
  ids=lambda kind: type(kind).__name__,
)
def test_a_population_writes_as_each_of_its_members(direction):
  """Members that end early wait for the others, and are not changed by that."""
  _, base, _, _ = recorded("llama")
  write, alone = sampled()
  zo = zofo.ZerothOrder(
    sampler.Sampler(direction, stacked=STACKED, lazy=True),
    num_directions=2,
    map_fn=functools.partial(jax.lax.map, batch_size=2),
  )
  step_keys = keys_lib.step_keys(keys_lib.seed_key(1), 0)
  answers = jax.jit(
    lambda base: population.evaluate(write, base, step_keys, 0.1, zo)
  )(base)
  assert answers.tokens.shape == (2, 2, 4, 5)
  estimate = population.estimate(np.zeros((2, 2)), step_keys, 0.1)
  written_out = jax.jit(
    lambda weights: zo.sampler.apply_directions(base, estimate.keys, weights)
  )
  key = population.sampling_key(step_keys)
  for q in range(2):
    for side, sign in enumerate((0.1, -0.1)):
      weights = jnp.zeros(2).at[q].set(sign)
      expected = alone(written_out(weights), key)
      np.testing.assert_array_equal(answers.tokens[q, side], expected.tokens)
      np.testing.assert_array_equal(answers.lengths[q, side], expected.lengths)
  assert np.ptp(answers.lengths) > 0
  assert len(np.unique(answers.tokens.reshape(4, -1), axis=0)) > 1


def test_a_loop_over_members_copies_no_cache():
  """Its condition is one for all: vmap would select between old and new."""
  module, base, _, _ = recorded("llama")
  generate_fn = generation.make_generate_fn(
    module, max_new_tokens=5, stops=stops_at([7]), pad=PAD
  )
  rows = left(prompts())
  keys = jax.random.split(jax.random.key(0), 4)
  program = jax.make_jaxpr(
    jax.vmap(
      lambda scale: generate_fn(
        jax.tree.map(lambda leaf: leaf * scale, base), {}, *rows, keys
      )
    )
  )(jnp.ones(3))
  (loop,) = [e for e in program.eqns if e.primitive.name == "while"]
  (condition,) = loop.params["cond_jaxpr"].out_avals
  assert condition.shape == ()
  selected = [
    e.outvars[0].aval.ndim
    for e in loop.params["body_jaxpr"].eqns
    if e.primitive.name == "select_n"
  ]
  assert max(selected) <= 2
