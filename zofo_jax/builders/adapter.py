"""The adapter of a run: fresh, or read from a PEFT folder."""

from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from zofo_jax import adapters, errors
from zofo_jax.builders import model as model_lib
from zofo_jax.config import defaults
from zofo_jax.core import keys
from zofo_jax.core import tree as tree_lib
from zofo_jax.data import tokenizer as tokenizer_lib
from zofo_jax.models.hf import hub, peft

# (typed PRNG key, folded and not consumed; backbone) -> a fresh adapter.
InitAdapterFn = Callable[[jax.Array, Any], Any]


def make_init_fn(
  config: ml_collections.ConfigDict, model: model_lib.Model
) -> InitAdapterFn:
  """Returns the function that initializes `config.adapter.kind`.

  Args:
    config: the run's config; reads `adapter`, `lora`, `prefix` and `prompt`.
    model: gives the module and the tokenizer.

  Returns:
    init(key, base) -> an adapter of one or several kinds. It raises UserError
    if the adapter fits nowhere in this model.
  """
  kinds = defaults.adapter_kinds(config)
  lora_options = {
    "rank": config.lora.rank,
    "alpha": config.lora.alpha,
    "targets": config.lora.targets,
    "dropout": config.lora.dropout,
    "rank_stabilized": config.lora.rslora,
  }
  prefix_options = config.prefix.to_dict()
  prompt_options = {"length": config.prompt.length, "init": config.prompt.init}
  if "prompt" in kinds and config.prompt.init == "text":
    if model.tokenizer is None:  # only planned; the shape is the same
      prompt_options["init"] = "random"
    else:
      prompt_options["tokens"] = model.tokenizer.encode(
        config.prompt.text, add_special_tokens=False
      )
      tokenizer_lib.check_ids(
        model.tokenizer,
        prompt_options["tokens"],
        model.module.config.vocab_size,
        "config.prompt.text",
      )

  def init_adapter(key, base):
    init = {
      "lora": lambda: adapters.init_lora(key, base, **lora_options),
      "prefix": lambda: adapters.init_prefix(
        key, model.module, base, **prefix_options
      ),
      "prompt": lambda: adapters.init_prompt(key, base, **prompt_options),
    }
    return adapters.join(*(init[kind]() for kind in kinds))

  return init_adapter


def load_adapter(
  folder: str | None, model: model_lib.Model, init_fn: InitAdapterFn
) -> Any:
  """Reads the adapter that `config.adapter.init_from` names.

  Args:
    folder: written by PEFT, or "hub:owner/name"; None for none.
    model: the model that it is for.
    init_fn: makes an adapter of the kind that is expected.

  Returns:
    The adapter, with the dropout of `init_fn`'s; None without a folder.

  Raises:
    UserError: there is none, or it is of another kind or shape.
  """
  if not folder:
    return None
  place = hub.locate_adapter(folder)
  loaded = peft.load(place, model.family, model.module.config)
  expected = jax.eval_shape(
    lambda base: init_fn(keys.seed_key(0), base),
    model_lib.abstract_base(model),
  )
  actual_shapes, expected_shapes = _shapes(loaded), _shapes(expected)
  for path in sorted(actual_shapes.keys() | expected_shapes.keys()):
    expected_shape = expected_shapes.get(path)
    actual_shape = actual_shapes.get(path)
    if expected_shape != actual_shape:
      raise errors.UserError(
        f"config.adapter.init_from: {folder} has {path} {actual_shape}; the "
        "config (adapter.kind, lora, prefix, prompt) makes it "
        f"{expected_shape}."
      )
  return jax.tree.unflatten(
    jax.tree.structure(expected), jax.tree.leaves(loaded)
  )


def _shapes(adapter: Any) -> dict[str, Any]:
  """Returns the shapes of an adapter's leaves, and the scales of its LoRAs."""
  shapes = {
    name: leaf.shape for name, leaf in tree_lib.named_leaves(adapter).items()
  }
  scales = {
    f"{path}/scale": part.scale
    for path, part in adapters.parts(adapter).items()
    if isinstance(part, adapters.Lora)
  }
  return shapes | scales
