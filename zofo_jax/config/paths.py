"""Paths and texts as a shell or a config file gives them."""

import os
import pathlib
import re

# "gs://bucket/run", "hub:owner/name"
_NO_LOCAL_PATH = re.compile(r"\w+://|hub:")
_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\\": "\\"}


def expand(path: str) -> str:
  """Returns a path as its users read it: without "~" or a slash at the end.

  A relative path stays relative to the current folder, which `config.json`
  has, too: see `from_folder`.

  Args:
    path: a path, a hub id, "gs://...", "hub:..." or "".

  Examples:
    >>> expand("./rows/")
    'rows'
    >>> expand("gs://bucket/run")
    'gs://bucket/run'
  """
  if not path or _NO_LOCAL_PATH.match(path):
    return path
  # Not pathlib's, which raises where there is no such user.
  return str(pathlib.Path(os.path.expanduser(path)))


def from_folder(folder: str, path: str) -> str:
  """Returns what a relative path led to from another current folder.

  Args:
    folder: that folder.
    path: a path or a name; unchanged if it led nowhere.
  """
  other = os.path.join(folder, path)
  return other if path and os.path.exists(other) else path


def resolve(path: str) -> str:
  """Returns the one name of what a path leads to; a mere name is unchanged."""
  path = expand(path)
  return os.path.realpath(path) if os.path.exists(path) else path


def unescape(text: str) -> str:
  r"""Replaces the escapes \n, \t, \r and \\ by what they stand for.

  Examples:
    >>> unescape(r"Q: {q}\nA:")
    'Q: {q}\nA:'
  """
  return re.sub(r"\\[ntr\\]", lambda match: _ESCAPES[match[0]], text)


def escape(text: str) -> str:
  r"""Returns what `unescape` turns into a text.

  Examples:
    >>> print(escape("\n"))
    \n
  """
  for written, character in reversed(_ESCAPES.items()):
    text = text.replace(character, written)
  return text
