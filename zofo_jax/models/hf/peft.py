"""Reads and writes folders of the PEFT library.

A PEFT folder has `adapter_config.json` and `adapter_model.safetensors` of one
kind of adapter. An adapter of several kinds is a folder with a PEFT folder for
each kind.
"""

import collections
import json
import pathlib
import re
import reprlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

from zofo_jax import adapters, errors
from zofo_jax.models.hf import config as config_lib
from zofo_jax.models.hf import peft_config, tensor_files, weights

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KINDS = {"lora": "LORA", "prefix": "PREFIX_TUNING", "prompt": "PROMPT_TUNING"}

_LORA_TENSOR = re.compile(
  r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight"
)
# Values of optional PEFT fields that mean plain LoRA; `save` writes them.
_PLAIN: dict[str, Any] = {
  "alpha_pattern": {},
  "bias": "none",
  "fan_in_fan_out": False,
  "layer_replication": None,
  "lora_bias": False,
  "modules_to_save": None,
  "rank_pattern": {},
  "use_dora": False,
}


def save(
  folder: str | pathlib.Path,
  family: ModuleType,
  config: Any,
  adapter: Mapping[str, Any],
  *,
  model_name: str | None = None,
) -> None:
  """Writes an adapter in PEFT's format.

  A projected prefix is written as the keys and values that it computes.

  Args:
    folder: output folder; created if it does not exist.
    family: module with `Model` and `hf_parameters`, such as `models.opt`.
    config: the model's hyperparameters.
    adapter: nested dict with adapters of one or several kinds.
    model_name: hub id or folder of the backbone, recorded for PEFT.

  Raises:
    UserError: the adapter is empty, or LoRAs differ in rank, scale or dropout.
  """
  by_kind: dict[str, dict[str, Any]] = {}
  for path, node in adapters.parts(adapters.expand(adapter)).items():
    module, _, kind = path.rpartition("/")
    by_kind.setdefault(kind, {})[module] = node
  if not by_kind:
    raise errors.UserError(f"{folder}: there is no adapter to write.")
  write = {
    "lora": _write_lora,
    "prefix": _write_prefix,
    "prompt": _write_prompt,
  }
  folder = pathlib.Path(folder)
  for kind, nodes in by_kind.items():
    fields, tensors = write[kind](family, config, nodes)
    # PEFT has no task that fills masks, and ignores virtual tokens without one.
    masked = None if kind == "lora" else "FEATURE_EXTRACTION"
    fields = {
      "peft_type": KINDS[kind],
      "task_type": "CAUSAL_LM" if config.causal else masked,
      "base_model_name_or_path": model_name,
      "inference_mode": True,
      **fields,
    }
    target = folder if len(by_kind) == 1 else folder / kind
    target.mkdir(parents=True, exist_ok=True)
    (target / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
    tensor_files.write_safetensors(
      target / WEIGHTS,
      {name: np.ascontiguousarray(t) for name, t in tensors.items()},
    )


def load(
  folder: str | pathlib.Path, family: ModuleType, config: Any
) -> dict[str, Any]:
  """Reads an adapter written by PEFT or `save`.

  Args:
    folder: a PEFT folder, or a folder with one for each kind.
    family: module with `Model` and `hf_parameters`, such as `models.opt`.
    config: the model's hyperparameters.

  Returns:
    Adapter of NumPy arrays, float32.

  Raises:
    UserError: there is no adapter, it does not fit the model, or it uses a
      feature that is not supported.
  """
  folder = pathlib.Path(folder)
  if not (folder / CONFIG).is_file():
    kinds = [kind for kind in KINDS if (folder / kind / CONFIG).is_file()]
    if kinds:
      return adapters.join(
        *(load(folder / kind, family, config) for kind in kinds)
      )
    raise errors.UserError(f"{folder} holds no adapter: it has no {CONFIG}.")
  fields = config_lib.read(folder / CONFIG)
  if not (folder / WEIGHTS).is_file():
    raise errors.UserError(f"{folder} holds no weights: it has no {WEIGHTS}.")
  tensors = {
    name: tensor.read().astype(np.float32)
    for name, tensor in tensor_files.open_safetensors(folder / WEIGHTS).items()
  }
  read = {
    "LORA": _read_lora,
    "PREFIX_TUNING": _read_prefix,
    "PROMPT_TUNING": _read_prompt,
  }
  kind: Any = fields.get("peft_type")
  config_lib.check_kind(kind, read, f"{folder / CONFIG} has peft_type")
  return read[kind](folder, family, config, fields, tensors)


def module_names(family: ModuleType, config: Any) -> dict[str, str]:
  """Maps modules to Hugging Face's: {"layers/attention/query": "model..."}.

  `{layer}` in a name stands for the layers of a stacked matrix.
  """
  return {
    path.removesuffix("/kernel"): name.removesuffix(".weight")
    for path, (name, _) in family.hf_parameters(config).items()
    if path.endswith("/kernel")
  }


def _stored_as_in_out(family: ModuleType, config: Any) -> bool:
  """Returns whether the family's matrices are stored as [in, out]."""
  named = family.hf_parameters(config).items()
  return not any(t for path, (_, t) in named if path.endswith("/kernel"))


def _nest(path: str, node: Any) -> dict[str, Any]:
  """Returns {"a": {"b": node}} for "a/b"."""
  for name in reversed(path.split("/")):
    node = {name: node}
  return node


def _write_lora(family, config, nodes):
  kinds = {(n.a.shape[-1], n.scale, n.dropout) for n in nodes.values()}
  if len(kinds) > 1:
    raise errors.UserError(
      "The LoRAs of this adapter differ in (rank, scale, dropout): "
      f"{', '.join(map(str, sorted(kinds)))}; expected one of each."
    )
  ((rank, scale, dropout),) = kinds
  names = module_names(family, config)
  tensors = {}
  for module, node in nodes.items():
    name = names[module]
    a, b = np.asarray(node.a), np.asarray(node.b)
    if "{layer}" not in name:
      a, b = a[None], b[None]
    for layer in range(len(a)):
      prefix = f"base_model.model.{name.format(layer=layer)}"
      tensors[f"{prefix}.lora_A.weight"] = a[layer].T
      tensors[f"{prefix}.lora_B.weight"] = b[layer].T
  fields = {
    "r": rank,
    "lora_alpha": scale * rank,
    "lora_dropout": dropout,
    "use_rslora": False,  # alpha already includes the factor
    "target_modules": sorted({names[m].rpartition(".")[2] for m in nodes}),
    **_PLAIN,
    "fan_in_fan_out": _stored_as_in_out(family, config),
  }
  return fields, tensors


def _read_lora(folder, family, config, fields, tensors):
  path = folder / CONFIG
  if _stored_as_in_out(family, config):
    # PEFT sets it for such matrices, whose A and B are as of all others.
    fields = {**fields, "fan_in_fan_out": False}
  peft_config.check(path, "LORA", fields)
  dropout = peft_config.dropout(path, fields)
  shapes = weights.shapes(family, config)
  module_of, depths = {}, {}
  for module, name in module_names(family, config).items():
    depths[module] = shapes[f"{module}/kernel"][0] if "{layer}" in name else 0
    for layer in range(depths[module] or 1):
      module_of[name.format(layer=layer)] = (module, layer)

  matrices: dict[tuple[str, str], np.ndarray] = {}
  for name, tensor in tensors.items():
    match = _LORA_TENSOR.fullmatch(name)
    if not match or match[1] not in module_of:
      raise errors.UserError(
        f"{folder / WEIGHTS} has a tensor {name} that this model has no place "
        f"for.{errors.nearest(match[1], module_of) if match else ''}"
      )
    matrices[match[1], match[2]] = tensor
  others = {
    name.rpartition(".")[0].format(layer=layer)
    for name, _ in family.hf_parameters(config).values()
    for layer in range(config.num_layers)
  }
  names = peft_config.targets(path, fields, list(module_of), others)
  for name in sorted(names ^ {name for name, _ in matrices}):
    raise errors.UserError(
      f"{path} {'targets' if name in names else 'does not target'} {name}, "
      f"which has {'no tensor' if name in names else 'tensors'} in {WEIGHTS}."
    )
  sizes = {}
  for name in sorted(names):
    module, layer = module_of[name]
    rank, scale = peft_config.rank_and_scale(path, fields, name)
    *_, features_in, features_out = shapes[f"{module}/kernel"]
    for which, shape in (
      ("A", (rank, features_in)),
      ("B", (features_out, rank)),
    ):
      matrix = matrices.get((name, which))
      if matrix is None or matrix.shape != shape:
        raise errors.UserError(
          f"{folder / WEIGHTS}: lora_{which} of {module}, layer {layer}, has "
          f"shape {None if matrix is None else matrix.shape}; expected "
          f"{shape}, by r and rank_pattern."
        )
    sizes[name] = rank, scale

  # A LoRA has one rank and one scale: lower ranks are padded with zeros, and
  # B takes the ratio of the scales.
  max_rank = max(rank for rank, _ in sizes.values())
  scales = collections.Counter(scale for _, scale in sizes.values())
  ((common, _),) = scales.most_common(1)
  nodes: dict[str, Any] = {}
  for name, (rank, scale) in sizes.items():
    module, layer = module_of[name]
    if module not in nodes:
      *_, features_in, features_out = shapes[f"{module}/kernel"]
      stack = (depths[module],) if depths[module] else ()
      a: Any = np.zeros((*stack, features_in, max_rank), np.float32)
      b: Any = np.zeros((*stack, max_rank, features_out), np.float32)
      nodes[module] = adapters.Lora(a, b, scale=common, dropout=dropout)
    index = layer if depths[module] else ...
    nodes[module].a[index][:, :rank] = matrices[name, "A"].T
    nodes[module].b[index][:rank] = matrices[name, "B"].T * (scale / common)
  return adapters.join(
    *(_nest(f"{module}/lora", node) for module, node in nodes.items())
  )


def _write_prefix(family, config, nodes):
  del family, config
  (node,) = nodes.values()
  both = np.stack([np.asarray(node.key), np.asarray(node.value)])
  both = np.einsum("clpkf->plckf", both)
  length, layers, _, heads, features = both.shape
  fields = _virtual(length, heads * features, heads, layers)
  fields.update(encoder_hidden_size=heads * features, prefix_projection=False)
  return fields, {"prompt_embeddings": both.reshape(length, -1)}


def _read_prefix(folder, family, config, fields, tensors):
  shapes = adapters.prefix_shapes(family.Model(config), 1)
  ((path, shape),) = adapters.parts(shapes).items()
  layers, _, heads, features = shape.key.shape
  width = layers * 2 * heads * features
  # PEFT replaces heads and width of a model with fewer heads of keys.
  size = heads * features if heads == config.num_heads else None
  expected = {"num_layers": layers, "token_dim": size}
  expected["num_attention_heads"] = size and heads
  both = _embeddings(folder, fields, tensors, width)
  _check_virtual(folder, fields, expected)
  both = both.reshape(-1, layers, 2, heads, features)
  return _nest(path, adapters.Prefix(*np.einsum("plckf->clpkf", both)))


def _write_prompt(family, config, nodes):
  del family
  (node,) = nodes.values()
  embedding = np.asarray(node.embedding)
  length, width = embedding.shape
  fields = _virtual(length, width, config.num_heads, config.num_layers)
  fields.update(prompt_tuning_init="RANDOM")
  return fields, {"prompt_embeddings": embedding}


def _read_prompt(folder, family, config, fields, tensors):
  width = weights.shapes(family, config)["embed/embedding"][1]
  embedding = _embeddings(folder, fields, tensors, width)
  _check_virtual(folder, fields, {"token_dim": width})
  return _nest("embed/prompt", adapters.Prompt(embedding))


def _virtual(length: int, width: int, heads: int, layers: int) -> dict:
  """Returns the PEFT fields that prefix and prompt share."""
  return {
    "num_virtual_tokens": length,
    "token_dim": width,
    "num_attention_heads": heads,
    "num_layers": layers,
    "num_transformer_submodules": 1,
  }


def _check_virtual(folder, fields, expected: Mapping[str, int | None]) -> None:
  """Raises a `UserError` if fields are set to other values than expected."""
  peft_config.check(folder / CONFIG, fields["peft_type"], fields)
  for name, value in {"num_transformer_submodules": 1, **expected}.items():
    if value is not None and fields.get(name) not in (None, value):
      raise errors.UserError(
        f"{folder / CONFIG} has {name} = {reprlib.repr(fields[name])}; this "
        f"model expects {value}."
      )


def _embeddings(folder, fields, tensors, width: int) -> Any:
  """Returns the only tensor of a prefix or a prompt, [P, width]."""
  expected = (fields.get("num_virtual_tokens"), width)
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  if shapes != {"prompt_embeddings": expected}:
    raise errors.UserError(
      f"{folder / WEIGHTS} has tensors {shapes}; this model and {CONFIG} "
      f"expect prompt_embeddings of shape {expected}."
    )
  return tensors["prompt_embeddings"]
