"""Loads built-in tasks through a hub; one process of `hub_test`.

Prints what became of each call. `huggingface_hub` reads its settings when it
is imported, hence a process for each setting.

python -m tests.data.hub_session '[["load", "sst2", null, "train"], ...]'
"""

import json
import os
import sys
import urllib.request

from zofo_jax import errors, tasks
from zofo_jax.data import hub, sources
from zofo_jax.models.hf import hub as models_hub


def _call(verb, name, source, split):
  try:
    if verb == "faults":
      url = f"{os.environ['HF_ENDPOINT']}/faults"
      with urllib.request.urlopen(url, json.dumps(name).encode()) as answer:
        return json.load(answer)
    if verb == "model":
      return sorted(path.name for path in models_hub.locate(name).iterdir())
    if verb == "adapter":
      place = models_hub.locate_adapter(name)
      return {path.name: path.read_text() for path in place.iterdir()}
    task = tasks.get(name)
    if verb == "find":
      return hub.find_splits(task)
    if verb == "has":
      return sources.has_split(task, source, split)
    draw = hub.Stream(seed=0, num_rows=3) if verb == "draw" else None
    rows = sources.load(task, source, split, stream=draw)
    return [[row.source, dict(row.fields)] for row in rows]
  except errors.UserError as error:
    return str(error)


if __name__ == "__main__":
  calls = json.loads(sys.argv[1])
  print(json.dumps([_call(*call) for call in calls], default=str))
