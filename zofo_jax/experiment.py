"""From a config to the model, rows and functions of a run.

What is cheap and can fail comes first: names, files, rows and lengths are
checked before any weight is read or anything is compiled.
"""

import dataclasses
import json
import pathlib
import typing
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from zofo_jax import (
  adapters,
  batches,
  data,
  encode,
  errors,
  generate,
  inner,
  losses,
  models,
  questions,
  rows,
  tasks,
)
from zofo_jax import config as config_lib
from zofo_jax.models import hub, weights


class Examples(NamedTuple):
  """Encoded rows: D_p, D_f, those that choose a checkpoint, and the test's."""

  lower: list[encode.Example]
  upper: list[encode.Example]
  selection: list[encode.Example] | list[questions.Question]
  test: list[encode.Example] | list[questions.Question]


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
    return encode.pad_id(self.tokenizer)


def load_model(config: ml_collections.ConfigDict) -> Model:
  """Finds a model's checkpoint and reads its configuration and tokenizer.

  Args:
    config: the run's config; reads `config.model`.

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
  module, family = models.from_hf(hf_config, remat=config.model.remat)
  tokenizer = encode.load_tokenizer(folder)
  vocab_size = module.config.vocab_size
  if len(tokenizer) > vocab_size:
    raise errors.UserError(
      f"{folder}: the tokenizer has {len(tokenizer)} tokens and the model "
      f"{vocab_size}; expected a tokenizer of this model."
    )
  return Model(module, family, folder, tokenizer)


def load_task(config: ml_collections.ConfigDict) -> tasks.Task:
  """Looks the config's task up, or makes the one that its fields declare.

  Raises:
    UserError: no such task, a declaration that is broken, or a loss that the
      task cannot have.
  """
  task = _own_task(config) if config.data.prompt else _known_task(config)
  if task.kind == "generation" and config.loss != "likelihood":
    raise errors.UserError(
      f"config.loss: task {task.name} is answered by generating text; "
      f"expected 'likelihood'; found '{config.loss}'."
    )
  task.template(config.data.template)
  return task


def _known_task(config: ml_collections.ConfigDict) -> tasks.Task:
  """Looks a task up; its metric may be another than the usual."""
  task = tasks.get(config.data.task)
  metric = config.data.metric
  known = typing.get_args(tasks.Metric)
  if metric and metric not in known:
    raise errors.UserError(
      f"config.data.metric: expected one of {', '.join(known)}; found "
      f"'{metric}'.{errors.nearest(metric, known)}"
    )
  return dataclasses.replace(task, metric=metric) if metric else task


def _own_task(config: ml_collections.ConfigDict) -> tasks.Task:
  """Makes the task that the config declares."""
  name = config.data.task
  if name in tasks.ALL:
    raise errors.UserError(
      f"config.data.prompt: declares a task of one's own; expected a new name "
      f"in config.data.task, found '{name}', which there is."
    )
  return tasks.custom(
    name,
    prompt=config.data.prompt,
    options=config.data.options,
    label=config.data.label,
    labels=config.data.labels or None,
    metric=config.data.metric or "accuracy",
  )


def context_length(config: ml_collections.ConfigDict, model: Model) -> int:
  """Returns how many tokens fit beside what the adapters put in front.

  Raises:
    UserError: the adapters leave no place.
  """
  context = model.module.config.max_length
  taken = config_lib.num_virtual(config)
  if taken >= context:
    raise errors.UserError(
      f"config.adapter.kind: '{config.adapter.kind}' takes {taken} positions; "
      f"expected fewer than the model's {context} (prefix.length, "
      "prompt.length)."
    )
  return context - taken


def row_length(config: ml_collections.ConfigDict, model: Model) -> int:
  """Returns the longest row in tokens: the config's, within the model's."""
  return min(config.data.max_length, context_length(config, model))


def load_rows(
  config: ml_collections.ConfigDict, task: tasks.Task
) -> data.Splits:
  """Reads and divides the rows of a run.

  Raises:
    UserError: names the file and row that is wrong.
  """
  counts = data.Counts(
    lower=config.data.num_lower,
    upper=config.data.num_upper,
    selection=config.data.num_selection,
    test=config.data.num_test,
  )
  return data.load_splits(
    task,
    config.data.dir,
    counts=counts,
    shots=config.data.shots,
    seed=config.data.seed,
    test_split=config.data.test_split or None,
  )


def load_examples(
  config: ml_collections.ConfigDict, model: Model, task: tasks.Task
) -> Examples:
  """Reads, divides and encodes the rows of a run.

  Test and selection rows are never dropped for their length: those that do
  not fit `data.max_length` still count, up to the model's own context.

  Args:
    config: the run's config; reads `config.data` and `config.loss`.
    model: gives the tokenizer and the longest row.
    task: the task.

  Returns:
    The encoded rows.

  Raises:
    UserError: names the file and row that is wrong.
  """
  splits = load_rows(config, task)
  version = config.data.template
  long_rows = config.data.long_rows
  context = context_length(config, model)

  # Accuracy compares the options, whatever the loss.
  compared = config.zo.objective == "accuracy"
  train_mode: encode.Mode = "classification" if compared else config.loss

  def train(found):
    return encode.encode_rows(
      task,
      found,
      model.tokenizer,
      train_mode,
      max_length=row_length(config, model),
      version=version,
      long_rows=long_rows,
    )

  def score(found):
    if task.kind == "generation":
      return load_questions(config, model, task, found)
    dropped = long_rows == "drop"
    return encode.encode_rows(
      task,
      found,
      model.tokenizer,
      "classification",
      max_length=context if dropped else row_length(config, model),
      version=version,
      long_rows="error" if dropped else long_rows,
    )

  return Examples(
    lower=train(splits.lower),
    upper=train(splits.upper),
    selection=score(splits.selection),
    test=score(splits.test),
  )


def load_questions(
  config: ml_collections.ConfigDict,
  model: Model,
  task: tasks.Task,
  asked: Sequence[rows.Row],
  *,
  labelled: bool = True,
) -> list[questions.Question]:
  """Encodes rows that are answered by generating text.

  None is dropped for its length; see `load_examples`.

  Raises:
    UserError: a prompt leaves no room for its answer.
  """
  cut = config.data.long_rows == "truncate"
  context = context_length(config, model)
  room = questions.check_room(config.generate.max_new_tokens, context)
  return questions.encode_questions(
    task,
    asked,
    model.tokenizer,
    max_length=min(room, config.data.max_length) if cut else room,
    version=config.data.template,
    truncate=cut,
    labelled=labelled,
  )


def make_generate_fn(
  config: ml_collections.ConfigDict, model: Model
) -> generate.GenerateFn:
  """Makes the function that answers as `config.generate` says; not jitted."""
  options = config.generate
  return generate.make_generate_fn(
    model.module,
    max_new_tokens=options.max_new_tokens,
    stops=generate.stop_table(
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


def load_base(config: ml_collections.ConfigDict, model: Model) -> Any:
  """Reads the backbone's weights to the device, in the config's dtype."""
  leaves, structure = jax.tree.flatten(
    weights.load(
      model.folder,
      model.family,
      model.module.config,
      jnp.dtype(config.model.dtype),
    )
  )
  for i, leaf in enumerate(leaves):  # each host copy goes as its leaf is done
    leaves[i] = jnp.array(leaf)
  return jax.tree.unflatten(structure, leaves)


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
  for kind in config_lib.adapter_kinds(config):
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
        ),
      )
    parts.append(part)
  return adapters.join(*parts)


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


def make_log_probs_fn(module: nn.Module) -> losses.LogProbsFn:
  """Makes log_probs(base, adapter, batch, key) of a model's targets.

  Args:
    module: a decoder of `zofo_jax.models`.

  Returns:
    A function to float32 [B, R, K], for `losses.make_loss_fn` and evaluation.
  """

  def log_probs_fn(base, adapter, batch, key):
    # Without dropout nothing reads the key.
    drops = key is not None and adapters.has_dropout(adapter)
    lead = batch.tokens.shape[:2]

    def flat(leaf):
      return leaf.reshape(lead[0] * lead[1], *leaf.shape[2:])

    out: Any = module.apply(
      {"params": base, "adapter": adapter},
      flat(batch.tokens),
      flat(batch.mask),
      flat(batch.positions),
      flat(batch.target_slot),
      flat(batch.target_token),
      rngs={"dropout": key} if drops else None,
    )
    return out.reshape(*lead, -1)

  return log_probs_fn


def make_loss_fn(name: str, module: nn.Module) -> inner.LossFn:
  """Makes the loss that `config.loss` names, over a model's targets."""
  reduce_fn = {
    "likelihood": losses.likelihood,
    "classification": losses.classification,
  }[name]
  return losses.make_loss_fn(make_log_probs_fn(module), reduce_fn)


def train_shape(examples: Examples) -> batches.Shape:
  """Returns the one shape of all training batches."""
  return batches.shape_of([*examples.lower, *examples.upper], multiple=8)
