"""The Python side shared by the native indexes: checks in, reports out."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hsr_attention import arguments
from hsr_attention.report import Report, Work


class NativeIndex:
    """A half-space reporting index whose keys and loops live in native code."""

    kind: str
    reason: str = "asked for"  # why ``halfspace_index`` took this kind
    _native_class: ClassVar[Any]

    def __init__(self, keys: Any) -> None:
        checked = arguments.matrix("keys", keys)
        self._index = self._native_class(checked.shape[1], int(checked.dtype))
        self._index.append(checked.bits)

    def __len__(self) -> int:
        """Return the number of live keys."""
        return len(self._index)

    def __repr__(self) -> str:
        """Return name, size, dimension and dtype."""
        return (
            f"{type(self).__name__}(n={len(self)}, head_dim={self.head_dim}, "
            f"dtype={self.dtype.name})"
        )

    @property
    def head_dim(self) -> int:
        """Dimension d of the keys."""
        return self._index.dim

    @property
    def dtype(self) -> arguments.Dtype:
        """Element type in which the keys are held."""
        return arguments.Dtype(self._index.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes held by the index, keys included."""
        return self._index.nbytes

    def append(self, keys: Any) -> NDArray[np.int64]:
        """Add keys [count, head_dim] and return their ids, int64 [count].

        Raises
        ------
        TypeError
            If the keys' dtype is not the index's (a float32 index takes any).
        ValueError
            If the shape is wrong or a key is not finite; the index is then unchanged.
        """
        checked = arguments.matrix("keys", keys, self.head_dim)
        bits = checked.bits
        if checked.dtype is not self.dtype:
            if self.dtype is not arguments.Dtype.float32:
                raise TypeError(
                    f"keys must be {self.dtype.name} like the index, got {checked.dtype.name}"
                )
            bits = checked.to_float32()
        first = self._index.append(bits)
        return np.arange(first, first + checked.shape[0], dtype=np.int64)

    def delete(self, ids: ArrayLike) -> None:
        """Remove keys by id; an unknown or deleted id raises ``KeyError`` and nothing is removed."""
        try:
            self._index.delete(arguments.key_ids("ids", ids))
        except IndexError as error:
            raise KeyError(str(error)) from None

    def report(self, queries: Any, thresholds: ArrayLike) -> Report:
        """Report every key with <q, k> >= b for queries [m, head_dim]; b scalar or [m]."""
        checked = arguments.matrix("queries", queries, self.head_dim)
        limits = arguments.thresholds(thresholds, checked.shape[0])
        return _report(self._index.report(checked.bits, int(checked.dtype), limits))

    def count(self, queries: Any, thresholds: ArrayLike) -> NDArray[np.int64]:
        """Return the sizes of the rows ``report`` would have, int64 [m]."""
        checked = arguments.matrix("queries", queries, self.head_dim)
        limits = arguments.thresholds(thresholds, checked.shape[0])
        return self._index.count(checked.bits, int(checked.dtype), limits)[0]

    def top_r(self, queries: Any, r: int) -> Report:
        """Report the r largest scores of each query; ties go to the smaller id, rows ascend by id."""
        checked = arguments.matrix("queries", queries, self.head_dim)
        r = min(arguments.positive_integer("r", r), max(len(self), 1))
        return _report(self._index.top_r(checked.bits, int(checked.dtype), r))


def _report(found: tuple[Any, Any, Any, tuple[int, int, int, int]]) -> Report:
    indptr, indices, scores, (sketch_scored, refined, full_scored, reported) = found
    work = Work(sketch_scored, refined, full_scored, reported=reported)
    return Report(indptr, indices, scores, work)
