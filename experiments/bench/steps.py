"""Zeroth-order steps on random weights, compiled, and the forward pass.

Weights that a program updates are donated to it and kept between calls.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from bench import models, workload

import zofo_jax as zofo
from zofo_jax.builders import model
from zofo_jax.core import losses
from zofo_jax.models import transformer
from zofo_jax.models.decoder import STACKED

DIRECTIONS = {
  "rademacher": zofo.directions.Rademacher(),
  "low_rank": zofo.directions.LowRank(rank=4),
  "gaussian": zofo.directions.Gaussian(),
}
_RATE = 1e-7


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
  batch, key = abstract(models.make_batch(rows)), abstract(jax.random.key(0))
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
  module = module or models.llama_module(work.llama)
  rows = workload.full_rows(work.llama_rows, module.config.vocab_size)
  batch = models.make_batch(rows)
  loss_fn = model.make_loss_fn("likelihood", module)
  base = models.random_base(module, work.dtype)
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
    base_bytes=models.num_bytes(base),
  )
