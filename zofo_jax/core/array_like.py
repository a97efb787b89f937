"""Objects that stand for an array, and become one where it is needed."""

import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_UNARY = ("neg", "pos", "abs")
# Methods and properties of `jax.Array` that are those of the array itself.
_DELEGATED = frozenset(
  """
  T mT argmax argmin astype at clip conj dot flatten imag max mean min prod
  ravel real repeat reshape round squeeze std sum swapaxes take transpose var
  """.split()
)


class ArrayLike:
  """Base of classes whose instances stand for an array.

  A subclass defines `__jax_array__`, `shape` and `dtype`. Functions of
  jax.numpy take its instances as arrays; operators, indexing and the usual
  methods work on `__jax_array__()`.
  """

  def __jax_array__(self) -> jax.Array:
    """Returns the array."""
    raise NotImplementedError

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the array."""
    raise NotImplementedError

  @property
  def dtype(self) -> Any:
    """Dtype of the array."""
    raise NotImplementedError

  @property
  def ndim(self) -> int:
    """Number of axes."""
    return len(self.shape)

  @property
  def size(self) -> int:
    """Number of elements."""
    size = 1
    for length in self.shape:
      size *= length
    return size

  @property
  def nbytes(self) -> int:
    """Bytes of the array, not of what is stored."""
    return self.size * self.dtype.itemsize

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
    """Returns the array as a NumPy array."""
    del copy
    return np.asarray(self.__jax_array__(), dtype)

  def __len__(self) -> int:
    """Returns the length of axis 0."""
    if not self.shape:
      raise TypeError("len() of an array without axes")
    return self.shape[0]

  def __iter__(self) -> Iterator[jax.Array]:
    """Iterates over axis 0."""
    return iter(self.__jax_array__())

  def __getitem__(self, index: Any) -> Any:
    """Indexes the array."""
    return self.__jax_array__()[index]

  def __getattr__(self, name: str) -> Any:
    """Returns a method or property of the array."""
    if name in _DELEGATED:
      return getattr(self.__jax_array__(), name)
    raise AttributeError(
      f"'{type(self).__name__}' object has no attribute '{name}'"
    )


def is_array_like(node: Any) -> bool:
  """Returns whether a node of a tree stands for one array."""
  return isinstance(node, ArrayLike)


def _left(fn: Callable[..., Any]) -> Callable[..., Any]:
  return lambda self, *others: fn(self.__jax_array__(), *others)


def _right(fn: Callable[..., Any]) -> Callable[..., Any]:
  return lambda self, other: fn(other, self.__jax_array__())


for _name in (*_BINARY, *_COMPARISONS, *_UNARY):
  setattr(ArrayLike, f"__{_name}__", _left(getattr(operator, _name)))
for _name in _BINARY:
  setattr(ArrayLike, f"__r{_name}__", _right(getattr(operator, _name)))
# NumPy arrays on the left leave the operation to the methods above.
ArrayLike.__array_ufunc__ = None  # type: ignore[attr-defined]
