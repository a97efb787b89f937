"""Scored options and written answers, of a model and of a population."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from bench import models, workload

import zofo_jax as zofo
from zofo_jax.data import encode_options
from zofo_jax.evaluation import generation, scoring
from zofo_jax.models import apply
from zofo_jax.models.decoder import STACKED
from zofo_jax.sharding import dispatch


def make_evaluation(work: workload.Work) -> Callable[[], Any]:
  """Prepares the scoring of rows with two options of one token each.

  Args:
    work: the sizes.

  Returns:
    A function that scores all rows; the first call compiles.
  """
  module = models.llama_module(work.llama)
  base = models.random_base(module, work.dtype)
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
  module = models.llama_module(work.llama)
  base = models.random_base(module, work.dtype)
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
  return Population(plain, calls, temp_bytes, models.num_bytes(base))


def _wait_for(program: Callable[..., Any], *arguments: Any) -> Any:
  return jax.block_until_ready(program(*arguments))
