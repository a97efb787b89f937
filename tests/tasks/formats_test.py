"""Chats that are asked, and chats that are answered."""

import pytest

from zofo_jax import errors, tasks

ASK = {"role": "user", "content": "Hi?"}
REPLY = {"role": "assistant", "content": "Hello."}
BYE = {"role": "assistant", "content": "Bye."}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
  "form, fields, expected",
  [
    ("messages", {"messages": [SYSTEM, ASK]}, {"messages": [SYSTEM, ASK, BYE]}),
    # An answer that is there is replaced, and earlier turns stay.
    (
      "messages",
      {"messages": [ASK, REPLY, ASK, REPLY], "id": 1},
      {"messages": [ASK, REPLY, ASK, BYE]},
    ),
    (
      "conversations",
      {"conversations": [{"from": "human", "value": "Hi?", "role": None}]},
      {
        "conversations": [
          {"from": "human", "value": "Hi?", "role": None},
          {"from": "gpt", "value": "Bye."},
        ]
      },
    ),
    ("completion", {"prompt": [SYSTEM, ASK]}, {"completion": [BYE]}),
    ("completion", {"prompt": "Hi"}, {}),
  ],
)
def test_answers_are_messages(form, fields, expected):
  task = tasks.formatted("support", form)
  row = tasks.Row(fields, "row 1")
  task.check(row, labelled=False)
  assert task.answered(fields, "Bye.") == expected
  if expected and form != "completion":  # which may be learned from
    task.check(tasks.Row(expected, "row 1"))
    asked = task.read_document(tasks.Row(expected, "row 1"), labelled=False)
    assert asked == task.read_document(row, labelled=False)


@pytest.mark.parametrize(
  "form, column, messages, role",
  [
    ("messages", "messages", [SYSTEM], "system"),
    ("completion", "prompt", [ASK, REPLY], "assistant"),
  ],
)
def test_chats_are_answered_after_the_user(form, column, messages, role):
  task = tasks.formatted("support", form)
  with pytest.raises(
    errors.UserError,
    match=f"row 1: column '{column}' ends in a message of the {role}; "
    "expected one of the user",
  ):
    task.check(tasks.Row({column: messages}, "row 1"), labelled=False)
