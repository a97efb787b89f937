"""Locates checkpoints and adapters: local folders, or downloads from the hub.

Only files that are needed are downloaded: configuration, tokenizer and
safetensors; older formats of weights only if a repository has no safetensors.
"""

import pathlib
import re
from collections.abc import Iterable, Sequence

from zofo_jax import errors

# Formats of weights in order of preference.
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
MSGPACK = ("flax_model.msgpack", "flax_model.msgpack.index.json")
TORCH = ("pytorch_model.bin", "pytorch_model.bin.index.json")

# Not *.json: an index without its files would look like weights.
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
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def locate(
  name_or_folder: str | pathlib.Path, revision: str | None = None
) -> pathlib.Path:
  """Returns the local folder of a checkpoint, downloading it if needed.

  Args:
    name_or_folder: a folder, or a hub id such as "facebook/opt-125m".
    revision: branch, tag or commit of the repository on the hub.

  Returns:
    A folder with config.json and weights.

  Raises:
    UserError: the folder is not a checkpoint, or the download failed.
  """
  name = str(name_or_folder)
  folder = pathlib.Path(name)
  if folder.exists():
    return _checked(folder)
  path_like = name.startswith((".", "~", "/")) or "\\" in name
  if path_like or not _HUB_ID.fullmatch(name):
    raise errors.UserError(
      f"The model folder {name} does not exist;"
      " expected a folder or a hub id such as facebook/opt-125m."
    )
  patterns = ((*_TEXT, *weights) for weights in _PATTERNS.values())
  return _checked(_download("model", name, revision, patterns))


def weights_format(folder: pathlib.Path) -> tuple[str, str] | None:
  """Returns the preferred format in which a folder has weights, if any."""
  for names in _PATTERNS:
    if any((folder / name).is_file() for name in names):
      return names
  return None


def text_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the files of a checkpoint that are not weights."""
  return sorted(path for pattern in _TEXT for path in folder.glob(pattern))


def _checked(folder: pathlib.Path) -> pathlib.Path:
  """Returns the folder, or raises a `UserError` if it is not a checkpoint."""
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


def locate_adapter(source: str) -> pathlib.Path:
  """Returns the local folder of an adapter of PEFT, downloading it if needed.

  Args:
    source: a folder, or "hub:owner/name" and perhaps "@revision".

  Raises:
    UserError: the source is no valid id, or the download failed.
  """
  if not source.startswith("hub:"):
    return pathlib.Path(source)
  parts = re.fullmatch(r"hub:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", source)
  if not parts:
    raise errors.UserError(
      f"The adapter '{source}' is no hub id; expected hub:owner/name, and "
      "perhaps @revision."
    )
  return _download("adapter", parts[1], parts[2], [_ADAPTER])


def _download(
  kind: str,
  name: str,
  revision: str | None,
  choices: Iterable[Sequence[str]],
) -> pathlib.Path:
  """Downloads a repository, or finds it in the hub's cache when offline.

  Args:
    kind: of the repository, for messages.
    name: its id.
    revision: branch, tag or commit.
    choices: patterns of files; those of the first that has weights.
  """
  # Imported here because it takes half a second and local folders need none.
  import huggingface_hub
  from huggingface_hub import errors as hub_errors

  at = f" at revision {revision}" if revision else ""
  try:
    for patterns in choices:
      folder = pathlib.Path(
        huggingface_hub.snapshot_download(
          name, revision=revision, allow_patterns=list(patterns)
        )
      )
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
  except Exception as error:  # Network libraries raise many other exceptions.
    # Only the first line is meant for users.
    reason = (str(error) or type(error).__name__).splitlines()[0]
    problem = f"could not be fetched from the hub ({reason.rstrip('. ')})"
  raise errors.UserError(f"The {kind} {name}{at} {problem}.")
