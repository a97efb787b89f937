"""Chats and texts as tokens, compared with transformers' and by hand."""

import pytest

from tests.data import chat_templates
from zofo_jax import errors, tasks
from zofo_jax.data import encode_options, encode_prompts, encode_text

SYSTEM = {"role": "system", "content": "Be brief, please"}
TURNS = (
  {"role": "user", "content": "Hi there! "},
  {"role": "assistant", "content": "Hello. What\nis it?"},
  {"role": "user", "content": "A café?"},
  {"role": "assistant", "content": "Down the road."},
)
CHATS = {
  "one turn": TURNS[:2],
  "two turns": TURNS,
  "system": (SYSTEM, *TURNS),
  "ends in a question": (*TURNS, TURNS[0]),
  "the mark": (TURNS[0], {"role": "assistant", "content": encode_text._MARK}),
}
# As that of Qwen3, which writes thoughts before the last answer alone.
THINK = chat_templates.without_blocks(chat_templates.CHATML).replace(
  "message['content'] + '<|im_end|>' }}{{- '' }}",
  """('' if '<think>' in message['content'] or not loop.last else
  '<think>\n\n</think>\n\n') + message['content'] + '<|im_end|>' }}""",
)
PLAIN_ENDS = (
  "{% for m in messages %}### {{ m.role }}\n{{ m.content }}\n### END\n"
  "{% endfor %}{% if add_generation_prompt %}### assistant\n{% endif %}"
)
FORM = tasks.formatted("own", "messages")


@pytest.fixture(scope="module", params=chat_templates.TEMPLATES)
def template(request):
  return chat_templates.TEMPLATES[request.param]


@pytest.fixture(scope="module")
def marked(template):
  return chat_templates.make_tokenizer(template)


@pytest.fixture(scope="module")
def unmarked(template):
  return chat_templates.make_tokenizer(chat_templates.without_blocks(template))


def _row(**fields):
  return tasks.Row(fields, "row 1")


@pytest.mark.parametrize("name", CHATS)
def test_ids_and_mask_are_those_of_transformers(marked, unmarked, name):
  messages = list(CHATS[name])
  expected = marked.apply_chat_template(
    messages,
    tokenize=True,
    return_dict=True,
    return_assistant_tokens_mask=True,
  )
  assert any(expected["assistant_masks"])
  for tokenizer in (marked, unmarked):
    tokens = encode_text.tokenize(tasks.Chat(CHATS[name]), tokenizer, "row 1")
    assert list(tokens.ids) == expected["input_ids"]
    assert list(map(int, tokens.learned)) == expected["assistant_masks"]


@pytest.mark.parametrize("name", ["one turn", "two turns"])
def test_targets_are_the_assistant_s_turns(marked, unmarked, name):
  messages = CHATS[name]
  for tokenizer in (marked, unmarked):
    example = encode_options.encode(
      FORM, _row(messages=messages), tokenizer, "likelihood", max_length=999
    )
    tokens, positions, targets, _ = example.rows[0]
    said = tokenizer.decode(
      [token for _, token, _ in targets], skip_special_tokens=True
    )
    contents = [m["content"] for m in messages if m["role"] == "assistant"]
    assert "".join(said.split()) == "".join("".join(contents).split())
    # Each target is the token after the position that predicts it.
    whole = [*tokens, targets[-1][1]]
    assert [whole[positions[slot] + 1] for slot, _, _ in targets] == [
      token for _, token, _ in targets
    ]


def test_chatml_by_hand():
  tokenizer = chat_templates.make_tokenizer(
    chat_templates.without_blocks(chat_templates.CHATML)
  )
  tokens = encode_text.tokenize(tasks.Chat(TURNS[:2]), tokenizer, "row 1")
  text = "<|im_start|>user\nHi there! <|im_end|>\n<|im_start|>assistant\n"
  head = tokenizer.encode(text, add_special_tokens=False)
  answer = tokenizer.encode(
    "Hello. What\nis it?<|im_end|>", add_special_tokens=False
  )
  line = tokenizer.encode("\n", add_special_tokens=False)
  assert list(tokens.ids) == [*head, *answer, *line]
  assert [i for i, learned in enumerate(tokens.learned) if learned] == list(
    range(len(head), len(head) + len(answer))
  )


def test_only_the_completion_s_turns_are_learned(marked, unmarked):
  form = tasks.formatted("own", "completion")
  row = _row(prompt=TURNS[:3], completion=TURNS[3:])
  for tokenizer in (marked, unmarked):
    whole = encode_text.tokenize(tasks.Chat(TURNS), tokenizer, "row 1")
    part = encode_text.tokenize(form.read_document(row), tokenizer, "row 1")
    assert part.ids == whole.ids
    last = max(
      i
      for i, learned in enumerate(whole.learned)
      if not learned and any(whole.learned[i:])
    )
    assert part.learned == tuple(
      learned and i > last for i, learned in enumerate(whole.learned)
    )


def test_completions_end(unmarked):
  form = tasks.formatted("own", "completion")
  row = _row(prompt="Where is it?", completion=" On the mat.")
  tokens = encode_text.tokenize(form.read_document(row), unmarked, "row 1")
  ids = unmarked.encode("Where is it? On the mat.")  # with <s>
  assert list(tokens.ids) == [*ids, unmarked.eos_token_id]
  learned = [
    i for i, is_learned in zip(tokens.ids, tokens.learned) if is_learned
  ]
  assert unmarked.decode(learned) == " On the mat.</s>"
  question = encode_prompts.encode_question(form, row, unmarked, max_length=99)
  assert list(question.tokens) == unmarked.encode("Where is it?")
  assert question.answers == ("On the mat.",)


def test_every_token_of_a_text_is_learned(unmarked):
  form = tasks.formatted("own", "text")
  row = _row(text="A day.</s>")
  example = encode_options.encode(form, row, unmarked, max_length=99)
  tokens, _, targets, _ = example.rows[0]
  ids = [*unmarked.encode("A day."), unmarked.eos_token_id]
  assert list(tokens) == ids[:-1]
  assert [token for _, token, _ in targets] == ids[1:]
  cut = encode_options.encode(
    form, row, unmarked, max_length=3, long_rows="truncate"
  )
  assert list(cut.rows[0].tokens) == [ids[0], *ids[-3:-1]]
  with pytest.raises(encode_options.TooLongError, match="row 1: the row is"):
    encode_options.encode(form, row, unmarked, max_length=3)


def test_the_prompt_of_a_chat(unmarked):
  row = _row(messages=TURNS)
  question = encode_prompts.encode_question(FORM, row, unmarked, max_length=999)
  text = unmarked.apply_chat_template(
    list(TURNS[:3]), tokenize=False, add_generation_prompt=True
  )
  assert list(question.tokens) == unmarked.encode(
    text, add_special_tokens=False
  )
  assert question.answers == ("Down the road.",)
  new = encode_prompts.encode_question(
    FORM, _row(messages=TURNS[:3]), unmarked, max_length=999, labelled=False
  )
  assert new.tokens == question.tokens and new.answers == ()


def _parts(*texts):
  return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
  "form, fields",
  [
    ("messages", {"messages": TURNS}),
    ("completion", {"prompt": "Q: ", "completion": "A"}),
    ("completion", {"prompt": "Q:\n\n", "completion": "A"}),
    ("completion", {"prompt": "Q:", "completion": " A"}),
  ],
)
@pytest.mark.parametrize(
  "template", [*chat_templates.TEMPLATES.values(), THINK]
)
def test_a_prompt_is_what_an_answer_is_learned_after(template, form, fields):
  tokenizer = chat_templates.make_tokenizer(template)
  form, row = tasks.formatted("own", form), _row(**fields)
  question = encode_prompts.encode_question(form, row, tokenizer, max_length=99)
  tokens = encode_text.tokenize(form.read_document(row), tokenizer, "row 1")
  last = len(tokens.ids) - tokens.learned[::-1].index(True)
  length = tokens.learned[:last][::-1].index(False)
  assert question.tokens == tokens.ids[: last - length]
  prompt = fields.get("prompt", tokenizer.decode(question.tokens))
  assert question.prompt == prompt


WARNINGS = [
  (chat_templates.CHATML, tasks.Chat(TURNS[:2]), "<|im_end|>", []),
  (chat_templates.LLAMA3, tasks.Chat(TURNS), "<|eot_id|>", []),
  (chat_templates.MISTRAL, tasks.Chat(TURNS), "</s>", []),
  (THINK, tasks.Chat(TURNS), "<|im_end|>", ["before an answer, and ''"]),
  (PLAIN_ENDS, tasks.Chat(TURNS), None, ["'.' is the last token that is"]),
  (PLAIN_ENDS, tasks.Plain("Q:", " A"), None, []),
  (None, tasks.Plain("Q:", " A"), None, []),
  ("{{ raise_exception('no') }}", tasks.Plain("Q:", " A"), None, []),
]


@pytest.mark.parametrize("template, document, end, reasons", WARNINGS)
def test_the_end_of_a_turn(template, document, end, reasons):
  for blocks in (True, False):
    if template and not blocks:
      template = chat_templates.without_blocks(template)
    tokenizer = chat_templates.make_tokenizer(template)
    expected = end and tokenizer.convert_tokens_to_ids(end)
    assert encode_text.end_of_turn(tokenizer) == expected
    texts = [*encode_text.warnings(document, tokenizer, "row 1")]
    assert len(texts) == len(reasons)
    assert all(r in text for r, text in zip(reasons, texts))


def test_texts_without_an_end():
  tokenizer = chat_templates.make_tokenizer()
  tokenizer.eos_token = None
  (text,) = encode_text.warnings(tasks.Plain("", "Hi."), tokenizer, "row 1")
  assert "'.' is the last token that is learned, and not a special" in text


def test_turns_that_are_not_learned(marked, unmarked):
  row = _row(messages=[{**TURNS[i], "weight": i // 3} for i in range(4)])
  for tokenizer in (marked, unmarked):
    tokens = encode_text.tokenize(FORM.read_document(row), tokenizer, "row 1")
    only = tasks.Chat(TURNS, start=3)
    assert tokens == encode_text.tokenize(only, tokenizer, "row 1")


def test_blocks_without_spaces(marked, template):
  tokenizer = chat_templates.make_tokenizer(
    template.replace("{% generation %}", "{%-generation-%}")
  )
  chat = tasks.Chat(TURNS)
  assert encode_text.tokenize(chat, tokenizer, "row 1") == encode_text.tokenize(
    chat, marked, "row 1"
  )
  # What is marked is learned, whatever it is.
  tokenizer.chat_template = (
    "{% for m in messages %}{%generation%}{{ m.role + m.content }}"
    "{%endgeneration%}{% endfor %}"
  )
  assert all(encode_text.tokenize(chat, tokenizer, "row 1").learned)


@pytest.mark.parametrize(
  "form, fields, question, answer",
  [
    ("question", {"question": "Who?", "answer": ["I", "we"]}, "Who?", "I"),
    ("question", {"question": "Who?", "answer": {"text": "I"}}, "Who?", "I"),
    ("question", {"question": "1 + 2", "answer": 3}, "1 + 2", "3"),
    ("alpaca", {"instruction": "Add", "output": "3"}, "Add", "3"),
    (
      "alpaca",
      {"instruction": "Add", "input": "1, 2", "output": "3"},
      "Add\n\n1, 2",
      "3",
    ),
    (
      "conversations",
      {
        "conversations": [
          {"from": "human", "value": "Add"},
          {"from": "gpt", "value": "3"},
        ]
      },
      "Add",
      "3",
    ),
    (
      "messages",
      {
        "messages": [
          {"role": "user", "content": _parts("A", "dd")},
          {"role": "assistant", "content": _parts("3"), "weight": 1},
        ]
      },
      "Add",
      "3",
    ),
    ("dolly", {"instruction": "Add", "response": "3"}, "Add", "3"),
    (
      "dolly",
      {"instruction": "Add", "context": "1, 2", "response": "3"},
      "Add\n\n1, 2",
      "3",
    ),
  ],
)
def test_other_columns_become_a_chat(form, fields, question, answer):
  assert tasks.recognise(fields) == form
  chat = tasks.formatted("own", form).read_document(_row(**fields))
  assert chat.messages == (
    {"role": "user", "content": question},
    {"role": "assistant", "content": answer},
  )


def _said(*roles, **more):
  return [{"role": role, "content": "x", **more} for role in roles]


@pytest.mark.parametrize(
  "messages, reason",
  [
    ("Hi", 'holds "Hi"; expected a list of messages'),
    ([], "expected a list of messages"),
    (["Hi"], 'message 1 .* is "Hi"; expected an object'),
    (_said("assistant"), "message 1 .* 'assistant' after nothing"),
    (_said("user", "system", "assistant"), "message 2 .* 'system' after user"),
    (_said("user", "assistant", "assistant"), "message 3 .* after assistant"),
    (_said("user"), "no message of the assistant"),
    (_said("user", "bot"), "message 2 .* has the role 'bot'; expected one of"),
    (_said("user", "tool"), "message 2 .* calls a tool"),
    (_said("user", "assistant", tool_calls=[{}]), "message 1 .* calls a tool"),
    (_said("user", "assistant", mood="ok"), "message 1 .* has the key 'mood'"),
    ([{"role": "user", "content": " "}], "message 1 .* has no content"),
    ([{"role": "user", "content": 3}], "content of type int; expected text"),
    ([{"role": "user"}], "message 1 .* has no content"),
    ([[{"role": "user", "content": "x"}]], "message 1 .*; expected an object"),
    (_said("system"), "no message of the assistant"),
    (_said("user", name=3), "message 1 .* has name of type int"),
    (_said("user", "assistant", name="\ud83d"), "half of a surrogate pair"),
    ([{"from": "chatgpt", "value": "x"}], "has the role 'chatgpt'"),
    ([{"from": "human", "value": ["x"]}], "content of type list"),
    (
      [{"role": "user", "content": [*_parts("x"), {"type": "image"}]}],
      "content of type list",
    ),
    (_said("user", function_call={"name": "f"}), "message 1 .* calls a tool"),
    (_said("user", "assistant", weight=2), "message 1 .* the weight 2; expe"),
    (_said("user", "developer"), "message 2 .* 'system' after user"),
  ],
)
def test_broken_chats_are_named(messages, reason):
  with pytest.raises(errors.RowError, match=f"^row 1: .*{reason}"):
    FORM.check(_row(messages=messages))


HI = {"prompt": _said("user")}


@pytest.mark.parametrize(
  "form, fields, reason",
  [
    ("conversations", {"conversations": None}, "holds null; expected a list"),
    ("completion", {"prompt": "a"}, "no column 'completion'"),
    ("completion", {"prompt": "a", "completion": ""}, "'completion' is empty"),
    ("completion", {"prompt": " ", "completion": "b"}, "'prompt' is empty"),
    (
      "completion",
      {"prompt": "a", "completion": _said("assistant")},
      "ed text",
    ),
    ("completion", {**HI, "completion": "b"}, "expected a list of messages"),
    ("completion", {**HI, "completion": _said("user")}, "no message of the as"),
    (
      "completion",
      {"prompt": _said("user", "assistant"), "completion": _said("assistant")},
      "message 3 .* after assistant",
    ),
    ("alpaca", {"instruction": "a", "output": " "}, "'output' is empty"),
    ("alpaca", {"instruction": "a", "output": 3}, "of type int; expected text"),
    (
      "alpaca",
      {"instruction": "a", "input": {"b": 1}, "output": "c"},
      "'input' holds .* of type dict; expected text",
    ),
    ("question", {"question": "a", "answer": None}, "'answer' is empty"),
    (
      "question",
      {"question": "a", "answer": {"text": []}},
      "'answer' is empty",
    ),
    ("question", {"question": "a", "answer": {"b": "c"}}, "a list of texts"),
    ("question", {"question": 3, "answer": "b"}, "of type int; expected text"),
    ("text", {"text": ""}, "'text' is empty"),
    ("text", {"text": ["a"]}, "of type list; expected text"),
    ("text", {"text": "a \ud83d"}, "half of a surrogate pair"),
    ("text", {"texts": "a"}, "no column 'text'.* Did you mean 'texts'"),
  ],
)
def test_broken_rows_are_named(form, fields, reason):
  with pytest.raises(errors.RowError, match=f"^row 1: .*{reason}"):
    tasks.formatted("own", form).check(_row(**fields))


def test_what_a_template_refuses_is_a_bad_row():
  tokenizer = chat_templates.make_tokenizer(chat_templates.MISTRAL)
  chat = tasks.Chat((TURNS[0], *TURNS[:2]))
  with pytest.raises(errors.RowError, match=r"row 1: .*roles must alternate"):
    encode_text.tokenize(chat, tokenizer, "row 1")


@pytest.mark.parametrize("template", [None, 5, {"tool_use": PLAIN_ENDS}])
def test_a_tokenizer_without_template_says_how_to_give_one(template):
  tokenizer = chat_templates.make_tokenizer(template)
  with pytest.raises(errors.UserError, match=r"chat_template\.jinja") as raised:
    encode_text.tokenize(tasks.Chat(TURNS), tokenizer, "row 1")
  assert not isinstance(raised.value, errors.RowError)


def test_a_template_that_drops_content_is_named():
  tokenizer = chat_templates.make_tokenizer(
    "{% for m in messages %}{{ m['role'] }}{% endfor %}"
  )
  with pytest.raises(
    errors.RowError, match="changes the text around message 2"
  ):
    encode_text.tokenize(tasks.Chat(TURNS[:2]), tokenizer, "row 1")


def test_thoughts_that_a_template_rewrites_are_named():
  tokenizer = chat_templates.make_tokenizer(THINK)
  answer = {"role": "assistant", "content": "<think>Hm.</think>Hello."}
  with pytest.raises(errors.RowError, match=r"rewrites the thoughts .* 2, so"):
    encode_text.tokenize(tasks.Chat((TURNS[0], answer)), tokenizer, "row 1")
