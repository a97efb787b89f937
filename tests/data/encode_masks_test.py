"""Prompts with a mask: where it is, which words may fill it, what is cut."""

import pytest
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers, processors

from zofo_jax import errors, tasks
from zofo_jax.data import encode_options

WORDS = "<s> <pad> </s> <mask> good bad very film a it was . ? , yes no maybe"
IDS = {word: i for i, word in enumerate(WORDS.split())}


@pytest.fixture(scope="module")
def tokenizer():
  """One id a word, with special tokens at both ends, as RoBERTa's."""
  tokenizer = tokenizers.Tokenizer(models.WordLevel(IDS, unk_token="very"))
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  tokenizer.post_processor = processors.TemplateProcessing(
    single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
  )
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    bos_token="<s>",
    eos_token="</s>",
    pad_token="<pad>",
    mask_token="<mask>",
  )


def task(prompt="{text} it was", options=(" bad", " good"), **more):
  return tasks.custom("mine", prompt=prompt, options=options, **more)


def encode(
  tokenizer, mine, text="a film", mode="classification", length=20, **options
):
  row = tasks.Row({"text": text, "label": 1}, "row 1")
  return encode_options.encode(
    mine.with_mask(), row, tokenizer, mode, max_length=length, **options
  )


def words_of(example):
  (row,) = example.rows
  words = list(IDS)
  return " ".join(words[i] for i in row.tokens), row


@pytest.mark.parametrize(
  "prompt, expected",
  [
    ("{text} it was", "<s> a film it was <mask> . </s>"),
    ("<mask> . {text}", "<s> <mask> . a film </s>"),
    ("{text} ? <mask> , it was", "<s> a film ? <mask> , it was </s>"),
  ],
)
def test_all_words_are_scored_at_the_mask(tokenizer, prompt, expected):
  example = encode(tokenizer, task(prompt))
  text, row = words_of(example)
  assert text == expected
  assert row.tokens[row.positions[0]] == IDS["<mask>"]
  assert row.targets == ((0, IDS["bad"], 0), (0, IDS["good"], 1))
  assert (example.label, example.options) == (1, (True, True))
  (row,) = encode(tokenizer, task(prompt), mode="likelihood").rows
  assert row.targets == ((0, IDS["good"], 1),)


def test_a_word_is_one_piece_of_a_sentencepiece_vocabulary():
  """As XLM-RoBERTa's, where a space is a part of the word after it."""
  pieces = [f"▁{word}" for word in ("a", "film", "it", "was", "good", "bad")]
  names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", ".", "▁", *pieces]
  inner = tokenizers.Tokenizer(
    models.Unigram([(name, -1.0) for name in names], unk_id=3)
  )
  inner.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
  )
  inner.post_processor = processors.TemplateProcessing(
    single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
  )
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=inner,
    pad_token="<pad>",
    mask_token=tokenizers.AddedToken("<mask>", lstrip=True),
  )
  (row,) = encode(tokenizer, task()).rows
  text = [names[i] for i in row.tokens]
  assert text[:6] == ["<s>", "▁a", "▁film", "▁it", "▁was", "<mask>"]
  assert [names[token] for _, token, _ in row.targets] == ["▁bad", "▁good"]


@pytest.mark.parametrize(
  "prompt, length, expected",
  [
    ("{text} it was", 8, "<s> very film it was <mask> . </s>"),
    ("<mask> . {text}", 6, "<s> <mask> . a very </s>"),
    ("{text} it was", 3, "<s> <mask> </s>"),
  ],
)
def test_the_end_farther_from_the_mask_is_cut(
  tokenizer, prompt, length, expected
):
  long = "a very very very film"
  example = encode(
    tokenizer, task(prompt), long, length=length, long_rows="truncate"
  )
  text, row = words_of(example)
  assert row.tokens[row.positions[0]] == IDS["<mask>"]
  assert text == expected
  with pytest.raises(encode_options.TooLongError, match=r"row 1: .* at most"):
    encode(tokenizer, task(prompt), long, length=length)


def test_mistakes_are_named(tokenizer):
  with pytest.raises(errors.UserError, match="' good bad' is 2 tokens"):
    encode(tokenizer, task(options=(" good bad", " bad")))
  with pytest.raises(errors.UserError, match=r"row 1: .*more than once"):
    encode(tokenizer, task(), text="a <mask> film")
  with pytest.raises(encode_options.TooLongError, match="at most 2"):
    encode(tokenizer, task(), length=2, long_rows="truncate")
  generated = tasks.custom("mine", prompt="{text}", label="answer")
  with pytest.raises(errors.UserError, match="expected a task with options"):
    generated.with_mask()
  tokenizer.mask_token = None
  with pytest.raises(errors.UserError, match="has no mask token"):
    encode(tokenizer, task())
  tokenizer.mask_token = "<mask>"


PREMISE = {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0}


@pytest.mark.parametrize(
  "name, fields, prompt, right",
  [
    ("sst2", {"sentence": "so dull", "label": 0}, "so dull It was<mask>.", 0),
    ("sst5", {"text": "fine", "label": 3}, "fine It was<mask>.", 3),
    ("trec", {"text": "Who?", "coarse_label": 3}, "<mask>: Who?", 3),
    ("snli", PREMISE, "It rains?<mask>, it is wet.", 0),
    ("mnli", PREMISE, "It rains?<mask>, it is wet.", 0),
    ("rte", PREMISE, "It rains?<mask>, it is wet.", 0),
  ],
)
def test_prompts_of_mezo(name, fields, prompt, right):
  task = tasks.get(name).with_mask()
  row = tasks.Row(fields, "row 1")
  assert task.prompt(row) == prompt
  assert task.right(row) == (right,)
  words = {"trec": " Human", "sst2": " terrible", "sst5": " good"}
  assert task.options(row)[right] == words.get(name, " Yes")
