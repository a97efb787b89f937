"""Weights of a Hugging Face checkpoint folder to and from our parameter tree.

Reads safetensors (one file or several with an index), Flax's msgpack and
PyTorch's .bin. Every format is seen as names of tensors in PyTorch's layout;
tensors go one by one into stacked arrays allocated once, so that a load needs
one copy of the weights beside the one in the file.
"""

import functools
import json
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import flax.serialization
import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from zofo_jax import errors
from zofo_jax.models import hub

# Buffers that some versions of transformers saved; they hold no weight.
_BUFFERS = re.compile(
  r"(rotary_emb\.(inv_freq|(cos|sin)_cached)|masked_bias|position_ids)$"
)


class Stored(NamedTuple):
  """A tensor of a checkpoint that is not read yet.

  Attributes:
    shape: its shape in PyTorch's layout, matrices [out, in].
    read: returns it as an array of that shape in the file's dtype.
  """

  shape: tuple[int, ...]
  read: Callable[[], np.ndarray]


def load(
  folder: str | pathlib.Path,
  family: ModuleType,
  config: Any,
  dtype: Any,
  *,
  pickle: bool = False,
) -> dict[str, Any]:
  """Reads a checkpoint folder.

  Args:
    folder: has weights in one of the formats above.
    family: module with `Model` and `hf_parameters`, such as `models.opt`.
    config: the family's configuration.
    dtype: of the returned weights, whatever the file has.
    pickle: whether PyTorch's .bin, which is a pickle, may be opened.

  Returns:
    base, nested dict of NumPy arrays: what `Model(config).init` returns under
    "params", layers stacked on axis 0.

  Raises:
    UserError: a file is broken, or its tensors are not this model's.
  """
  folder = pathlib.Path(folder)
  expected = shapes(family, config)
  stored = {
    _short(name): (name, s)
    for name, s in open_folder(folder, pickle=pickle).items()
  }
  layout = list(_layout(family, config, expected))
  wanted = {_short(name) for _, parts in layout for _, name, _, _ in parts}
  leftover = [
    full for short, (full, _) in stored.items() if short not in wanted
  ]

  def find(name: str, shape: tuple[int, ...]) -> Stored:
    if _short(name) not in stored:
      raise errors.UserError(
        f"The weights in {folder} have no tensor {name}."
        f"{errors.nearest(name, leftover)}"
      )
    full, tensor = stored[_short(name)]
    if tensor.shape != shape:
      raise errors.UserError(
        f"The tensor {full} in {folder} has shape {tensor.shape}, but"
        f" config.json makes it {shape}."
      )
    return tensor

  # Everything is checked before anything large is allocated or read.
  plan = [
    (path, [(i, transpose, find(name, s)) for i, name, transpose, s in parts])
    for path, parts in layout
  ]
  _check_leftover(folder, leftover)
  flat = {}
  for path, tensors in plan:
    flat[path] = np.empty(expected[path], dtype)
    for index, transpose, tensor in tensors:
      # Casting before the transposed write is twice as fast as within it.
      value = tensor.read().astype(dtype, copy=False)
      flat[path][index] = value.T if transpose else value
  return flax.traverse_util.unflatten_dict(flat, sep="/")


def save(
  folder: str | pathlib.Path,
  family: ModuleType,
  config: Any,
  base: Mapping[str, Any],
  shard_bytes: int = 5 * 10**9,
) -> None:
  """Writes weights as safetensors under Hugging Face's names.

  Args:
    folder: written to; created if it does not exist.
    family: module with `Model` and `hf_parameters`, such as `models.opt`.
    config: the family's configuration.
    base: nested dict of arrays, layers stacked on axis 0.
    shard_bytes: a file larger than this is split, and an index written.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  flat = flax.traverse_util.flatten_dict(dict(base), sep="/")
  tensors = [
    (name, path, index, transpose)
    for path, parts in _layout(family, config, shapes(family, config))
    for index, name, transpose, _ in parts
  ]
  shards: list[list[tuple]] = [[]]
  total = filled = 0
  for tensor in tensors:
    leaf = flat[tensor[1]]
    size = leaf.nbytes // (leaf.shape[0] if isinstance(tensor[2], int) else 1)
    if shards[-1] and filled + size > shard_bytes:
      shards.append([])
      filled = 0
    shards[-1].append(tensor)
    filled += size
    total += size

  single, index_name = hub.SAFETENSORS
  weight_map = {}
  for number, shard in enumerate(shards, 1):
    file = single
    if len(shards) > 1:
      file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    values = {}
    for name, path, index, transpose in shard:
      value = np.asarray(flat[path][index])
      values[name] = np.ascontiguousarray(value.T if transpose else value)
      weight_map[name] = file
    temporary = folder / f".{file}"
    # transformers refuses a file that does not say what it was made for.
    safetensors.numpy.save_file(values, temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / file)
  # Of two formats side by side one would be stale.
  if len(shards) == 1:
    (folder / index_name).unlink(missing_ok=True)
  else:
    (folder / single).unlink(missing_ok=True)
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / index_name).write_text(json.dumps(content, indent=2) + "\n")


@functools.lru_cache(maxsize=16)
def shapes(family: ModuleType, config: Any) -> dict[str, tuple[int, ...]]:
  """Returns the shape of every weight of a model by its path."""
  rows = jax.ShapeDtypeStruct((1, 1), np.int32)
  tree = jax.eval_shape(
    family.Model(config).init, jax.random.key(0), rows, rows, rows, rows, rows
  )
  flat = flax.traverse_util.flatten_dict(tree["params"], sep="/")
  return {path: leaf.shape for path, leaf in flat.items()}


def open_folder(
  folder: pathlib.Path, *, pickle: bool = False
) -> dict[str, Stored]:
  """Opens the weights of a folder without reading them, where possible.

  Args:
    folder: has weights in one of the formats above; the first is taken.
    pickle: whether PyTorch's .bin, which is a pickle, may be opened.

  Returns:
    Every tensor by its name in the file, in PyTorch's naming and layout.

  Raises:
    UserError: there are no weights, or a file is missing or broken.
  """
  formats = {
    hub.SAFETENSORS: open_safetensors,
    hub.MSGPACK: _open_msgpack,
    hub.TORCH: _open_torch,
  }
  names = hub.weights_format(folder)
  if names is None:
    raise errors.UserError(
      f"{folder} has no weights: neither {', '.join(n for n, _ in formats)}."
    )
  if names == hub.TORCH and not pickle:
    raise errors.UserError(
      f"The weights in {folder} are pickles of PyTorch, which may hide code; "
      "expected safetensors, or --config.model.pickle to read them, as weights "
      "alone."
    )
  stored = {}
  for path in _files(folder, names):
    stored.update(formats[names](path))
  return stored


def _short(name: str) -> str:
  """Drops the prefixes that versions of a checkpoint differ in."""
  return re.sub(r"^(model\.)?(decoder\.)?", "", name)


def _layout(
  family: ModuleType, config: Any, expected: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, list[tuple[Any, str, bool, tuple[int, ...]]]]]:
  """Yields each path with its tensors: (index, name, transpose, shape)."""
  for path, (name, transpose) in family.hf_parameters(config).items():
    shape = expected[path]
    stacked = "{layer}" in name
    one = shape[1:] if stacked else shape
    one = one[::-1] if transpose else one
    indices = range(shape[0]) if stacked else (...,)
    yield path, [(i, name.format(layer=i), transpose, one) for i in indices]


def _check_leftover(folder: pathlib.Path, names: list[str]) -> None:
  """Refuses tensors that the model has no place for."""
  # A tied head is often saved beside the embedding that it equals.
  names = [n for n in names if not _BUFFERS.search(n) and n != "lm_head.weight"]
  if names:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    raise errors.UserError(
      f"The weights in {folder} have tensors that config.json has no place"
      f" for: {', '.join(names[:3])}{more}."
    )


def _files(folder: pathlib.Path, names: tuple[str, str]) -> list[pathlib.Path]:
  """Returns the file of a format, or those that its index names."""
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
      f"{index} is no index of weights; expected JSON with a weight_map."
    ) from None
  for file in files:
    # The index comes from a stranger; it may name files beside it, no others.
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


def open_safetensors(path: pathlib.Path) -> dict[str, Stored]:
  """Maps one safetensors file into memory."""
  try:
    file = safetensors.safe_open(path, framework="np")
  except (safetensors.SafetensorError, OSError) as error:
    raise _broken(path, error) from error
  return {
    name: Stored(
      tuple(file.get_slice(name).get_shape()),
      functools.partial(file.get_tensor, name),
    )
    for name in file.keys()
  }


def _open_msgpack(path: pathlib.Path) -> dict[str, Stored]:
  """Reads one file of Flax; its layout becomes PyTorch's."""
  try:
    tree = flax.serialization.msgpack_restore(path.read_bytes())
    flat = flax.traverse_util.flatten_dict(tree.get("params", tree))
  except (ValueError, TypeError, AttributeError) as error:
    raise _broken(path, error) from error
  stored = {}
  for (*module, leaf), value in flat.items():
    if leaf == "kernel":
      value = value.T
    leaf = "bias" if leaf == "bias" else "weight"
    name = ".".join((*module, leaf))
    stored[name] = Stored(value.shape, functools.partial(np.asarray, value))
  return stored


def _open_torch(path: pathlib.Path) -> dict[str, Stored]:
  """Opens one file of PyTorch, weights only: no code in it is run."""
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
      mmap=zipfile.is_zipfile(path),  # older files cannot be mapped
    )
    items = {name: (tuple(t.shape), t) for name, t in tensors.items()}
  except Exception as error:  # torch, zip and pickle each have their own
    raise _broken(path, error) from error

  def read(tensor: Any) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:  # unknown to NumPy, so by its bits
      return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()

  return {
    name: Stored(shape, functools.partial(read, tensor))
    for name, (shape, tensor) in items.items()
  }


def _broken(path: pathlib.Path, error: Exception) -> errors.UserError:
  """Says that a file cannot be read."""
  reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(". ")
  return errors.UserError(
    f"{path} is truncated or broken ({reason}); copy or download it again."
  )
