"""Finds the folder of a checkpoint: a local one, or one from the hub.

From the hub only what is read comes: configuration, tokenizer and safetensors,
and the two older formats of the weights where a repository has nothing else.
"""

import pathlib
import re

from zofo_jax import errors

# Weights by preference; a folder or a repository may hold several formats.
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
MSGPACK = ("flax_model.msgpack", "flax_model.msgpack.index.json")
TORCH = ("pytorch_model.bin", "pytorch_model.bin.index.json")

# Not all JSON: an index without its files would look like weights.
_TEXT = (
  "config.json",
  "generation_config.json",
  "tokenizer*",
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template*",
  "vocab.json",
  "merges.txt",
)
_PATTERNS = {
  SAFETENSORS: ("model*.safetensors", SAFETENSORS[1]),
  MSGPACK: ("flax_model*.msgpack", MSGPACK[1]),
  TORCH: ("pytorch_model*.bin", TORCH[1]),
}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def locate(
  name_or_folder: str | pathlib.Path, revision: str | None = None
) -> pathlib.Path:
  """Returns the local folder of a checkpoint, fetching it if needed.

  Args:
    name_or_folder: a folder, used as it is, or a hub id such as
      "facebook/opt-125m".
    revision: branch, tag or commit of the hub's repository.

  Returns:
    A folder with config.json and weights.

  Raises:
    UserError: the folder is no checkpoint, or the hub cannot give one.
  """
  name = str(name_or_folder)
  folder = pathlib.Path(name).expanduser()
  if folder.exists():
    return _checked(folder)
  path_like = name.startswith((".", "~", "/")) or "\\" in name
  if path_like or not _HUB_ID.fullmatch(name):
    raise errors.UserError(
      f"The model folder {name} does not exist;"
      " expected a folder or a hub id such as facebook/opt-125m."
    )
  return _checked(_download(name, revision))


def weights_format(folder: pathlib.Path) -> tuple[str, str] | None:
  """Returns the preferred format of which the folder holds weights, if any."""
  for names in _PATTERNS:
    if any((folder / name).is_file() for name in names):
      return names
  return None


def text_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns a checkpoint's files that are no weights."""
  return sorted(path for pattern in _TEXT for path in folder.glob(pattern))


def _checked(folder: pathlib.Path) -> pathlib.Path:
  """Returns the folder if it holds a checkpoint."""
  missing = []
  if not (folder / "config.json").is_file():
    missing.append("config.json")
  if weights_format(folder) is None:
    missing.append("model.safetensors")
  if missing:
    raise errors.UserError(
      f"{folder} is no checkpoint: it has no {' and no '.join(missing)}."
    )
  return folder


def _download(name: str, revision: str | None) -> pathlib.Path:
  """Fetches a repository, from the hub's cache where there is no network."""
  # Imported here: it takes half a second, and a local folder needs none of it.
  import huggingface_hub
  from huggingface_hub import errors as hub_errors

  def fetch(*patterns: str) -> pathlib.Path:
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        name, revision=revision, allow_patterns=list(patterns)
      )
    )

  at = f" at revision {revision}" if revision else ""
  try:
    for patterns in _PATTERNS.values():
      folder = fetch(*_TEXT, *patterns)
      if weights_format(folder):
        break
    return folder
  except hub_errors.GatedRepoError:
    problem = (
      "is gated: accept its terms on huggingface.co and run `hf auth login`"
    )
  except hub_errors.RevisionNotFoundError:
    problem = "has no such revision on the hub"
  except hub_errors.RepositoryNotFoundError:
    problem = "is neither a folder here nor a repository of the hub"
  except hub_errors.LocalEntryNotFoundError:
    problem = (
      "is not a folder here nor in the hub's cache, and the hub cannot be"
      " reached"
    )
  except hub_errors.HFValidationError:
    problem = "is neither a folder here nor a valid hub id"
  except Exception as error:  # the layers below have many of their own
    # The first line says what happened; the rest is for experts.
    reason = (str(error) or type(error).__name__).splitlines()[0]
    problem = f"could not be fetched from the hub ({reason.rstrip('. ')})"
  raise errors.UserError(f"The model {name}{at} {problem}.")
