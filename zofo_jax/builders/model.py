"""From a config to the model of a run: its parts and its functions.

The config and the tokenizer are read before any weight.
"""

import json
import pathlib
import shutil
from types import ModuleType
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_collections

from zofo_jax import adapters, errors, models, report
from zofo_jax.config import defaults
from zofo_jax.core import losses
from zofo_jax.core import tree as tree_lib
from zofo_jax.core.types import LossFn
from zofo_jax.data import tokenizer as tokenizer_lib
from zofo_jax.evaluation import generation
from zofo_jax.models import apply
from zofo_jax.models.hf import hub, peft, weights
from zofo_jax.sharding import dispatch, rules
from zofo_jax.sharding import mesh as mesh_lib


class Model(NamedTuple):
  """A model that is known but whose weights are not read yet.

  Attributes:
    module: Flax module of the decoder.
    family: the module of `zofo_jax.models` that it comes from.
    folder: its checkpoint.
    tokenizer: its fast tokenizer.
  """

  module: nn.Module
  family: ModuleType
  folder: pathlib.Path
  tokenizer: Any

  @property
  def pad(self) -> int:
    """Token id that fills rows."""
    return tokenizer_lib.pad_id(self.tokenizer)


def load_model(
  config: ml_collections.ConfigDict, mesh: mesh_lib.AnyMesh | None = None
) -> Model:
  """Finds a model's checkpoint and reads its configuration and tokenizer.

  Args:
    config: the run's config; reads `config.model`.
    mesh: the grid of devices; None for one device.

  Returns:
    The model without weights.

  Raises:
    UserError: no such model, or one that is not supported.
  """
  folder = hub.locate(config.model.name, config.model.revision)
  path = folder / "config.json"
  try:
    hf_config = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise errors.UserError(f"{path}: not a JSON file ({error}).") from error
  module, family = models.from_hf(
    hf_config,
    remat=config.model.remat,
    constrain=rules.make_activation_constraint(mesh)
    if mesh
    else models.layers.no_constraint,
  )
  tokenizer = tokenizer_lib.load_tokenizer(folder)
  vocab_size = module.config.vocab_size
  if len(tokenizer) > vocab_size:
    raise errors.UserError(
      f"{folder}: the tokenizer has {len(tokenizer)} tokens and the model "
      f"{vocab_size}; expected a tokenizer of this model."
    )
  return Model(module, family, folder, tokenizer)


def load_base(
  config: ml_collections.ConfigDict,
  model: Model,
  mesh: mesh_lib.AnyMesh | None = None,
) -> Any:
  """Reads the backbone's weights to the devices, in the config's dtype.

  Args:
    config: the run's config.
    model: gives the checkpoint.
    mesh: the grid of devices, of whose shares this process reads its own; None
      for one device.

  Returns:
    The weights, divided as the model's family says.
  """
  mesh = mesh or mesh_lib.make(dict.fromkeys(mesh_lib.AXES, 1))
  places = rules.shardings(
    mesh, abstract_base(config, model), model.family.SHARDINGS
  )
  flat = flax.traverse_util.flatten_dict(places, sep="/")
  return weights.load(
    model.folder,
    model.family,
    model.module.config,
    jnp.dtype(config.model.dtype),
    lambda path, shape, read: dispatch.make_sharded_array(
      shape, flat[path], read
    ),
    pickle=config.model.pickle,
  )


def abstract_base(config: ml_collections.ConfigDict, model: Model) -> Any:
  """Returns the shapes and dtypes of the backbone, without its weights."""
  ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  variables = jax.eval_shape(
    model.module.init, jax.random.key(0), ids, ids, ids, ids, ids
  )
  dtype = jnp.dtype(config.model.dtype)
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), variables["params"]
  )


def init_adapter(
  config: ml_collections.ConfigDict, model: Model, key: jax.Array, base: Any
) -> Any:
  """Starts the adapter that `config.adapter.kind` asks for.

  Args:
    config: the run's config.
    model: gives the module and the tokenizer.
    key: typed PRNG key. Folded, not consumed.
    base: the backbone's weights.

  Returns:
    An adapter of one or several kinds.

  Raises:
    UserError: it fits nowhere in this model.
  """
  parts: list[Any] = []
  for kind in defaults.adapter_kinds(config):
    if kind == "lora":
      part = adapters.init_lora(
        key,
        base,
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        targets=config.lora.targets,
        dropout=config.lora.dropout,
        rank_stabilized=config.lora.rslora,
      )
    elif kind == "prefix":
      part = adapters.init_prefix(
        key,
        model.module,
        base,
        length=config.prefix.length,
        init=config.prefix.init,
        projection=config.prefix.projection,
      )
    else:
      part = adapters.init_prompt(
        key,
        base,
        length=config.prompt.length,
        init=config.prompt.init,
        tokens=model.tokenizer.encode(
          config.prompt.text, add_special_tokens=False
        )
        if config.prompt.init == "text"
        else None,
      )
    parts.append(part)
  return adapters.join(*parts)


def load_adapter(config: ml_collections.ConfigDict, model: Model) -> Any:
  """Reads the adapter that `config.adapter.init_from` names.

  Args:
    config: the run's config; the adapter must be one that it describes.
    model: the model that it is for.

  Returns:
    The adapter, with the config's dropout; None if the config names none.

  Raises:
    UserError: there is none, or it is another than the config describes.
  """
  folder = config.adapter.init_from
  if not folder:
    return None
  found = peft.load(folder, model.family, model.module.config)
  expected = jax.eval_shape(
    lambda base: init_adapter(config, model, jax.random.key(0), base),
    abstract_base(config, model),
  )
  shapes = {}
  for name, tree in (("found", found), ("expected", expected)):
    shapes[name] = {
      name: leaf.shape for name, leaf in tree_lib.named_leaves(tree).items()
    } | {
      f"{path}/scale": part.scale
      for path, part in adapters.parts(tree).items()
      if isinstance(part, adapters.Lora)
    }
  for path in sorted(shapes["found"].keys() | shapes["expected"].keys()):
    ours, theirs = shapes["expected"].get(path), shapes["found"].get(path)
    if ours != theirs:
      raise errors.UserError(
        f"config.adapter.init_from: {folder} has {path} {theirs}; the config "
        f"(adapter.kind, lora, prefix, prompt) makes it {ours}."
      )
  return jax.tree.unflatten(
    jax.tree.structure(expected), jax.tree.leaves(found)
  )


def save_base(
  folder: str | pathlib.Path,
  config: ml_collections.ConfigDict,
  model: Model,
  base: Any,
) -> None:
  """Writes weights as a checkpoint folder of Hugging Face's.

  Args:
    folder: written to; created if it does not exist.
    config: the run's config; reads `config.model`.
    model: gives the configuration and the tokenizer that go with them.
    base: backbone parameters.
  """
  folder = pathlib.Path(folder)
  weights.save(folder, model.family, model.module.config, base)
  for path in hub.text_files(model.folder):
    shutil.copyfile(path, folder / path.name)
  fields = json.loads((model.folder / "config.json").read_text())
  fields.pop("dtype", None)
  fields["torch_dtype"] = config.model.dtype  # read by every version
  report.write_json(folder / "config.json", fields)


def make_loss_fn(name: str, module: nn.Module) -> LossFn:
  """Makes the loss that `config.loss` names, over a model's targets."""
  reduce_fn = {
    "likelihood": losses.likelihood,
    "classification": losses.classification,
  }[name]
  return losses.make_loss_fn(apply.make_log_probs_fn(module), reduce_fn)


def make_generate_fn(
  config: ml_collections.ConfigDict, model: Model
) -> generation.GenerateFn:
  """Makes the function that answers as `config.generate` says; not jitted."""
  options = config.generate
  return generation.make_generate_fn(
    model.module,
    max_new_tokens=options.max_new_tokens,
    stops=generation.stop_table(
      model.tokenizer,
      model.module.config.vocab_size,
      ids=_end_ids(model),
      texts=options.stop,
    ),
    pad=model.pad,
    temperature=options.temperature,
    top_k=options.top_k,
    top_p=options.top_p,
    num_beams=options.num_beams,
    length_penalty=options.length_penalty,
  )


def _end_ids(model: Model) -> list[int]:
  """Returns the tokens that end a text: the tokenizer's and the model's own."""
  found = [model.tokenizer.eos_token_id]
  for name in ("config.json", "generation_config.json"):
    path = model.folder / name
    if path.exists():
      ids = json.loads(path.read_text()).get("eos_token_id")
      found += ids if isinstance(ids, list) else [ids]
  size = model.module.config.vocab_size
  return sorted({i for i in found if i is not None and 0 <= i < size})
