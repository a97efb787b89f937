import json
import logging
import zlib

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from zofo_jax import errors, tasks
from zofo_jax.core import losses
from zofo_jax.data import batching, encode_options
from zofo_jax.data import tokenizer as tokenizer_lib

TEXTS = [
  "the film was great . It was great",
  "a terrible and tedious story It was terrible",
  "It was neither good nor bad , it was okay",
  "so they left because it rained\nYes\nNo\nMaybe",
] * 4


def _byte_level(use_regex, head=None):
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=use_regex
  )
  trainer = trainers.BpeTrainer(
    vocab_size=400,
    special_tokens=["<s>", "</s>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(TEXTS, trainer)
  if head:
    tokenizer.post_processor = processors.TemplateProcessing(
      single=f"{head} $A", special_tokens=[(head, tokenizer.token_to_id(head))]
    )
  return tokenizer


def _sentence_piece():
  tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True))
  tokenizer.normalizer = normalizers.Sequence(
    [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
  )
  trainer = trainers.BpeTrainer(
    vocab_size=400,
    special_tokens=["<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)],
    show_progress=False,
  )
  tokenizer.train_from_iterator(TEXTS, trainer)
  tokenizer.post_processor = processors.TemplateProcessing(
    single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
  )
  return tokenizer


TOKENIZERS = {
  "gpt2": lambda: _byte_level(True),  # no token before the text
  "opt": lambda: _byte_level(True, "</s>"),
  "merging": lambda: _byte_level(False, "<s>"),  # merges across spaces
  "llama": _sentence_piece,  # and, as T5, a token after the text
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=TOKENIZERS[request.param](),
    bos_token="<s>",
    eos_token="</s>",
  )


def _row(**fields):
  return tasks.Row(fields, "made up row 4")


def _reviews(count):
  words = [
    "the",
    "film",
    "was",
    "great",
    "terrible",
    "tedious",
    "story",
    "café",
  ]
  random = np.random.RandomState(0)
  return [
    _row(text=" ".join(random.choice(words, size=n % 9 + 1)), label=n % 2)
    for n in range(count)
  ]


def _log_prob(prefix, token):
  """A language model for tests: any function of the tokens before it."""
  text = ",".join(map(str, [*prefix, token]))
  return -1.0 - zlib.crc32(text.encode()) / 2**32


def _target_log_probs(batch):
  """Reads what a model may see: tokens up to each position."""
  out = np.zeros(batch.target_token.shape, np.float32)
  for b, r, k in np.argwhere(batch.target_weight):
    place = batch.positions[b, r, batch.target_slot[b, r, k]]
    assert batch.mask[b, r, : place + 1].all()
    out[b, r, k] = _log_prob(
      batch.tokens[b, r, : place + 1], batch.target_token[b, r, k]
    )
  return out


def _bytes_of(tokenizer, token):
  """How many bytes of text a token stands for, from its own spelling."""
  spelling = tokenizer.convert_ids_to_tokens(token)
  if tokenizer.backend_tokenizer.normalizer is None:
    return len(spelling)  # byte level: a character is a byte
  if spelling.startswith("<0x"):
    return 1
  return len(spelling.replace("▁", " ").encode())


def _slow_score(tokenizer, prompt, option):
  """Scores one option alone: the tokens that reach past the prompt's bytes."""
  encoding = tokenizer.backend_tokenizer.encode(prompt + option)
  special = encoding.special_tokens_mask
  ids = [i for i, s in zip(encoding.ids, special) if not s]
  head = [i for i, s in zip(encoding.ids, special) if s][:1]
  added = tokenizer.backend_tokenizer.normalizer is not None  # a space in front
  left = len(prompt.encode()) + added
  start = 0
  while _bytes_of(tokenizer, ids[start]) <= left:
    left -= _bytes_of(tokenizer, ids[start])
    start += 1
  if not head and not start:
    head = [tokenizer.bos_token_id]
  full = head + ids
  return np.mean(
    [_log_prob(full[:i], full[i]) for i in range(len(head) + start, len(full))]
  )


CUSTOM = [
  tasks.custom(
    "words", prompt="{text} It was", options=[" terrible", " great"]
  ),
  tasks.custom("lines", prompt="{text}\n", options=["Yes", "No, it was not"]),
  tasks.custom(
    "ragged",
    prompt="{text}",
    options=[" great", " story so great", "s were okay"],
  ),
]


@pytest.mark.parametrize("task", CUSTOM, ids=lambda task: task.name)
def test_scores_equal_one_option_at_a_time(tokenizer, task):
  data = _reviews(20)
  examples = encode_options.encode_rows(task, data, tokenizer, max_length=200)
  shape = batching.shape_of(examples)
  batch = batching.collate(examples, shape, pad=tokenizer_lib.pad_id(tokenizer))
  scores = losses.option_scores(_target_log_probs(batch), batch)
  expected = [
    [_slow_score(tokenizer, task.prompt(r), o) for o in task.options(r)]
    for r in data
  ]
  np.testing.assert_allclose(scores, expected, rtol=1e-5)
  assert batch.label.tolist() == [r.fields["label"] for r in data]


def test_every_task_encodes(tokenizer):
  for name, task in tasks.ALL.items():
    row = tasks.Row(task.example, name)
    mode = "likelihood" if task.kind == "generation" else "classification"
    example = encode_options.encode(task, row, tokenizer, mode, max_length=2000)
    batch = batching.collate([example], batching.shape_of([example]), pad=0)
    encoded = set(batch.target_option[batch.target_weight > 0])
    assert encoded == set(np.flatnonzero(batch.option_mask[0]))
    assert batch.option_mask[0, batch.label[0]]


def test_tokens_of_prompt_and_option_rejoin(tokenizer):
  text, option = "a tedious story It was", " great"
  row = _row(text="a tedious story", label=1)
  example = encode_options.encode(
    CUSTOM[0], row, tokenizer, "likelihood", max_length=99
  )
  (only,) = example.rows
  last = [token for _, token, _ in only.targets]
  context = only.tokens[: only.positions[0] + 1]
  whole = tokenizer(text + option)["input_ids"]
  assert whole[: len(context) + len(last)] == [*context, *last]
  assert example.label == 1 and example.options == (False, True)


def test_single_tokens_share_a_row():
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=_byte_level(True, "</s>"), bos_token="</s>"
  )
  row = _row(text="the film", label=0)
  example = encode_options.encode(CUSTOM[0], row, tokenizer, max_length=99)
  assert len(example.rows) == 1
  assert len(example.rows[0].positions) == 1
  assert len(example.rows[0].targets) == 2
  assert example.rows[0].tokens[0] == 1  # OPT puts </s> first
  example = encode_options.encode(CUSTOM[2], row, tokenizer, max_length=99)
  counts = {o: len(targets) for o, (_, targets) in _by_option(example).items()}
  alone = [o for o, count in counts.items() if count > 1]
  assert alone and len(alone) < 3
  assert len(example.rows) == 1 + len(alone)


def test_empty_prompt_starts_from_a_begin_token(tokenizer):
  task = tasks.get("winogrande")
  row = _row(sentence="_ left", option1="film", option2="story", answer="1")
  example = encode_options.encode(task, row, tokenizer, max_length=99)
  assert all(r.tokens[0] in (0, 1) for r in example.rows)
  bare = transformers.PreTrainedTokenizerFast(
    tokenizer_object=_byte_level(True)
  )
  with pytest.raises(errors.UserError, match=r"made up row 4: .*no begin"):
    encode_options.encode(task, row, bare, max_length=99)


def test_options_without_tokens_or_alike_are_errors(tokenizer):
  row = _row(text="the film", label=0)
  same = tasks.custom("own", prompt="{text} It", options=[" was", " was"])
  with pytest.raises(
    errors.UserError, match="row 4: options ' was' and ' was'"
  ):
    encode_options.encode(same, row, tokenizer, max_length=99)
  empty = tasks.custom("own", prompt="{text} It", options=[" was", ""])
  with pytest.raises(errors.UserError, match="row 4: option '' gives no token"):
    encode_options.encode(empty, row, tokenizer, max_length=99)


def test_rows_without_a_label(tokenizer):
  row = _row(text="the film")
  CUSTOM[0].check(row, labelled=False)
  given = encode_options.encode(
    CUSTOM[0], row, tokenizer, max_length=99, labelled=False
  )
  row = _row(text="the film", label=1)
  known = encode_options.encode(CUSTOM[0], row, tokenizer, max_length=99)
  assert given == known._replace(label=0, right=())


def test_reference_words_may_repeat(tokenizer):
  task = tasks.get("tweet_eval_sentiment")
  row = _row(text="the film", label=2)
  example = encode_options.encode(
    task, row, tokenizer, max_length=99, version="reference"
  )
  assert example.options == (True, True, True)


def test_generation_has_no_options_to_classify(tokenizer):
  task = tasks.get("squad")
  with pytest.raises(errors.UserError, match="squad is answered by generation"):
    encode_options.encode(task, _row(**task.example), tokenizer, max_length=999)


def _by_option(example):
  """Context and target tokens of every option."""
  by_option = {}
  for row in example.rows:
    for option in {o for _, _, o in row.targets}:
      places = [row.positions[s] for s, _, o in row.targets if o == option]
      targets = [t for _, t, o in row.targets if o == option]
      by_option[option] = (row.tokens[: places[0] + 1], targets)
  return by_option


def test_long_rows(tokenizer, caplog):
  long = tasks.Row({"text": "story " * 30, "label": 1}, "made up row 9")
  data = [_row(text="story", label=0), long]
  with pytest.raises(errors.UserError, match=r"row 9: .* at most 20 fit"):
    encode_options.encode_rows(CUSTOM[0], data, tokenizer, max_length=20)
  with caplog.at_level(logging.WARNING):
    kept = encode_options.encode_rows(
      CUSTOM[0], data, tokenizer, max_length=20, long_rows="drop"
    )
  assert [e.source for e in kept] == ["made up row 4"]
  assert "1 of 2 rows do not fit in 20 tokens" in caplog.text
  with pytest.raises(errors.UserError, match="none of 1 rows fits"):
    encode_options.encode_rows(
      CUSTOM[0], [long], tokenizer, max_length=20, long_rows="drop"
    )
  cut = encode_options.encode(
    CUSTOM[0], long, tokenizer, max_length=20, long_rows="truncate"
  )
  rows = encode_options.encode_rows(
    CUSTOM[0], data, tokenizer, max_length=20, long_rows="truncate"
  )
  assert rows[1] == cut and len(rows) == 2
  assert "1 of 2 rows are cut to 20 tokens at the left" in caplog.text
  whole = encode_options.encode(CUSTOM[0], long, tokenizer, max_length=999)
  assert max(len(r.tokens) for r in cut.rows) == 20
  head = tokenizer("x", return_special_tokens_mask=True)
  lead = head["special_tokens_mask"][0]
  short, full = _by_option(cut), _by_option(whole)
  assert short.keys() == full.keys() == {0, 1}
  for option, (context, targets) in short.items():
    before, expected = full[option]
    assert targets == expected
    assert context[:lead] == before[:lead]
    assert context[lead:] == before[len(before) - (len(context) - lead) :]
  with pytest.raises(errors.UserError, match="leaves no room"):
    encode_options.encode(
      tasks.custom("own", prompt="{text}", options=[" a", " story" * 9]),
      *(long, tokenizer),
      max_length=5,
      long_rows="truncate",
    )


def test_tokenizer_from_a_folder(tmp_path):
  made = transformers.PreTrainedTokenizerFast(
    tokenizer_object=_byte_level(True, "</s>"), eos_token="</s>"
  )
  made.save_pretrained(tmp_path / "model")
  loaded = tokenizer_lib.load_tokenizer(tmp_path / "model")
  assert loaded("a film")["input_ids"] == made("a film")["input_ids"]
  assert tokenizer_lib.pad_id(loaded) == 1
  (tmp_path / "model" / "tokenizer.json").write_text(json.dumps({}))
  for folder in ("model", "nothing"):
    with pytest.raises(errors.UserError, match="Cannot load a tokenizer"):
      tokenizer_lib.load_tokenizer(tmp_path / folder)


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_a_folder_without_a_tokenizer(tmp_path, kind):
  (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
  with pytest.raises(errors.UserError, match=r"no tokenizer\.json; expected a"):
    tokenizer_lib.load_tokenizer(tmp_path)


def test_dropout_of_bpe_is_not_used(tmp_path, caplog):
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=_byte_level(True, "</s>"), eos_token="</s>"
  ).save_pretrained(tmp_path)
  text = "a film by the sea, a film by the sea"
  expected = tokenizer_lib.load_tokenizer(tmp_path)(text)["input_ids"]
  path = tmp_path / "tokenizer.json"
  fields = json.loads(path.read_text())
  fields["model"]["dropout"] = 0.5
  path.write_text(json.dumps(fields))
  tokenizer = tokenizer_lib.load_tokenizer(tmp_path)
  assert all(tokenizer(text)["input_ids"] == expected for _ in range(10))
  assert caplog.text.count("has dropout 0.5") == 1
