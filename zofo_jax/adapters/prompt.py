"""Prompt tuning (Lester et al., 2021): embeddings in front of every row."""

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zofo_jax import errors

INITS = ("tokens", "random", "text")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompt:
  """Embeddings of tokens that no vocabulary has.

  Attributes:
    embedding: [P, E], of the width of the model's own; float32.
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
  """Starts a prompt.

  Args:
    key: typed PRNG key. Folded, not consumed.
    base: a decoder's weights; shapes are enough for a random start.
    length: P, at least 1.
    init: "tokens", embeddings of random tokens; "text", those of `tokens`; or
      "random", normal as in PEFT.
    tokens: ids of the text, repeated or cut to P.

  Returns:
    {"embed": {"prompt": Prompt}}.

  Raises:
    UserError: the length is below 1, there is no such start, or no text.

  Example:
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
  own = jax.random.fold_in(key, np.uint32(zlib.crc32(b"prompt")))
  if init == "random":
    embedding = jax.random.normal(own, (length, table.shape[1]))
  else:
    if init == "tokens":
      ids = jax.random.randint(own, (length,), 0, table.shape[0])
    elif tokens is None or not len(tokens):
      raise errors.UserError("The prompt's text is empty; expected some words.")
    else:
      ids = jnp.asarray(np.resize(np.asarray(tokens, np.int32), length))
    embedding = jnp.take(table, ids, axis=0).astype(jnp.float32)
  return {"embed": {"prompt": Prompt(embedding)}}
