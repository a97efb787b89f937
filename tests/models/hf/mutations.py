"""Random changes of JSON files, for tests of their readers."""

import random

VALUES = [
  *(None, True, False, 0, 1, 2, 3, -1, 8, 0.5, 1e9, float("nan"), "", "x"),
  *([], [0], [1], {}, {"a": 1}),
]


def mutate(draw: random.Random, fields, choices):
  """Removes or changes one or two fields.

  Args:
    draw: source of randomness.
    fields: dict of a file.
    choices: further values by field, some of which the file may not have.
  """
  fields = dict(fields)
  for _ in range(draw.choice([1, 1, 2])):
    name = draw.choice([*fields, *choices, "new_option"])
    if draw.random() < 0.1:
      fields.pop(name, None)
    elif name in choices and draw.random() < 0.75:
      fields[name] = draw.choice(choices[name])
    else:
      fields[name] = draw.choice(VALUES)
  return fields


def mutate_anywhere(draw: random.Random, node):
  """Removes or changes one value of a nested structure, in place."""
  while True:
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    key = draw.choice(keys)
    if isinstance(node[key], dict | list) and node[key] and draw.random() < 0.9:
      node = node[key]
    elif draw.random() < 0.2:
      del node[key]
      return
    else:
      node[key] = draw.choice(VALUES)
      return
