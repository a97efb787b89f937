"""Prompt tuning (Lester et al., 2021): trained embeddings before every row."""

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zofo_jax import errors
from zofo_jax.core import perturbed

INITS = ("tokens", "random", "text")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompt:
  """Embeddings of P virtual tokens.

  Attributes:
    embedding: [P, E], as wide as the model's embeddings; float32.
  """

  embedding: jax.Array


def init_prompt(
  key: jax.Array,
  base: Any,
  *,
  length: int,
  init: str = "tokens",
  tokens: Any = None,
) -> dict[str, Any]:
  """Initialises a prompt.

  Args:
    key: typed PRNG key. Folded, not consumed.
    base: weights of a decoder; shapes suffice for init="random".
    length: P, at least 1.
    init: "tokens", embeddings of random tokens; "text", those of `tokens`; or
      "random", normal as in PEFT.
    tokens: token ids of the text, repeated or cut to P.

  Returns:
    {"embed": {"prompt": Prompt}}.

  Raises:
    UserError: the length is below 1, `init` is unknown, or the text is empty.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from zofo_jax import adapters
    >>> base = {"embed": {"embedding": jnp.arange(12.0).reshape(6, 2)}}
    >>> adapter = adapters.init_prompt(
    ...   jax.random.key(0), base, length=3, init="text", tokens=[5, 1])
    >>> adapter["embed"]["prompt"].embedding[:, 0].tolist()
    [10.0, 2.0, 10.0]
  """
  if length < 1:
    raise errors.UserError(
      f"The prompt's length is {length}; expected above 0."
    )
  if init not in INITS:
    raise errors.UserError(
      f"The prompt's init is '{init}'; expected one of {', '.join(INITS)}."
      f"{errors.nearest(init, INITS)}"
    )
  table = base["embed"]["embedding"]
  key = jax.random.fold_in(key, np.uint32(zlib.crc32(b"prompt")))
  if init == "random":
    embedding = jax.random.normal(key, (length, table.shape[1]))
  else:
    if init == "tokens":
      ids = jax.random.randint(key, (length,), 0, table.shape[0])
    elif tokens is None or not len(tokens):
      raise errors.UserError("The prompt's text is empty; expected some words.")
    else:
      ids = jnp.asarray(np.resize(np.asarray(tokens, np.int32), length))
    embedding = perturbed.take(table, ids).astype(jnp.float32)
  return {"embed": {"prompt": Prompt(embedding)}}
