import numpy as np
import pytest

from zofo_jax.data import batching, encode_options


def _examples(lengths):
  """Examples whose first token is their number, every third with two rows."""
  made = []
  for n, length in enumerate(lengths):
    row = encode_options.EncodedRow(
      tokens=(n, *range(1, length)),
      positions=(length - 1,),
      targets=((0, 5, 0), (0, 6, 1)),
    )
    second = encode_options.EncodedRow(
      tokens=(n, *range(1, length)),
      positions=(length - 2, length - 1),
      targets=((0, 7, 2), (1, 8, 2)),
    )
    both = n % 3 == 0
    made.append(
      encode_options.Example(
        rows=(row, second) if both else (row,),
        label=n % 2,
        right=(n % 2,),
        options=(True,) * (3 if both else 2),
        source=f"made up row {n}",
      )
    )
  return made


def test_batches_are_pure_and_cover_epochs():
  draws = [batching.batch_indices(3, 10, 4, i) for i in range(10)]
  stream = np.concatenate(draws)
  for epoch in range(4):
    part = stream[10 * epoch : 10 * (epoch + 1)]
    assert sorted(part) == list(range(10))
  assert list(stream[:10]) != list(stream[10:20])
  for i in reversed(range(10)):
    np.testing.assert_array_equal(batching.batch_indices(3, 10, 4, i), draws[i])
  other = np.concatenate(
    [batching.batch_indices(4, 10, 4, i) for i in range(10)]
  )
  assert list(other) != list(stream)


def test_a_batch_may_exceed_the_data():
  drawn = batching.batch_indices(0, 3, 8, 1)
  assert drawn.shape == (8,)
  assert set(drawn) == {0, 1, 2}


def test_shape_holds_every_example():
  shape = batching.shape_of(_examples([3, 17, 5, 9]))
  assert shape == batching.Shape(
    rows=2, length=32, positions=2, targets=2, options=3
  )
  assert batching.shape_of(_examples([3, 17]), multiple=1).length == 17


def test_collate_fills_with_weightless_real_tokens():
  examples = _examples([4, 6])
  shape = batching.shape_of(examples, multiple=8)
  batch = batching.collate(examples, shape, pad=99, batch_size=4)
  assert batch.tokens.shape == (4, 2, 8)
  assert batch.tokens[1, 0].tolist() == [1, 1, 2, 3, 4, 5, 99, 99]
  assert batch.mask[1, 0].tolist() == [True] * 6 + [False] * 2
  assert batch.mask[:, :, 0].all()  # attention is defined in every row
  assert batch.example_weight.tolist() == [1, 1, 0, 0]
  assert batch.target_weight[1].tolist() == [[1, 1], [0, 0]]
  assert batch.target_option[0].tolist() == [[0, 1], [2, 2]]
  assert batch.target_slot[0].tolist() == [[0, 0], [0, 1]]
  assert batch.positions[0].tolist() == [[3, 0], [2, 3]]
  assert batch.option_mask.tolist()[:2] == [[True] * 3, [True, True, False]]
  assert batch.label.tolist()[:2] == [0, 1]
  for name in ("tokens", "positions", "target_slot", "target_token", "label"):
    assert getattr(batch, name).dtype == np.int32


@pytest.mark.parametrize("count", [1, 7, 32, 50])
def test_evaluation_sees_each_example_once_in_few_shapes(count):
  lengths = np.random.RandomState(0).randint(3, 120, size=count)
  examples = _examples(lengths)
  seen = list(batching.eval_batches(examples, 8, pad=0))
  first = batching.restore(
    [np.asarray(b.batch.tokens)[:, 0, 0] for b in seen],
    [b.indices for b in seen],
  )
  np.testing.assert_array_equal(first, np.arange(count))
  weight = sum(float(np.sum(b.batch.example_weight)) for b in seen)
  assert weight == count
  assert all(
    (b.batch.example_weight > 0).tolist() == (b.indices >= 0).tolist()
    for b in seen
  )
  assert {b.batch.tokens.shape[0] for b in seen} == {8}
  widths = {b.batch.tokens.shape[2] for b in seen}
  assert widths <= {16, 24, 32, 48, 64, 96, 128}
