"""Demonstrations: which rows, their exact text, and what goes when too long."""

import logging

import pytest

from zofo_jax import errors, tasks
from zofo_jax.data import encode_options, encode_prompts
from zofo_jax.data import tokenizer as tokenizer_lib
from zofo_jax.evaluation import in_context

TASK = tasks.get("sst2")


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
  return tokenizer_lib.load_tokenizer(tiny_model)


def review(sentence, label=0):
  return tasks.Row({"sentence": sentence, "label": label}, "made up row 1")


def pool(*labels):
  return [review(f"film {i}", label) for i, label in enumerate(labels)]


def labels(drawn):
  return sorted(row.fields["label"] for row in drawn)


def test_balanced_draws():
  rare = pool(*[0] * 30, 1, 1)
  assert labels(in_context.draw(TASK, rare, 4, 0)) == [0, 0, 1, 1]
  assert labels(in_context.draw(TASK, rare, 8, 0)) == [0] * 6 + [1, 1]
  even = pool(*[0, 1] * 16)
  odd = [sum(labels(in_context.draw(TASK, even, 3, i))) for i in range(20)]
  assert set(odd) == {1, 2}


def test_random_draws_follow_the_pool():
  rare = pool(*[0] * 30, 1, 1)
  ones = [
    sum(labels(in_context.draw(TASK, rare, 4, seed, balanced=False)))
    for seed in range(20)
  ]
  assert 0 < sum(ones) < 20


def test_draws_are_seeded_and_never_repeat_a_row():
  many = pool(*[0, 1] * 20)
  first = in_context.draw(TASK, many, 10, 3)
  assert first == in_context.draw(TASK, many, 10, 3)
  assert first != in_context.draw(TASK, many, 10, 4)
  assert len({row.fields["sentence"] for row in first}) == 10
  # Not one label first and the other after it.
  orders = {
    tuple(row.fields["label"] for row in in_context.draw(TASK, many, 4, seed))
    for seed in range(20)
  }
  assert len(orders) > 2


def test_too_few_rows():
  with pytest.raises(errors.UserError, match=r"9 demonst.*num_shots.*2 rows"):
    in_context.draw(TASK, pool(0, 1), 9, 0)


def asked(tokenizer, max_length=64, question="a bright cast It was", **options):
  """Returns the text before the option of one encoded row."""
  shown = [
    in_context.demonstration(TASK, review("a dull film .", 0)),
    in_context.demonstration(TASK, review(" a warm tale", 1)),
  ]

  def encode_one(row, prompt, truncate):
    return encode_options.encode(
      TASK,
      row,
      tokenizer,
      max_length=max_length,
      long_rows="truncate" if truncate else "error",
      prompt=prompt,
    )

  (example,) = in_context.encode_rows(
    [review("a bright cast", 1)], [question], shown, encode_one, **options
  )
  assert example.label == 1
  text = "".join(tokenizer.convert_ids_to_tokens(example.rows[0].tokens))
  return text.replace("Ġ", " ").replace("Ċ", "\n")  # byte-level spellings


def test_text(tokenizer):
  assert asked(tokenizer) == (
    "a dull film . It was terrible\n\na warm tale It was great\n\n"
    "a bright cast It was"
  )
  assert asked(tokenizer, separator=" ## ") == (
    "a dull film . It was terrible ## a warm tale It was great ## "
    "a bright cast It was"
  )
  assert asked(tokenizer, question=" It was").endswith("great\n\n It was")


SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "Hi?"}
REPLY = {"role": "assistant", "content": "Hello."}
PAIR = tasks.Chat((SYSTEM, ASK, REPLY, ASK))


@pytest.mark.parametrize(
  "shown, query, expected",
  [
    ([], PAIR, PAIR),
    (
      [PAIR, tasks.Plain("Q:", " A")],
      tasks.Chat((SYSTEM, ASK, REPLY), answers=("Hello.",)),
      tasks.Chat((SYSTEM, ASK, REPLY, ASK, REPLY), 3, ("Hello.",)),
    ),
    (
      [PAIR, PAIR],
      tasks.Chat((ASK, REPLY, ASK, REPLY), start=2, skipped=(3,)),
      tasks.Chat((ASK, REPLY) * 4, start=6, skipped=(7,)),
    ),
    (
      [tasks.Plain("Q: 1?", " 1."), PAIR, tasks.Plain("Q: 2?", " 2.")],
      tasks.Plain("Q: 3?", " 3."),
      tasks.Plain("Q: 1? 1.\n\nQ: 2? 2.\n\nQ: 3?", " 3."),
    ),
  ],
)
def test_chats_and_texts(shown, query, expected):
  (actual,) = in_context.encode_rows(
    [None], [query], shown, lambda row, prompt, truncate: prompt
  )
  assert actual == expected


def test_text_of_a_line_break_before_the_option(tokenizer):
  task = tasks.get("rte")
  row = tasks.Row(
    {"premise": "It froze.", "hypothesis": "It was cold", "label": 0}, "row 1"
  )
  assert in_context.demonstration(task, row) == (
    'It froze.\nDoes this mean that "It was cold" is true? Yes or No?\nYes'
  )


def test_demonstrations_go_first(tokenizer, caplog):
  size = len(tokenizer("a bright cast It was")["input_ids"])
  caplog.set_level(logging.WARNING)
  assert asked(tokenizer, max_length=size) == "a bright cast It was"
  assert "0.0 of 2 demonstrations fit" in caplog.text
  middle = len(
    tokenizer("a warm tale It was great\n\na bright cast It was")["input_ids"]
  )
  for length in (middle, middle + 1):
    assert asked(tokenizer, max_length=length) == (
      "a warm tale It was great\n\na bright cast It was"
    )
  assert asked(tokenizer, max_length=middle - 1) == "a bright cast It was"


def test_a_question_that_does_not_fit(tokenizer):
  with pytest.raises(
    encode_options.TooLongError, match=r"made up row 1: .* at most 3"
  ):
    asked(tokenizer, max_length=3)
  text = asked(tokenizer, max_length=3, truncate=True)
  assert "a bright cast It was".endswith(text) and text


def test_what_all_rows_begin_with():
  def example(tokens, *positions):
    row = encode_options.EncodedRow(tuple(tokens), positions, ((0, 9, 0),))
    return encode_options.Example((row,), 0, (0,), (True,), "row 1")

  shared, rest = in_context.split_shared(
    [example([1, 2, 3, 4, 5], 3, 4), example([1, 2, 3, 6, 5, 5], 4)]
  )
  assert shared == (1, 2, 3)
  assert [e.rows[0].tokens for e in rest] == [(4, 5), (6, 5, 5)]
  assert [e.rows[0].positions for e in rest] == [(0, 1), (1,)]
  # The token that predicts is read with the row.
  shared, rest = in_context.split_shared([example([1, 2], 1)] * 2)
  assert shared == (1,) and rest[0].rows[0].positions == (0,)
  ask = [
    encode_prompts.Question((1, 2), (), "1"),
    encode_prompts.Question((1,), (), "2"),
  ]
  assert in_context.split_shared(ask) == ((), ask)
