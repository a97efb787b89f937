"""The benchmark's `zofo_jax` programs, jitted, on random weights.

Each `make_*` compiles what it returns; calls wait for their result. Weights
that a program updates are donated to it and kept between calls.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from bench import workload

import zofo_jax as zofo
from zofo_jax import adapters
from zofo_jax.builders import model
from zofo_jax.core import losses
from zofo_jax.core import tree as tree_lib
from zofo_jax.data import encode_options
from zofo_jax.evaluation import generation, scoring
from zofo_jax.models import apply, opt, transformer
from zofo_jax.models.decoder import STACKED
from zofo_jax.sharding import dispatch

DIRECTIONS = {
  "rademacher": zofo.directions.Rademacher(),
  "low_rank": zofo.directions.LowRank(rank=4),
  "gaussian": zofo.directions.Gaussian(),
}
_RATE = 1e-7


def llama_module(sizes: workload.Decoder) -> transformer.Transformer:
  config = transformer.Config(
    vocab_size=sizes.vocab_size,
    hidden_size=sizes.hidden_size,
    mlp_size=sizes.mlp_size,
    num_layers=sizes.num_layers,
    num_heads=sizes.num_heads,
    num_kv_heads=sizes.num_kv_heads,
    head_dim=sizes.hidden_size // sizes.num_heads,
    max_length=sizes.max_length,
    tied_head=True,
  )
  return transformer.Transformer(config)


def _opt(sizes: workload.Decoder) -> transformer.Transformer:
  config = opt.config_from_hf(
    {
      "vocab_size": sizes.vocab_size,
      "hidden_size": sizes.hidden_size,
      "ffn_dim": sizes.mlp_size,
      "num_hidden_layers": sizes.num_layers,
      "num_attention_heads": sizes.num_heads,
      "max_position_embeddings": sizes.max_length,
    }
  )
  return transformer.Transformer(config)


def _random_base(module: Any, dtype: str) -> Any:
  """Makes weights, one host copy of a leaf at a time."""
  ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), *[ids] * 5)["params"]
  rng = np.random.default_rng(0)

  def leaf(path, shape):
    if tree_lib.path_name(path).endswith("scale"):
      return jnp.ones(shape.shape, dtype)
    values = rng.standard_normal(shape.shape, np.float32)
    values *= 0.02
    return jnp.asarray(values, dtype)

  return jax.tree.map_with_path(leaf, shapes)


def device_peak_bytes() -> int | None:
  """Returns the peak of the device's allocator; None on a CPU."""
  return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def num_bytes(tree: Any) -> int:
  """Counts the bytes of a tree of arrays."""
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def make_batch(rows: workload.Rows) -> losses.Batch:
  """Makes a batch whose loss is -log p of each row's target."""
  count = len(rows.tokens)
  zeros = np.zeros((count, 1, 1), np.int32)
  batch = losses.Batch(
    tokens=rows.tokens[:, None],
    mask=rows.mask()[:, None],
    positions=(rows.lengths - 1)[:, None, None],
    target_slot=zeros,
    target_token=rows.targets[:, None, None],
    target_option=zeros,
    target_weight=np.ones((count, 1, 1), np.float32),
    label=np.zeros(count, np.int32),
    option_mask=np.ones((count, 1), bool),
    example_weight=np.ones(count, np.float32),
  )
  return jax.tree.map(jnp.asarray, batch)


class Zo(NamedTuple):
  """A zeroth-order step and the forward pass it is compared to.

  Attributes:
    forward: evaluates the loss once.
    steps: for each kind of direction, takes one whole step.
    temp_bytes: XLA's temporaries of each step and of "forward".
    base_bytes: bytes of the weights.
  """

  forward: Callable[[], Any]
  steps: dict[str, Callable[[], Any]]
  temp_bytes: dict[str, int]
  base_bytes: int


def zo_step(
  loss: Callable[[Any, losses.Batch], jax.Array],
  direction: zofo.directions.Direction,
) -> Callable[..., tuple[Any, Any]]:
  """Makes a central estimate along one direction with SGD in place."""
  sampler = zofo.Sampler(direction, stacked=STACKED, lazy=True)
  zo = zofo.ZerothOrder(sampler)
  sgd = zofo.outer.sgd(_RATE)

  def step(base, state, batch, key):
    objective = lambda base: loss(base, batch)
    estimate = zofo.zo.estimate(objective, base, key, 1e-3, zo)
    return sgd.update(base, state, estimate, sampler, objective, key)

  return step


def compile_zo(
  module: transformer.Transformer,
  work: workload.Work,
  kinds: tuple[str, ...],
  on: jax.Device | None = None,
) -> tuple[dict[str, Any], int]:
  """Compiles from shapes, without weights.

  Args:
    module: the model.
    work: the rows and the dtype.
    kinds: names in `DIRECTIONS`.
    on: the device; None for the default one.

  Returns:
    The compiled "forward" and step of each kind, and the bytes of the weights.
  """
  sharding = jax.sharding.SingleDeviceSharding(on or jax.devices()[0])

  def abstract(tree, dtype=None):
    def leaf(x):
      new = dtype if jnp.issubdtype(x.dtype, jnp.floating) and dtype else None
      return jax.ShapeDtypeStruct(x.shape, new or x.dtype, sharding=sharding)

    return jax.tree.map(leaf, tree)

  rows = workload.full_rows(work.llama_rows, module.config.vocab_size)
  ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), *[ids] * 5)["params"]
  base = abstract(shapes, jnp.dtype(work.dtype))
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(base))
  batch, key = abstract(make_batch(rows)), abstract(jax.random.key(0))
  loss_fn = model.make_loss_fn("likelihood", module)
  loss = lambda base, batch: loss_fn(base, {}, batch, None)
  programs = {"forward": jax.jit(loss).trace(base, batch).lower().compile()}
  state = abstract(jax.eval_shape(zofo.outer.sgd(0.0).init, base))
  for kind in kinds:
    step = jax.jit(zo_step(loss, DIRECTIONS[kind]), donate_argnums=0)
    programs[kind] = step.trace(base, state, batch, key).lower().compile()
  return programs, size


def make_zo(
  work: workload.Work,
  kinds: tuple[str, ...],
  module: transformer.Transformer | None = None,
) -> Zo:
  """Compiles the step of each kind.

  Args:
    work: the sizes.
    kinds: names in `DIRECTIONS`.
    module: the model; None for that of `work`.

  Returns:
    The step of each kind; all share one set of weights.
  """
  module = module or llama_module(work.llama)
  rows = workload.full_rows(work.llama_rows, module.config.vocab_size)
  batch = make_batch(rows)
  loss_fn = model.make_loss_fn("likelihood", module)
  base = _random_base(module, work.dtype)
  state = zofo.outer.sgd(_RATE).init(base)
  buffers = {"base": base, "state": state, "step": 0}

  def loss(base, batch):
    return loss_fn(base, {}, batch, None)

  key = jax.random.key(0)
  forward = jax.jit(loss).lower(base, batch).compile()
  compiled = {
    kind: jax.jit(zo_step(loss, DIRECTIONS[kind]), donate_argnums=0)
    .lower(base, buffers["state"], batch, key)
    .compile()
    for kind in kinds
  }
  temp_bytes = {
    name: program.memory_analysis().temp_size_in_bytes
    for name, program in [("forward", forward), *compiled.items()]
  }

  def run(program):
    buffers["step"] += 1
    buffers["base"], buffers["state"] = jax.block_until_ready(
      program(
        buffers["base"],
        buffers["state"],
        batch,
        jax.random.fold_in(key, buffers["step"]),
      )
    )

  return Zo(
    forward=lambda: forward(buffers["base"], batch).block_until_ready(),
    steps={k: lambda p=p: run(p) for k, p in compiled.items()},
    temp_bytes=temp_bytes,
    base_bytes=num_bytes(base),
  )


class Bilevel(NamedTuple):
  """The bilevel iteration.

  Attributes:
    outer: takes an iteration of no inner steps (T = 0).
    iteration: takes an iteration of T inner steps.
    base_bytes: bytes of the backbone.
  """

  outer: Callable[[], Any]
  iteration: Callable[[], Any]
  base_bytes: int


def make_bilevel(work: workload.Work) -> Bilevel:
  """Prepares iterations; each program is compiled at its first call.

  Adam and clipping on s, Adam on p, a central estimate along one Rademacher
  direction and SGD in place on the backbone.

  Args:
    work: the sizes.

  Returns:
    The iteration with and without its inner loop, on one state.
  """
  module = _opt(work.opt)
  base = _random_base(module, work.dtype)
  base_bytes = num_bytes(base)
  run = _iterate(work, module, base)
  without, rows = (
    _iteration_rows(work, work.opt_rows, steps)
    for steps in (0, work.num_inner_steps)
  )
  return Bilevel(
    outer=lambda: run(without),
    iteration=lambda: run(rows),
    base_bytes=base_bytes,
  )


def _iterate(
  work: workload.Work,
  module: Any,
  base: Any,
  num_tasks: int = 0,
  guide: zofo.guided.Guide | None = None,
) -> Callable[[zofo.BilevelBatch], None]:
  """Returns an iteration with its own state; the weights are donated to it.

  If `num_tasks` is not 0, it is over so many tasks, each with its own adapters.
  """
  keys = jax.random.split(jax.random.key(0), 3)

  def make_adapter(key):
    adapter = adapters.init_lora(key, base, rank=work.lora_rank, alpha=16.0)
    if not num_tasks:
      return adapter
    return jax.tree.map(lambda leaf: jnp.stack([leaf] * num_tasks), adapter)

  algorithm = zofo.make_bilevel_step(
    model.make_loss_fn("likelihood", module),
    lower_tx=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-4)),
    upper_tx=optax.adam(1e-4),
    base_tx=zofo.outer.sgd(_RATE),
    zo=zofo.ZerothOrder(
      zofo.Sampler(zofo.directions.Rademacher(), stacked=STACKED, lazy=True)
    ),
    over_tasks=bool(num_tasks),
    guide=guide,
  )
  buffers = {
    "state": algorithm.init(
      keys[0], base, make_adapter(keys[1]), make_adapter(keys[2])
    )
  }
  step = jax.jit(algorithm.step, donate_argnums=0)

  def run(rows):
    hparams = zofo.BilevelHParams(penalty=10.0)
    buffers["state"], info = step(buffers["state"], rows, hparams)
    jax.block_until_ready((buffers["state"].base, info))

  return run


def _iteration_rows(
  work: workload.Work, shape: tuple[int, int], num_steps: int
) -> zofo.BilevelBatch:
  """Makes the rows of an iteration of so many inner steps."""

  def batch(seed):
    return make_batch(workload.padded_rows(shape, work.opt.vocab_size, seed))

  inner = [batch(seed) for seed in range(max(num_steps, 1))]
  lower = jax.tree.map(lambda *leaves: jnp.stack(leaves)[:num_steps], *inner)
  return zofo.BilevelBatch(lower, penalty=batch(100), upper=batch(101))


class Metatrain(NamedTuple):
  """An iteration over M tasks and one over as many rows of a single task."""

  tasks: Callable[[], Any]
  single: Callable[[], Any]


def make_metatrain(work: workload.Work) -> Metatrain:
  """Prepares both iterations, on separate weights.

  Args:
    work: the sizes; each of `num_tasks` tasks has batches of `opt_rows`.

  Returns:
    The two.
  """
  module, count = _opt(work.opt), work.num_tasks
  rows, length = work.opt_rows
  whole = _iteration_rows(work, (count * rows, length), work.meta_inner_steps)
  # The same rows, divided between the tasks.
  divide = lambda leaf, axis: jnp.moveaxis(
    leaf.reshape(*leaf.shape[:axis], count, rows, *leaf.shape[axis + 1 :]),
    axis,
    0,
  )
  parts = zofo.BilevelBatch(
    lower=jax.tree.map(lambda leaf: divide(leaf, 1), whole.lower),
    penalty=jax.tree.map(lambda leaf: divide(leaf, 0), whole.penalty),
    upper=jax.tree.map(lambda leaf: divide(leaf, 0), whole.upper),
  )
  over_tasks, single = (
    _iterate(work, module, _random_base(module, work.dtype), num_tasks)
    for num_tasks in (count, 0)
  )
  return Metatrain(lambda: over_tasks(parts), lambda: single(whole))


class Guided(NamedTuple):
  """An iteration whose theta follows s, and the published one."""

  guided: Callable[[], Any]
  published: Callable[[], Any]


def make_guided(work: workload.Work) -> Guided:
  """Prepares both iterations, on separate weights.

  Both evaluate six losses for theta: two on each of three points, and three on
  each of two.

  Args:
    work: the sizes.
  """
  module = _opt(work.opt)
  rows = _iteration_rows(work, work.opt_rows, work.num_inner_steps)
  guide = zofo.guided.Guide(adapters.fold_lora, zofo.guided.parabola())
  guided, published = (
    _iterate(work, module, _random_base(module, work.dtype), guide=each)
    for each in (guide, None)
  )
  return Guided(lambda: guided(rows), lambda: published(rows))


def make_evaluation(work: workload.Work) -> Callable[[], Any]:
  """Prepares the scoring of rows with two options of one token each.

  Args:
    work: the sizes.

  Returns:
    A function that scores all rows; the first call compiles.
  """
  module = llama_module(work.llama)
  base = _random_base(module, work.dtype)
  examples = [
    encode_options.Example(
      rows=(
        encode_options.EncodedRow(
          tokens=tuple(tokens),
          positions=(len(tokens) - 1,),
          targets=tuple(
            (0, token, option) for option, token in enumerate(workload.OPTIONS)
          ),
        ),
      ),
      label=0,
      right=(0,),
      options=(True, True),
      source="",
    )
    for tokens in workload.scored_rows(work)
  ]
  score_fn = jax.jit(scoring.make_score_fn(apply.make_log_probs_fn(module)))
  return lambda: scoring.score_options(
    score_fn, base, {}, examples, batch_size=work.scored_batch, pad=0
  )


class Population(NamedTuple):
  """The answers of a population, and as many of one model.

  Attributes:
    plain: writes all rows with the weights themselves.
    members: for each kind of direction, writes them with perturbed weights.
    temp_bytes: XLA's temporaries of each kind and of "plain".
    base_bytes: bytes of the weights.
  """

  plain: Callable[[], Any]
  members: dict[str, Callable[[], Any]]
  temp_bytes: dict[str, int]
  base_bytes: int


# By their names in fields, and how many directions write at a time; 0: all.
POPULATIONS = {
  "low_rank": (zofo.directions.LowRank(rank=4), 0),
  "low_rank.rank_1": (zofo.directions.LowRank(rank=1), 0),
  "rademacher": (zofo.directions.Rademacher(), 1),
}


def make_population(work: workload.Work, kinds: tuple[str, ...]) -> Population:
  """Compiles the answers to the same prompts, which no token ends.

  Args:
    work: the sizes.
    kinds: names in `POPULATIONS`.

  Returns:
    The programs; all share one set of weights.
  """
  count, prompts, length, more = work.population
  module = llama_module(work.llama)
  base = _random_base(module, work.dtype)
  generate_fn = generation.make_generate_fn(
    module,
    max_new_tokens=more,
    stops=np.zeros(work.llama.vocab_size, bool),
    pad=0,
  )
  rows = workload.full_rows((prompts, length), work.llama.vocab_size)

  def write(base, tokens, mask):
    keys = jax.random.split(zofo.keys.seed_key(0), len(tokens))
    return generate_fn(base, {}, tokens, mask, keys)

  def make_members(direction, at_once):
    zo = zofo.ZerothOrder(
      zofo.Sampler(direction, stacked=STACKED, lazy=True),
      num_directions=count // 2,
      map_fn=functools.partial(jax.lax.map, batch_size=at_once or count // 2),
    )
    keys = zofo.keys.step_keys(zofo.keys.seed_key(0), 0)
    return lambda base, *rows: zofo.population.evaluate(
      lambda base, key: write(base, *rows), base, keys, 1e-2, zo
    )

  every_row = np.tile(rows.tokens, (count, 1))
  programs = {"plain": (write, every_row)}
  for kind in kinds:
    programs[kind] = (make_members(*POPULATIONS[kind]), rows.tokens)
  calls, temp_bytes = {}, {}
  mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
  options = dispatch.compiler_options(mesh)  # those of a run
  for name, (fn, tokens) in programs.items():
    arguments = (base, tokens, np.ones(tokens.shape, bool))
    program = jax.jit(fn, compiler_options=options).lower(*arguments).compile()
    temp_bytes[name] = program.memory_analysis().temp_size_in_bytes
    calls[name] = functools.partial(_wait_for, program, *arguments)
  plain = calls.pop("plain")
  return Population(plain, calls, temp_bytes, num_bytes(base))


def _wait_for(program: Callable[..., Any], *arguments: Any) -> Any:
  return jax.block_until_ready(program(*arguments))
