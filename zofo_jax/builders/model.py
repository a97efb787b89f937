"""The model of a run: its module, its weights, its loss and its text.

The configuration and the tokenizer are read before any weight.
"""

import hashlib
import json
import logging
import pathlib
import reprlib
import shutil
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from zofo_jax import errors, models, report
from zofo_jax.builders import assets, storage
from zofo_jax.core import losses, quantized
from zofo_jax.core.types import LossFn
from zofo_jax.data import encode_text
from zofo_jax.data import tokenizer as tokenizer_lib
from zofo_jax.evaluation import generation
from zofo_jax.models import apply
from zofo_jax.models.decoder import STACKED
from zofo_jax.models.hf import config as config_lib
from zofo_jax.models.hf import hub, published, tensor_files, weights
from zofo_jax.sharding import dispatch, rules
from zofo_jax.sharding import mesh as mesh_lib

# The choices of `config.loss`: (log p of every target, batch) -> the loss.
LOSSES = {
  "likelihood": losses.likelihood,
  "classification": losses.classification,
}
# Files of a model's folder on which no token of a row depends.
_NO_TOKENS = ("config.json", "generation_config.json", "chat_template")


class Model(NamedTuple):
  """A model whose weights have not been read yet.

  Attributes:
    module: Flax module of the decoder.
    family: the module of `zofo_jax.models` that defines it.
    folder: its checkpoint.
    tokenizer: its fast tokenizer; None for a model that is only planned.
    name: hub id or folder, as the config gives it.
    dtype: name of the dtype of its weights on the devices.
    quantize: kind of integers that its matrices are stored as; "" for none.
    offload: "host" if the layers' matrices are in the host's memory, else "".
    pickle: whether `pytorch_model.bin` may be opened.
  """

  module: nn.Module
  family: ModuleType
  folder: pathlib.Path
  tokenizer: Any
  name: str
  dtype: str = "float32"
  quantize: str = ""
  offload: str = ""
  pickle: bool = False

  @property
  def on_host(self) -> str | None:
    """Pattern of the paths of weights in the host's memory; None: none."""
    return f"{STACKED}.*kernel$" if self.offload else None

  @property
  def pad(self) -> int:
    """Token id that fills rows."""
    return tokenizer_lib.pad_id(self.tokenizer, self.module.config.vocab_size)


def load_model(
  name: str,
  revision: str | None = None,
  *,
  dtype: str = "float32",
  quantize: str = "",
  offload: str = "",
  remat: bool = False,
  pickle: bool = False,
  mesh: mesh_lib.AnyMesh | None = None,
) -> Model:
  """Finds a model's checkpoint and reads its configuration and tokenizer.

  All arguments except `mesh` are the fields of `config.model`.

  Args:
    name: hub id or local folder.
    revision: of the hub id; None for the latest.
    dtype: name of the dtype of the weights on the devices.
    quantize: kind of integers that matrices are stored as; "" for none.
    offload: "host": the layers' matrices are in the host's memory; or "".
    remat: whether the backward pass recomputes each layer's activations.
    pickle: whether `pytorch_model.bin` may be opened.
    mesh: the mesh of devices; None for one device.

  Returns:
    The model without weights.

  Raises:
    UserError: no such model, or one that is not supported.
  """
  assets.make(name)
  folder = hub.locate(name, revision)
  hf_config = config_lib.read(folder / config_lib.FILE)
  module, family = _make_module(hf_config, remat, mesh)
  tokenizer = tokenizer_lib.load_tokenizer(folder)
  if module.config.tied_head and weights.has_own_head(
    folder, family, module.config, pickle=pickle
  ):
    logging.getLogger("zofo_jax").warning(
      "%s: config.json ties the head to the embedding, but the weights have a "
      "head of their own, which is used",
      folder,
    )
    untied = dict(hf_config, tie_word_embeddings=False)
    module, family = _make_module(untied, remat, mesh)
  return Model(
    module,
    family,
    folder,
    tokenizer,
    name,
    dtype,
    quantize=quantize,
    offload=offload,
    pickle=pickle,
  )


def published_model(
  name: str,
  *,
  dtype: str,
  remat: bool,
  mesh: mesh_lib.AnyMesh,
  quantize: str = "",
  offload: str = "",
) -> Model:
  """Makes a model that needs neither weights nor a tokenizer, to be planned.

  Args:
    name: a model of `models.hf.published`, or a folder with a config.json.
    dtype: name of the dtype of the weights.
    remat: whether the backward pass recomputes each layer's activations.
    mesh: of real devices, of those of a topology, or of shapes alone.
    quantize: kind of integers that matrices are stored as; "" for none.
    offload: "host": the layers' matrices are in the host's memory; or "".

  Returns:
    The model, without a folder or a tokenizer.

  Raises:
    UserError: the shapes of this model are not known.
  """
  module, family = _make_module(published_config(name), remat, mesh)
  return Model(
    module,
    family,
    pathlib.Path(),
    None,
    name,
    dtype,
    quantize=quantize,
    offload=offload,
  )


def published_config(name: str) -> dict[str, Any]:
  """Returns config.json of a published model or of a local folder.

  Raises:
    UserError: there is no such model or folder.
  """
  if name in published.CONFIGS:
    return published.CONFIGS[name]
  assets.make(name)
  path = pathlib.Path(name) / config_lib.FILE
  if not path.exists():
    raise errors.UserError(
      "config.model.name: expected a folder with config.json or a model that "
      f"`zofo models` lists; found '{name}'."
      f"{errors.nearest(name, published.CONFIGS)}"
    )
  return config_lib.read(path)


def _make_module(
  hf_config: Mapping[str, Any], remat: bool, mesh: mesh_lib.AnyMesh | None
) -> tuple[nn.Module, ModuleType]:
  return models.from_hf(
    hf_config,
    remat=remat,
    constrain=rules.make_activation_constraint(mesh)
    if mesh
    else models.layers.no_constraint,
  )


def load_base(model: Model, mesh: mesh_lib.AnyMesh | None = None) -> Any:
  """Reads the backbone's weights to the devices, in the model's dtype.

  Matrices are quantized, if they are to be, a layer at a time.

  Args:
    model: gives the checkpoint.
    mesh: the mesh of devices; each process reads its own shards, and all of a
      matrix that is to be quantized. None for one device.

  Returns:
    The weights, sharded by the rules of the model's family.
  """
  mesh = mesh or mesh_lib.make(dict.fromkeys(mesh_lib.AXES, 1))
  abstract = abstract_base(model)
  if model.offload:
    storage.check_host_memory(mesh, abstract)
  shardings = rules.shardings(
    mesh, abstract, model.family.SHARDINGS, model.on_host
  )
  flat, flat_shardings = (
    flax.traverse_util.flatten_dict(tree, sep="/")
    for tree in (abstract, shardings)
  )

  def make(path, shape, read):
    if isinstance(flat[path], quantized.Quantized):
      return jax.tree.map(
        lambda part, sharding: dispatch.make_sharded_array(
          part.shape, sharding, part.__getitem__
        ),
        storage.read_quantized(flat[path], storage.summed_axis(path), read),
        flat_shardings[path],
      )
    return dispatch.make_sharded_array(
      shape,
      flat_shardings[path],
      lambda index: read(index).astype(model.dtype, copy=False),
    )

  return weights.load(
    model.folder,
    model.family,
    model.module.config,
    # Not rounded twice.
    jnp.dtype("float32" if model.quantize else model.dtype),
    make,
    pickle=model.pickle,
  )


def abstract_base(model: Model) -> Any:
  """Returns the shapes and dtypes of the backbone, without its weights."""

  def stored(path, shape):
    axis = storage.summed_axis(path)
    if model.quantize and axis is not None:
      return quantized.shape_of(shape, model.quantize, axis, model.dtype)
    return jax.ShapeDtypeStruct(shape, jnp.dtype(model.dtype))

  # The shapes of a family and its config are traced once in a process.
  shapes = weights.shapes(model.family, model.module.config)
  flat = {path: stored(path, shape) for path, shape in shapes.items()}
  return flax.traverse_util.unflatten_dict(flat, sep="/")


def tokenizer_digests(model: Model, *, chat: bool = False) -> dict[str, str]:
  """Returns a digest of each file on which the tokens of a text depend.

  Args:
    model: gives the folder.
    chat: whether texts are rendered by the chat template, which then counts.
  """
  digests = {
    path.name: hashlib.blake2b(_content(path), digest_size=16).hexdigest()
    for path in hub.text_files(model.folder)
    if not path.name.startswith(_NO_TOKENS)
  }
  if chat and model.tokenizer is not None:
    template = str(model.tokenizer.chat_template)
    digests["chat template"] = hashlib.blake2b(
      template.encode(), digest_size=16
    ).hexdigest()
  return digests


def weights_digests(model: Model) -> dict[str, str]:
  """Returns a digest of each file of weights; see `tensor_files.digests`."""
  return tensor_files.digests(model.folder)


def _content(path: pathlib.Path) -> bytes:
  """Returns a file's bytes; a JSON file's without layout and chat template."""
  content = path.read_bytes()
  try:
    fields = json.loads(content)
  except ValueError:
    return content
  if isinstance(fields, dict):
    fields.pop("chat_template", None)
  return json.dumps(fields, sort_keys=True).encode()


def save_base(folder: str | pathlib.Path, model: Model, base: Any) -> None:
  """Writes weights as a Hugging Face checkpoint folder.

  Args:
    folder: written to; created if it does not exist.
    model: gives the configuration and the tokenizer that go with them.
    base: backbone parameters.
  """
  folder = pathlib.Path(folder)
  weights.save(folder, model.family, model.module.config, base)
  for path in hub.text_files(model.folder):
    shutil.copyfile(path, folder / path.name)
  fields = config_lib.read(model.folder / config_lib.FILE)
  fields["tie_word_embeddings"] = model.module.config.tied_head
  fields.pop("dtype", None)
  fields["torch_dtype"] = model.dtype  # every version reads this name
  report.write_json(folder / config_lib.FILE, fields)


def make_loss_fn(name: str, module: nn.Module) -> LossFn:
  """Returns the loss over a model's targets, named as in `LOSSES`."""
  return losses.make_loss_fn(apply.make_log_probs_fn(module), LOSSES[name])


def make_generate_fn(
  model: Model,
  *,
  stop: Sequence[str] = (),
  chat: bool = False,
  **options: Any,
) -> generation.GenerateFn:
  """Returns the function that continues prompts; not jitted.

  The other keyword arguments are the fields of `config.generate`.

  Args:
    model: gives the module, the tokenizer and the tokens that end a text;
      without a tokenizer no token does, which is enough for a plan.
    stop: strings that end an answer.
    chat: whether the token that ends the assistant's turns does, too.
    **options: of `generation.make_generate_fn`.
  """
  if not model.module.config.causal:
    raise errors.UserError(
      f"config.model.name: '{model.name}' is a masked language model, which "
      "does not generate text; expected a task with options."
    )
  size, pad = model.module.config.vocab_size, 0
  stops = np.zeros(size, bool)
  if model.tokenizer is not None:
    pad, ids = model.pad, _end_ids(model, chat)
    stops = generation.stop_table(model.tokenizer, size, ids=ids, texts=stop)
  return generation.make_generate_fn(
    model.module, stops=stops, pad=pad, **options
  )


def _end_ids(model: Model, chat: bool = False) -> list[int]:
  """Returns the tokens that end a text, of the tokenizer and of the model."""
  end_ids = {model.tokenizer.eos_token_id}
  if chat:
    end_ids.add(encode_text.end_of_turn(model.tokenizer))
  for name in (config_lib.FILE, "generation_config.json"):
    path = model.folder / name
    if path.exists():
      ids = config_lib.read(path).get("eos_token_id")
      ids = ids if isinstance(ids, list) else [ids]
      if any(i is not None and type(i) is not int for i in ids):
        raise errors.UserError(
          f"{path} has eos_token_id = {reprlib.repr(ids)}; expected integers."
        )
      end_ids.update(ids)
  size = model.module.config.vocab_size
  return sorted(i for i in end_ids if i is not None and 0 <= i < size)
