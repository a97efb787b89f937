"""Packs several chats or texts into one row, and splits long texts."""

import itertools
import logging
from collections.abc import Iterator, Sequence

from zofo_jax.data import encode_options

# Rows that may still be filled; more would pack little better.
_MAX_OPEN = 64


def pack(
  examples: Sequence[encode_options.Example], length: int
) -> list[encode_options.Example]:
  """Returns examples of which each holds several of the given ones.

  Each goes into the first row that has room; longer ones are split, so that
  every token is learned. Logs the number of rows.

  Args:
    examples: of one row and one option each.
    length: tokens of a row.
  """
  rows: list[list[encode_options.EncodedRow]] = []
  sources: list[list[str]] = []
  room: dict[int, int] = {}
  num_split = 0
  for example in examples:
    (whole,) = example.rows
    pieces = [*_split(whole, length)]
    num_split += len(pieces) > 1
    for piece in pieces:
      size = len(piece.tokens)
      index = next((i for i, free in room.items() if free >= size), len(rows))
      if index == len(rows):
        rows.append([])
        sources.append([])
        room[index] = length
      rows[index].append(piece)
      sources[index].append(example.source)
      room[index] -= size
      if len(room) > _MAX_OPEN:
        room.pop(min(room, key=lambda i: room[i]))
  logging.getLogger("zofo_jax").info(
    "%d rows are packed into %d of at most %d tokens; %d are split",
    *(len(examples), len(rows), length, num_split),
  )
  return [
    encode_options.Example(
      rows=(_join(pieces),),
      label=0,
      right=(0,),
      options=(True,),
      source=" + ".join(dict.fromkeys(names)),
    )
    for pieces, names in zip(rows, sources, strict=True)
  ]


def split(
  examples: Sequence[encode_options.Example], length: int
) -> list[encode_options.Example]:
  """Returns the examples, those that are too long as several.

  Args:
    examples: as for `pack`.
    length: tokens of a row.
  """
  return [
    example._replace(rows=(piece,))
    for example in examples
    for piece in _split(example.rows[0], length)
  ]


def _split(
  row: encode_options.EncodedRow, length: int
) -> Iterator[encode_options.EncodedRow]:
  """Yields the pieces of a row that have something to learn."""
  pairs = ((row.positions[slot], token) for slot, token, _ in row.targets)
  for piece, group in itertools.groupby(pairs, lambda pair: pair[0] // length):
    targets, start = [*group], piece * length
    yield encode_options.EncodedRow(
      tokens=row.tokens[start : start + length],
      positions=tuple(position - start for position, _ in targets),
      targets=tuple((i, token, 0) for i, (_, token) in enumerate(targets)),
    )


def _join(
  pieces: Sequence[encode_options.EncodedRow],
) -> encode_options.EncodedRow:
  """Returns one row of several, each a document of its own."""
  tokens: list[int] = []
  positions: list[int] = []
  targets: list[tuple[int, int, int]] = []
  documents: list[int] = []
  for number, piece in enumerate(pieces, 1):
    targets += [(len(positions) + s, t, o) for s, t, o in piece.targets]
    positions += [len(tokens) + p for p in piece.positions]
    tokens += piece.tokens
    documents += [number] * len(piece.tokens)
  return encode_options.EncodedRow(
    tuple(tokens), tuple(positions), tuple(targets), tuple(documents)
  )
