"""Loads and saves the weights of Hugging Face checkpoint folders.

Reads safetensors (one or several files), Flax's msgpack and PyTorch's .bin.
Tensors are copied one by one into preallocated stacked arrays, so that loading
needs memory for one copy of the weights. With sharded weights, only the parts
of this process's devices are read.
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from zofo_jax import errors
from zofo_jax.core import perturbed
from zofo_jax.models import decoder
from zofo_jax.models.hf import hub, tensor_files

# Prefixes of names that differ between versions of a checkpoint.
_ROOT = re.compile(
  r"^(model\.|transformer\.|gpt_neox\.|bert\.|roberta\.)?(decoder\.)?"
)
# Buffers saved by some versions of transformers, which are not weights, copies
# of a head's bias, and heads of BERT for other tasks.
_BUFFERS = re.compile(
  r"(rotary_emb\.(inv_freq|(cos|sin)_cached)|masked_bias|position_ids"
  r"|\.(attn|attention)\.bias|(predictions|lm_head)\.decoder\.bias"
  r"|(pooler\.dense|cls\.seq_relationship)\.(weight|bias))$"
)
# How many rows of the embeddings are compared at a time.
_ROWS = 4096

# index -> that part of a weight.
ReadFn = Callable[[tensor_files.Index], np.ndarray]


def _whole(path: str, shape: tuple[int, ...], read: ReadFn) -> np.ndarray:
  """Reads a whole weight as a NumPy array."""
  del path
  return read((slice(None),) * len(shape))


def load(
  folder: str | pathlib.Path,
  family: ModuleType,
  config: Any,
  dtype: Any,
  make: Callable[[str, tuple[int, ...], ReadFn], Any] = _whole,
  *,
  pickle: bool = False,
) -> dict[str, Any]:
  """Reads a checkpoint folder.

  Args:
    folder: folder with weights.
    family: module with `Model` and `hf_parameters`, such as `models.opt`.
    config: the model's hyperparameters.
    dtype: dtype of the returned weights.
    make: (path, shape, read) -> the weight, where read(index) reads a part.
    pickle: whether PyTorch's .bin, which is a pickle, may be opened.

  Returns:
    Nested dict of what `make` returns, with the structure of the "params" of
    `Model(config).init`; layers are stacked on axis 0.

  Raises:
    UserError: a file is corrupt, or its tensors do not match the config.
  """
  folder = pathlib.Path(folder)
  expected = shapes(family, config)
  stored = _open(folder, pickle)
  if config.tied_head:
    embed_name, head_name = _embedding_names(family, config)
    if _differ(*_embeddings(stored, family, config)):
      raise errors.UserError(
        f"config.json ties the head to the embedding, but {head_name} in "
        f"{folder} differs from it; expected tie_word_embeddings to be false."
      )
    # A tied matrix may be stored under either name.
    head = stored.pop(_short(head_name), None)
    if head is not None:
      stored.setdefault(_short(embed_name), head)
  layout = list(_layout(family, config, expected))
  required = {_short(name) for _, parts in layout for _, name, _, _ in parts}
  leftover = [
    full for short, (full, _) in stored.items() if short not in required
  ]

  def find(name: str, shape: tuple[int, ...]) -> tensor_files.LazyTensor:
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

  # Check everything before anything large is allocated or read.
  plan = [
    (path, [(i, transpose, find(name, s)) for i, name, transpose, s in parts])
    for path, parts in layout
  ]
  _check_leftover(folder, leftover)
  flat = {}
  for path, tensors in plan:
    shape = expected[path]
    read = functools.partial(_read, tensors, shape, dtype)
    flat[path] = make(path, shape, read)
  return flax.traverse_util.unflatten_dict(flat, sep="/")


def has_own_head(
  folder: str | pathlib.Path,
  family: ModuleType,
  config: Any,
  *,
  pickle: bool = False,
) -> bool:
  """Returns whether a checkpoint's head differs from its embedding.

  The tensors decide, as in transformers 5, even if config.json ties the two.

  Args:
    folder: folder with weights.
    family: module with `hf_parameters`, such as `models.opt`.
    config: the model's hyperparameters.
    pickle: whether PyTorch's .bin, which is a pickle, may be opened.

  Raises:
    UserError: a file is missing or corrupt.
  """
  stored = _open(pathlib.Path(folder), pickle)
  return _differ(*_embeddings(stored, family, config))


# (the name in the file, the tensor) by the shortened name.
_Stored = dict[str, tuple[str, tensor_files.LazyTensor]]


def _open(folder: pathlib.Path, pickle: bool) -> _Stored:
  """Opens the tensors of a folder."""
  tensors = tensor_files.open_folder(folder, pickle=pickle)
  return {_short(name): (name, tensor) for name, tensor in tensors.items()}


def _embedding_names(family: ModuleType, config: Any) -> tuple[str, str]:
  """Returns the names of the input and of the output embedding."""
  names = family.hf_parameters(dataclasses.replace(config, tied_head=False))
  return names["embed/embedding"][0], names["head/embedding"][0]


def _embeddings(
  stored: _Stored, family: ModuleType, config: Any
) -> list[tensor_files.LazyTensor]:
  """Returns the input and the output embedding, those that there are."""
  names = map(_short, _embedding_names(family, config))
  return [stored[name][1] for name in names if name in stored]


def _differ(*tensors: tensor_files.LazyTensor) -> bool:
  """Returns whether two matrices, if there are two, have other values."""
  if len(tensors) < 2:
    return False
  embed, head = tensors
  if embed.shape != head.shape:
    return True
  size = embed.shape[0]
  for start in range(0, size, _ROWS):
    rows = (slice(start, min(start + _ROWS, size)),)
    if not np.array_equal(embed.part(rows), head.part(rows)):
      return True
  return False


def _read(
  tensors: list[tuple[Any, bool, tensor_files.LazyTensor]],
  shape: tuple[int, ...],
  dtype: Any,
  index: tensor_files.Index,
) -> np.ndarray:
  """Reads a part of a weight from its (layer or ..., transpose, tensor)s."""
  bounds = [range(*s.indices(n)) for s, n in zip(index, shape, strict=True)]
  part = np.empty([len(bound) for bound in bounds], dtype)
  for layer, transpose, tensor in tensors:
    stacked = layer is not ...
    if stacked and layer not in bounds[0]:
      continue
    inner = [slice(b.start, b.stop) for b in bounds[stacked:]]
    inner = inner[::-1] if transpose else inner
    lengths = tuple(s.stop - s.start for s in inner)
    value = tensor.part(() if lengths == tensor.shape else tuple(inner))
    # Casting before the transposed write is twice as fast as during it.
    value = value.astype(dtype, copy=False)
    target = layer - bounds[0].start if stacked else ...
    part[target] = value.T if transpose else value
  return part


def save(
  folder: str | pathlib.Path,
  family: ModuleType,
  config: Any,
  base: Mapping[str, Any],
  shard_bytes: int = 5 * 10**9,
) -> None:
  """Writes weights as safetensors with Hugging Face's names.

  Args:
    folder: output folder; created if it does not exist.
    family: module with `Model` and `hf_parameters`, such as `models.opt`.
    config: the model's hyperparameters.
    base: nested dict of arrays or of nodes that stand for them, layers stacked
      on axis 0; written as the floats that they are read as.
    shard_bytes: maximum size of a file; larger weights are split into several
      files with an index.
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
      value = _value(flat[path], index)
      values[name] = np.ascontiguousarray(value.T if transpose else value)
      weight_map[name] = file
    tensor_files.write_safetensors(folder / file, values)
  # Remove the other layout's file, which would be stale.
  if len(shards) == 1:
    (folder / index_name).unlink(missing_ok=True)
  else:
    (folder / single).unlink(missing_ok=True)
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / index_name).write_text(json.dumps(content, indent=2) + "\n")


def _value(leaf: Any, layer: Any) -> np.ndarray:
  """Reads a layer of a weight, or all of it if the layer is an ellipsis.

  A layer of a stack of nodes, or of a stack in the host's memory, is read by
  one program, so that no more than a layer is on the device.
  """
  if isinstance(leaf, np.ndarray):
    return leaf[layer]
  if layer is ...:
    return np.asarray(perturbed.read(leaf))
  return np.asarray(_read_layer(leaf, layer))


@jax.jit
def _read_layer(stack: Any, layer: jax.Array) -> jax.Array:
  at = lambda part: jax.lax.dynamic_index_in_dim(part, layer, keepdims=False)
  return perturbed.read(jax.tree.map(at, stack))


def shapes(family: ModuleType, config: Any) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of a model's weights by path."""
  return decoder.parameter_shapes(family.Model(config))


def _short(name: str) -> str:
  """Drops name prefixes that differ between versions of a checkpoint."""
  name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
  name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
  return _ROOT.sub("", name)


def _layout(
  family: ModuleType, config: Any, expected: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, list[tuple[Any, str, bool, tuple[int, ...]]]]]:
  """Yields paths with their tensors (index, name, transpose, shape)."""
  for path, (name, transpose) in family.hf_parameters(config).items():
    shape = expected[path]
    stacked = "{layer}" in name
    stored = shape[1:] if stacked else shape
    stored = stored[::-1] if transpose else stored
    indices = range(shape[0]) if stacked else (...,)
    yield path, [(i, name.format(layer=i), transpose, stored) for i in indices]


def _check_leftover(folder: pathlib.Path, names: list[str]) -> None:
  """Raises a `UserError` if there are tensors that the model does not have."""
  names = [n for n in names if not _BUFFERS.search(n)]
  if names:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    raise errors.UserError(
      f"The weights in {folder} have tensors that config.json has no place"
      f" for: {', '.join(names[:3])}{more}."
    )
