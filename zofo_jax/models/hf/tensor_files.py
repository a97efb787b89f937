"""Reads weight files: safetensors, Flax's msgpack, PyTorch's .bin.

All formats are presented as named tensors in PyTorch's layout, which are read
one at a time; of safetensors, parts of a tensor can be read.
"""

import functools
import hashlib
import json
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.serialization
import flax.traverse_util
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from zofo_jax import errors
from zofo_jax.models.hf import hub

# A part of an array: a slice for each axis.
Index = tuple[slice, ...]
# Of `digests`: how many blocks, and their bytes.
_NUM_BLOCKS, _BLOCK = 16, 2**20


class LazyTensor(NamedTuple):
  """A tensor of a checkpoint that has not been read yet.

  Attributes:
    shape: shape in PyTorch's layout, matrices [out, in].
    part: index -> that part of the tensor, in the file's dtype; () for all.
  """

  shape: tuple[int, ...]
  part: Callable[[Index], np.ndarray]

  def read(self) -> np.ndarray:
    """Returns the whole tensor."""
    return self.part(())


def open_folder(
  folder: pathlib.Path, *, pickle: bool = False
) -> dict[str, LazyTensor]:
  """Opens the weights of a folder, lazily where the format permits.

  Args:
    folder: folder with weights; if there are several formats, safetensors is
      preferred to msgpack, and msgpack to .bin.
    pickle: whether PyTorch's .bin, which is a pickle, may be opened.

  Returns:
    Tensors by name, with PyTorch's names and layout.

  Raises:
    UserError: there are no weights, or a file is missing or corrupt.
  """
  formats = {
    hub.SAFETENSORS: open_safetensors,
    hub.MSGPACK: _open_msgpack,
    hub.TORCH: _open_torch,
  }
  names = _format(folder)
  if names == hub.TORCH and not pickle:
    raise errors.UserError(
      f"The weights in {folder} are pickles of PyTorch, which may hide code; "
      "expected safetensors, or --config.model.pickle to read them, as weights "
      "alone."
    )
  tensors = {}
  for path in _files(folder, names):
    tensors.update(formats[names](path))
  return tensors


def digests(folder: pathlib.Path) -> dict[str, str]:
  """Returns a digest of each file of weights, quickly.

  Of a large file, its size and 16 blocks count: other weights differ in all of
  them.

  Args:
    folder: as for `open_folder`.

  Raises:
    UserError: there are no weights, or a file is missing.
  """
  files = _files(folder, _format(folder))
  return {path.name: _digest(path) for path in files}


def _digest(path: pathlib.Path) -> str:
  size = path.stat().st_size
  digest = hashlib.blake2b(str(size).encode(), digest_size=16)
  # From the first byte to the last; of a small file, everything.
  last = max(size - _BLOCK, 0)
  with path.open("rb") as file:
    for start in np.linspace(0, last, _NUM_BLOCKS).astype(int).tolist():
      file.seek(start)
      digest.update(file.read(_BLOCK))
  return digest.hexdigest()


def _format(folder: pathlib.Path) -> tuple[str, str]:
  """Returns the names of a file of weights, and of the index of several."""
  names = hub.weights_format(folder)
  if names is None:
    formats = hub.SAFETENSORS, hub.MSGPACK, hub.TORCH
    raise errors.UserError(
      f"{folder} has no weights: neither {', '.join(n for n, _ in formats)}."
    )
  return names


def _files(folder: pathlib.Path, names: tuple[str, str]) -> list[pathlib.Path]:
  """Returns the single file of a format, or the files listed in its index."""
  single, index_name = names
  if (folder / single).is_file():
    return [folder / single]
  index = folder / index_name
  try:
    files = sorted(
      set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    )
  except (ValueError, KeyError, TypeError, AttributeError):
    raise errors.UserError(
      f"{index} is not an index of weights; expected JSON with a weight_map."
    ) from None
  for file in files:
    # The index is untrusted; it may only name files in its own folder.
    if (
      not isinstance(file, str)
      or file in ("", ".", "..")
      or re.search(r"[/\\:]", file)
    ):
      raise errors.UserError(
        f"{index} names {file!r}, which is not a plain file name."
      )
    if not (folder / file).is_file():
      raise errors.UserError(
        f"{index} names {file}, which is not in that folder."
      )
  return [folder / file for file in files]


def write_safetensors(
  path: pathlib.Path, tensors: Mapping[str, np.ndarray]
) -> None:
  """Writes a file for transformers and peft, atomically."""
  temporary = path.with_name(f".{path.name}")
  temporary.touch()
  mode = temporary.stat().st_mode  # The umask's; safetensors would use 0600.
  # transformers rejects files without this metadata.
  metadata = {"format": "pt"}
  safetensors.numpy.save_file(dict(tensors), temporary, metadata=metadata)
  temporary.chmod(mode)
  os.replace(temporary, path)


def open_safetensors(path: pathlib.Path) -> dict[str, LazyTensor]:
  """Opens one safetensors file as a memory map."""
  try:
    file = safetensors.safe_open(path, framework="np")
  except (safetensors.SafetensorError, OSError) as error:
    raise _broken(path, error) from error

  def part(name: str, index: Index) -> np.ndarray:
    return file.get_slice(name)[index] if index else file.get_tensor(name)

  return {
    name: LazyTensor(
      tuple(file.get_slice(name).get_shape()), functools.partial(part, name)
    )
    for name in file.keys()
  }


def _open_msgpack(path: pathlib.Path) -> dict[str, LazyTensor]:
  """Reads one of Flax's msgpack files, converted to PyTorch's layout."""
  try:
    tree = flax.serialization.msgpack_restore(path.read_bytes())
    flat = flax.traverse_util.flatten_dict(tree.get("params", tree))
  except (ValueError, TypeError, AttributeError) as error:
    raise _broken(path, error) from error
  tensors = {}
  for (*module, leaf), value in flat.items():
    if leaf == "kernel":
      value = value.T
    leaf = "bias" if leaf == "bias" else "weight"
    name = ".".join((*module, leaf))
    tensors[name] = LazyTensor(value.shape, value.__getitem__)
  return tensors


def _open_torch(path: pathlib.Path) -> dict[str, LazyTensor]:
  """Opens one of PyTorch's files, weights only: no code in it is run."""
  try:
    import torch
  except ImportError:
    raise errors.UserError(
      f"Reading {path} needs PyTorch, which is not installed;"
      " run: pip install torch"
    ) from None
  try:
    tensors = torch.load(
      path,
      map_location="cpu",
      weights_only=True,
      mmap=zipfile.is_zipfile(path),  # Older files cannot be mapped.
    )
    items = {name: (tuple(t.shape), t) for name, t in tensors.items()}
  except Exception as error:  # torch, zipfile and pickle raise different ones.
    raise _broken(path, error) from error

  def part(tensor: Any, index: Index) -> np.ndarray:
    tensor = tensor[index]
    if tensor.dtype == torch.bfloat16:  # NumPy has none; reinterpret the bits.
      return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()

  return {
    name: LazyTensor(shape, functools.partial(part, tensor))
    for name, (shape, tensor) in items.items()
  }


def _broken(path: pathlib.Path, error: Exception) -> errors.UserError:
  """Returns the error for a file that cannot be read."""
  reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(". ")
  return errors.UserError(
    f"{path} is truncated or broken ({reason}); copy or download it again."
  )
