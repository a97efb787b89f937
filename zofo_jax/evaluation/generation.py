"""Text generation: greedy, by sampling, or by beam search.

`make_generate_fn` returns a pure function that its caller jits: one program
reads the prompts and then generates tokens in a loop, with a key-value cache.
The other functions run on the host, from prompts to texts.

Shapes: B rows, L tokens of a prompt, T new tokens, V vocabulary, C candidates.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zofo_jax.core import keys as keys_lib
from zofo_jax.data import batching
from zofo_jax.evaluation import beam_search
from zofo_jax.report import progress as progress_lib


class Generated(NamedTuple):
  """Tokens that follow the prompts.

  Attributes:
    tokens: int32 [B, T]; padding after the token that ends a text.
    lengths: int32 [B], tokens of each text, the one that ends it included.
  """

  tokens: jax.Array
  lengths: jax.Array


# (base, adapter, tokens [B, L], mask [B, L], keys [B]) -> Generated.
GenerateFn = Callable[[Any, Any, Any, Any, jax.Array], Generated]


@jax.custom_batching.custom_vmap
def _any_unfinished(done: jax.Array) -> jax.Array:
  """Returns whether a row is not done; under vmap, a row of any member.

  A condition of each member would have vmap copy its cache in every step, to
  keep that of the members that are done.
  """
  return ~jnp.all(done)


@_any_unfinished.def_vmap
def _any_unfinished_member(axis_size, in_batched, done):
  del axis_size, in_batched
  return _any_unfinished(done), False


def candidates(
  logits: jax.Array, *, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> tuple[jax.Array, jax.Array]:
  """Returns the tokens that may be sampled, most likely first.

  Args:
    logits: [B, V] float32.
    temperature: divides the logits; above 0.
    top_k: how many of the most likely tokens to keep; 0 for all.
    top_p: of those, keep the fewest whose total probability reaches this.

  Returns:
    Log-weights [B, C], -inf for tokens that may not be sampled, and the
    tokens' ids, int32 [B, C].
  """
  count = min(top_k or logits.shape[-1], logits.shape[-1])
  values_BxC, ids_BxC = jax.lax.top_k(logits / temperature, count)
  log_p_BxC = jax.nn.log_softmax(values_BxC, axis=-1)
  if top_p < 1.0:
    p_BxC = jnp.exp(log_p_BxC)
    above_BxC = jnp.cumsum(p_BxC, axis=-1) - p_BxC
    log_p_BxC = jnp.where(above_BxC < top_p, log_p_BxC, -jnp.inf)
  return log_p_BxC, ids_BxC


def choose(
  logits: jax.Array,
  keys: jax.Array,
  *,
  temperature: float = 0.0,
  top_k: int = 0,
  top_p: float = 1.0,
) -> jax.Array:
  """Chooses the next token of each row.

  Args:
    logits: [B, V] float32.
    keys: typed PRNG keys [B], each used once; a row's choice depends only on
      its key.
    temperature: 0 for the most likely token; see `candidates`.
    top_k: see `candidates`.
    top_p: see `candidates`.

  Returns:
    int32 [B].
  """
  if not temperature:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  draw = jax.vmap(jax.random.categorical)
  if not top_k and top_p >= 1.0:  # no need to sort
    return draw(keys, logits / temperature).astype(jnp.int32)
  weights_BxC, ids_BxC = candidates(
    logits, temperature=temperature, top_k=top_k, top_p=top_p
  )
  place_B = draw(keys, weights_BxC)
  return jnp.take_along_axis(ids_BxC, place_B[:, None], axis=1)[:, 0]


def make_generate_fn(
  module: nn.Module,
  *,
  max_new_tokens: int,
  stops: np.ndarray | jax.Array,
  pad: int,
  temperature: float = 0.0,
  top_k: int = 0,
  top_p: float = 1.0,
  num_beams: int = 1,
  length_penalty: float = 1.0,
) -> GenerateFn:
  """Returns the function that continues prompts, to be jitted once.

  Args:
    module: a decoder of `zofo_jax.models`.
    max_new_tokens: T, at least 1.
    stops: bool [V], tokens that end a text; see `stop_table`.
    pad: token id after the end.
    temperature: 0 for the most likely token; see `candidates`.
    top_k: see `candidates`.
    top_p: see `candidates`.
    num_beams: more than 1 for beam search, which samples nothing.
    length_penalty: see `beam_search.search`.

  Returns:
    generate(base, adapter, tokens, mask, keys) -> Generated. Padding of the
    prompts may be on either side; keys are typed, [B], and matter where the
    temperature is not 0.

  Raises:
    ValueError: beam search with a temperature.

  Examples:
    >>> import jax, numpy as np
    >>> from zofo_jax import models
    >>> from zofo_jax.evaluation import generation
    >>> module, _ = models.from_hf(dict(
    ...   model_type="opt", vocab_size=8, hidden_size=4, ffn_dim=4,
    ...   num_hidden_layers=1, num_attention_heads=1,
    ...   max_position_embeddings=9))
    >>> prompt, mask = np.array([[0, 5, 6]]), np.array([[False, True, True]])
    >>> base = module.init(jax.random.key(0), prompt, mask, method="logits")
    >>> generate_fn = jax.jit(generation.make_generate_fn(
    ...   module, max_new_tokens=4, stops=np.arange(8) == 2, pad=1))
    >>> keys = jax.random.split(jax.random.key(1), 1)
    >>> generate_fn(base["params"], {}, prompt, mask, keys).tokens.shape
    (1, 4)
  """
  if num_beams > 1 and temperature:
    raise ValueError(
      f"beam search draws nothing: expected temperature 0; got {temperature}"
    )
  table = stops

  def generate_fn(base, adapter, tokens, mask, keys):
    variables = {"params": base, "adapter": adapter}
    tokens, mask = jnp.asarray(tokens), jnp.asarray(mask, bool)
    stops = jnp.asarray(table)  # not before: it initializes the device

    def decode(token, cache):
      return module.apply(variables, token, cache, method="decode")

    first: Any = module.apply(
      variables, tokens, mask, max_new_tokens - 1, method="prefill"
    )
    logits, cache = first
    if num_beams > 1:
      out = beam_search.search(
        decode,
        logits,
        cache,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        stops=stops,
        pad=pad,
        length_penalty=length_penalty,
      )
      return Generated(out, _lengths(out, stops))

    def next_token(logits, step, done):
      step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
      token = choose(
        logits, step_keys, temperature=temperature, top_k=top_k, top_p=top_p
      )
      token = jnp.where(done, pad, token)
      return token, done | stops[token]

    def is_unfinished(carry):
      step, _, _, done, _ = carry
      return (step < max_new_tokens) & _any_unfinished(done)

    def body(carry):
      step, out, token, done, cache = carry
      logits, cache = decode(token, cache)
      token, done = next_token(logits, step, done)
      return step + 1, out.at[:, step].set(token), token, done, cache

    rows = tokens.shape[0]
    token, done = next_token(logits, jnp.int32(0), jnp.zeros(rows, bool))
    out = jnp.full((rows, max_new_tokens), pad, jnp.int32).at[:, 0].set(token)
    carry = (jnp.int32(1), out, token, done, cache)
    _, out, _, _, _ = jax.lax.while_loop(is_unfinished, body, carry)
    return Generated(out, _lengths(out, stops))

  return generate_fn


def _lengths(tokens_BxT: jax.Array, stops_V: jax.Array) -> jax.Array:
  """Counts the tokens up to and including the first stop; int32 [B]."""
  ends_BxT = stops_V[tokens_BxT]
  length_B = jnp.argmax(ends_BxT, axis=1) + 1
  max_length = tokens_BxT.shape[1]
  return jnp.where(jnp.any(ends_BxT, axis=1), length_B, max_length).astype(
    jnp.int32
  )


def stop_table(
  tokenizer: Any, size: int, *, ids: Sequence[int], texts: Sequence[str] = ()
) -> np.ndarray:
  """Marks the tokens that end a text.

  Args:
    tokenizer: a fast tokenizer.
    size: V, rows of the model's head.
    ids: of tokens that end a text, such as end of text.
    texts: stop strings; every token that contains one ends a text too. Strings
      that span several tokens are left to `cut`.

  Returns:
    bool [V].
  """
  table = np.zeros(size, bool)
  table[list(ids)] = True
  if texts:
    words = tokenizer.batch_decode(
      [[i] for i in range(min(len(tokenizer), size))],
      clean_up_tokenization_spaces=False,
    )
    for i, word in enumerate(words):
      table[i] |= any(text in word for text in texts)
  return table


def cut(text: str, stop: Sequence[str]) -> str:
  """Returns the text before the first stop string."""
  places = [text.find(end) for end in stop if end in text]
  return text[: min(places, default=len(text))]


def to_text(
  tokenizer: Any, tokens: np.ndarray, stop: Sequence[str] = ()
) -> str:
  """Decodes generated tokens, up to the first stop string.

  Args:
    tokenizer: turns tokens into text.
    tokens: of one text, without padding; int32, one axis.
    stop: strings that end a text; they are removed.
  """
  text = tokenizer.decode(
    tokens.tolist(),
    skip_special_tokens=True,
    clean_up_tokenization_spaces=False,
  )
  return cut(text, stop)


def generate_texts(
  generate_fn: GenerateFn,
  base: Any,
  adapter: Any,
  prompts: Sequence[Sequence[int]],
  tokenizer: Any,
  *,
  batch_size: int,
  pad: int,
  stop: Sequence[str] = (),
  seed: int = 0,
  label: str = "generate",
) -> list[str]:
  """Generates a text after every prompt.

  Args:
    generate_fn: jitted result of `make_generate_fn`.
    base: backbone parameters.
    adapter: adapter parameters; {} for none.
    prompts: token ids of each prompt.
    tokenizer: turns tokens into text.
    batch_size: prompts at a time.
    pad: token id that fills rows.
    stop: strings that end a text; they are removed.
    seed: of sampling. A prompt's text depends on the seed and on its position,
      not on the batch size.
    label: of the progress display.

  Returns:
    The texts, in the order of the prompts.
  """
  texts = [""] * len(prompts)
  key = keys_lib.seed_key(seed)
  start_time, done, count = time.monotonic(), 0, 0
  with progress_lib.Progress(len(prompts), label, unit="rows") as progress:
    for batch in batching.prompt_batches(prompts, batch_size, pad=pad):
      keys = jax.vmap(jax.random.fold_in, (None, 0))(
        key, np.maximum(batch.indices, 0)
      )
      tokens, lengths = jax.device_get(
        generate_fn(base, adapter, batch.tokens, batch.mask, keys)
      )
      for index, row, length in zip(
        batch.indices, tokens, lengths, strict=True
      ):
        if index < 0:
          continue
        texts[index] = to_text(tokenizer, row[:length], stop)
        done, count = done + 1, count + int(length)
      rate = count / (time.monotonic() - start_time)
      progress.update(done, **{"tokens/s": rate})
  return texts
