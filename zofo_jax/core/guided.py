"""Steps of theta along what first-order steps have changed in an adapter.

A random direction in d dimensions has a cosine of about d^-1/2 with the
gradient; what T gradient steps have changed in s is far better aligned. With
W_m(s) the m-th matrix of the backbone with s folded in, and s' a point between
s after the steps (s_T) and before them (s_0),

  s'      = s_T - eta (s_T - s_0)
  theta'  = theta + W(s_T) - W(s')

moves into theta what s gives up: the function of (theta, s) does not change,
whatever eta is, and with eta = 1 theta has taken all of it. Theta alone, and
with another adapter, does change; the lengths eta, one for all matrices or one
for each, are chosen by forward passes (`parabola`, `descend`) or given
(`constant`). The differences W(s_T) - W(s') have twice the adapter's rank and
are never formed.

With a history, theta also moves, further or back, along the displacements of
earlier iterations, W(s_T) - W(s_0), which are kept as factors; s does not
change by this.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zofo_jax.core import factors as factors_lib
from zofo_jax.core import keys as keys_lib
from zofo_jax.core import tree as tree_lib
from zofo_jax.core.lengths import ChosenLengths as ChosenLengths
from zofo_jax.core.lengths import Lengths as Lengths
from zofo_jax.core.lengths import Rule as Rule
from zofo_jax.core.lengths import constant as constant
from zofo_jax.core.lengths import descend as descend
from zofo_jax.core.lengths import parabola as parabola
from zofo_jax.core.types import Params

# adapter -> {path of a matrix of the backbone: what the adapter adds to it}.
FoldFn = Callable[[Params], dict[str, factors_lib.Factors]]
# The displacements W(s_T) - W(s_0) of the last iterations, the latest first:
# factors with a leading axis [h - 1]; zeros until there are as many.
History = dict[str, factors_lib.Factors]


_ALL = constant()


@dataclasses.dataclass(frozen=True)
class Guide:
  """How theta follows an adapter.

  Attributes:
    fold: what an adapter adds to the backbone's matrices;
      `adapters.fold_lora` for LoRA.
    rule: how far theta follows.
    per_matrix: whether every matrix, and every layer, has a length of its own.
    stacked: regular expression for the paths of the adapter's leaves whose axis
      0 counts layers; None if there are none. Read only with `per_matrix`.
    per_task: whether every task has a length of its own, over several tasks.
    penalty: whether the objective has lam L(theta', p; D_p) besides
      L(theta', p; D_f).
    random: whether theta also takes the ordinary zeroth-order step.
    reset: whether the moments of the optimizer of s are set to 0 after each
      step.
    history: h, the displacements along which theta moves: that of the iteration
      and the h - 1 before it, one length for each of these. Only `descend` has
      lengths for them other than 0. The state then has h - 1 displacements,
      each of twice the adapter's bytes. For one adapter, not over tasks.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> import zofo_jax as zofo
    >>> from zofo_jax.core.factors import Factors
    >>> def loss(base, adapter, batch, key):
    ...   weight = base["w"] + adapter["a"] @ adapter["b"]
    ...   return jnp.mean((batch @ weight - 1.0) ** 2)
    >>> guide = zofo.guided.Guide(
    ...     lambda adapter: {"w": Factors(adapter["a"], adapter["b"])},
    ...     zofo.guided.parabola())
    >>> algorithm = zofo.make_bilevel_step(
    ...     loss, lower_tx=optax.adam(0.1), upper_tx=optax.adam(0.1),
    ...     base_tx=zofo.outer.sgd(0.0), guide=guide)
    >>> adapter = {"a": jnp.ones((3, 1)), "b": jnp.zeros((1, 2))}
    >>> state = algorithm.init(
    ...     jax.random.key(0), {"w": jnp.zeros((3, 2))}, adapter)
    >>> x = jnp.eye(3)
    >>> batch = zofo.BilevelBatch(
    ...     lower=jnp.stack([x] * 5), penalty=x, upper=x)
    >>> state, info = jax.jit(algorithm.step)(state, batch)
    >>> zeros = jax.tree.map(jnp.zeros_like, adapter)
    >>> bool(loss(state.base, zeros, x, None) < 0.5)  # theta alone; 1 before
    True
  """

  fold: FoldFn
  rule: Rule = _ALL
  per_matrix: bool = False
  per_task: bool = False
  stacked: str | None = None
  penalty: bool = True
  random: bool = False
  reset: bool = False
  history: int = 1

  def no_history(self, adapter: Params) -> History | None:
    """Returns displacements of zero for a first state; None if h = 1.

    Args:
      adapter: an adapter, or its shapes.
    """
    if self.history == 1:
      return None
    pair = jax.eval_shape(
      lambda adapter: factors_lib.difference(
        self.fold(adapter), self.fold(adapter)
      ),
      adapter,
    )
    return jax.tree.map(
      lambda x: jnp.zeros((self.history - 1, *x.shape), x.dtype), pair
    )

  def unit_lengths(
    self, adapter: Params, num_tasks: int | None = None
  ) -> Lengths:
    """Returns lengths of 1 for an adapter, or for its shapes.

    Args:
      adapter: of one task.
      num_tasks: M; None for one adapter.
    """
    if self.per_task and num_tasks is not None:
      lengths = self.unit_lengths(adapter)
      return jax.tree.map(lambda x: jnp.ones((num_tasks, *x.shape)), lengths)
    if not self.per_matrix:
      return jnp.ones([])
    lengths = {}
    for path, leaf in jax.tree.leaves_with_path(adapter):
      name = _parent(path)
      stacked = self.stacked is not None and re.search(self.stacked, name)
      lengths[name] = jnp.ones(leaf.shape[:1] if stacked else [])
    return lengths


def _parent(path: tuple[Any, ...]) -> str:
  return tree_lib.path_name(path[:-1])


def retreat(before: Params, after: Params, lengths: Lengths) -> Params:
  """Returns after - lengths (after - before).

  Args:
    before: an adapter, s_0.
    after: a tree like it, s_T.
    lengths: see `Lengths`; leaves with one parent share a length.

  Returns:
    A tree like `after`.
  """

  def back(path, start, end):
    length = lengths
    if isinstance(lengths, dict):
      length = lengths[_parent(path)]
    length = length.reshape(*length.shape, *(1,) * (end.ndim - length.ndim))
    return (end - length * (end - start)).astype(end.dtype)

  return jax.tree.map_with_path(back, before, after)


class Followed(NamedTuple):
  """What theta's step along an adapter returns.

  Attributes:
    base: theta after it.
    lower: s after it.
    lengths: the lengths taken, zero if there was no step.
    values: of the objective at the points evaluated, float32 [points].
    num_nonfinite: how many of them were not finite, int32 [].
    history: the displacements for the next step; None without.
    earlier: the lengths taken along those before it, float32 [h - 1]; None
      without.
  """

  base: Params
  lower: Params
  lengths: Lengths
  values: jax.Array
  num_nonfinite: jax.Array
  history: History | None = None
  earlier: jax.Array | None = None


def step_key(keys: keys_lib.StepKeys) -> jax.Array:
  """Returns the key of an iteration's `follow`, of no other use."""
  return jax.random.fold_in(keys.direction, np.uint32(2**32 - 1))


def follow(
  guide: Guide,
  objective: Callable[[Params, jax.typing.ArrayLike], jax.Array],
  base: Params,
  before: Params,
  after: Params,
  key: jax.Array,
  *,
  allowed: jax.Array,
  shares: jax.Array | None = None,
  history: History | None = None,
) -> Followed:
  """Moves theta along what has changed in s, and s back by as much.

  Args:
    guide: how.
    objective: (theta, number of the update of the lengths) -> float32 [].
    base: theta; donate it for the update to happen in place.
    before: s before the first-order steps.
    after: s after them.
    key: typed PRNG key, shape [].
    allowed: whether there is to be a step, bool [].
    shares: of M tasks, whose adapters have a leading axis: how much of its own
      change each gives to theta, float32 [M], 1 in sum. None: there is one
      adapter.
    history: the displacements of earlier steps; None for none.

  Returns:
    The new theta and s, and the lengths.
  """
  lengths_key, rounding_key = jax.random.split(key)
  fold, back_by = guide.fold, retreat
  units = guide.unit_lengths(after)
  if shares is not None:
    fold = jax.vmap(guide.fold)
    first = jax.tree.map(lambda leaf: leaf[0], after)
    units = guide.unit_lengths(first, len(shares))

    def back_in_task(share, before, after, lengths):
      lengths = jax.tree.map(lambda length: share * length, lengths)
      return retreat(before, after, lengths)

    task_axis = 0 if guide.per_task else None
    back_by = functools.partial(
      jax.vmap(back_in_task, in_axes=(0, 0, 0, task_axis)), shares
    )

  folded = fold(after)
  split: Callable[[Any], tuple[Any, Any]] = lambda lengths: (lengths, None)
  if history is not None:
    split = lambda pair: pair
    units = (units, jnp.zeros([guide.history - 1]))

  def factors(lengths):
    lengths, earlier = split(lengths)
    moved = factors_lib.difference(
      folded, fold(back_by(before, after, lengths))
    )
    if shares is not None:
      moved = factors_lib.sum_products(moved)
    if history is None:
      return moved
    scaled = {
      path: pair._replace(left=jax.vmap(jnp.multiply)(pair.left, earlier))
      for path, pair in history.items()
    }
    return factors_lib.sum_products(_prepend(moved, scaled))

  chosen = guide.rule.choose(
    lambda lengths, index: objective(
      factors_lib.displace(base, factors(lengths)), index
    ),
    units,
    lengths_key,
  )
  taken = jax.tree.map(
    lambda length: jnp.where(allowed, length, 0.0), chosen.lengths
  )
  lengths, earlier = split(taken)
  if history is not None:
    earlier = jnp.where(_are_displacements(history), earlier, 0.0)
    taken = (lengths, earlier)
  return Followed(
    factors_lib.add_in_place(base, factors(taken), rounding_key),
    back_by(before, after, lengths),
    lengths,
    chosen.values,
    chosen.num_nonfinite,
    _remember(history, folded, fold(before), allowed),
    earlier,
  )


def _prepend(new: Any, others: Any) -> Any:
  """Returns trees of arrays [n, ...] with one more array in front."""
  return jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), new, others)


def _are_displacements(history: History) -> jax.Array:
  """Returns which are not the zeros of a first state, bool [h - 1]."""
  lefts = [pair.left for pair in history.values()]
  return functools.reduce(
    jnp.logical_or,
    [jnp.any(x != 0, axis=tuple(range(1, x.ndim))) for x in lefts],
  )


def _remember(
  history: History | None, after: Any, before: Any, allowed: jax.Array
) -> History | None:
  """Returns a history with one more displacement, unless nothing has changed.

  Args:
    history: of earlier steps; None for none.
    after: s_T, folded.
    before: s_0, folded.
    allowed: whether there was a step, bool [].
  """
  if history is None:
    return None
  changed = jax.tree.map(lambda a, b: jnp.any(a != b), after, before)
  changed = functools.reduce(jnp.logical_or, jax.tree.leaves(changed))
  moved = factors_lib.difference(after, before)
  longer = _prepend(moved, history)
  new = jax.tree.map(lambda xs: xs[:-1], longer)
  return tree_lib.where(allowed & changed, new, history)
