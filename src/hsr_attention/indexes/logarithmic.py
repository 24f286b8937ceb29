"""The logarithmic method: any static structure for half-space reporting made to append and delete.

Half-space reporting is decomposable: the report of a union is the union of the reports. So the
keys are kept in a few static structures, each over an interval of ids and each larger than all
newer ones together, and a short tail of the newest keys that is scanned (Bentley and Saxe, 1980).

- ``append`` adds to the tail. A full tail becomes a structure, merged with every structure that is
  no larger: each key is built into a structure log2(n / tail) times, so an append costs
  build(n) / n * log2(n / tail), amortised.
- ``delete`` marks. A structure with more than half of its keys deleted is built anew from the
  rest: build(n) / n a deletion, amortised, and queries never see more than twice the live keys.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hsr_attention import _native, arguments
from hsr_attention.report import Report, Work

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
TAIL = 1024  # keys; a scan of so many takes about as long as one query of a structure


class LogarithmicIndex:
    """A ``HalfspaceIndex`` over a static structure; a subclass says how to build one.

    Keys are copied, as float32. Answers are decided on float64 scores: the sum of the products of
    the float32 coordinates in their order.
    """

    kind: ClassVar[str]
    dimensions: ClassVar[range]

    def __init__(self, keys: Any):
        array = arguments.matrix("keys", keys)
        head_dim = array.shape[1]
        arguments.served_dimension(type(self).__name__, head_dim, self.dimensions)
        arguments.finite("keys", array)
        self.reason = "asked for"
        self._forest = _native.Forest(head_dim)
        self._head_dim = head_dim
        if array.shape[0]:
            values = np.ascontiguousarray(array.to_float32())
            ids = np.arange(len(values), dtype=np.int64)
            self._forest.replace_from(0, self._build(values, ids), len(values))

    def _build(self, keys: NDArray[np.float32], ids: NDArray[np.int64]) -> Any:
        """Return the native structure over keys [n, head_dim] with ascending ids [n]."""
        raise NotImplementedError

    @property
    def head_dim(self) -> int:
        """Dimension d of the keys."""
        return self._head_dim

    @property
    def nbytes(self) -> int:
        """Bytes held by the index, keys included."""
        return self._forest.nbytes

    def __len__(self) -> int:
        """Return the number of live keys."""
        return len(self._forest)

    def __repr__(self) -> str:
        """Say the kind, the size, the parts, and why this kind was taken."""
        parts = "+".join(str(part.live) for part in self._forest.parts) or "0"
        return (
            f"{type(self).__name__}(n={len(self)}, head_dim={self._head_dim}, kind={self.kind!r}, "
            f"parts={parts}, tail={self._forest.tail_size}, reason={self.reason!r})"
        )

    def append(self, keys: Any) -> NDArray[np.int64]:
        """Add keys [count, head_dim] and return their ids, int64 [count]."""
        array = arguments.matrix("keys", keys, self._head_dim)
        first = self._forest.next_id
        self._forest.append(np.ascontiguousarray(array.to_float32()))
        if self._forest.tail_size >= TAIL:
            self._carry()
        return np.arange(first, self._forest.next_id, dtype=np.int64)

    def _carry(self) -> None:
        """Turn the tail, and every newest part no larger than what follows it, into one part."""
        parts = self._forest.parts
        first, size = len(parts), self._forest.tail_size
        while first and parts[first - 1].live <= size:
            first -= 1
            size += parts[first].live
        keys, ids = self._forest.live_from(first)
        part = self._build(keys, ids) if len(ids) else None
        self._forest.replace_from(first, part, self._forest.next_id)

    def delete(self, ids: ArrayLike) -> None:
        """Remove keys by id; an unknown or already deleted id raises ``KeyError``."""
        values = arguments.key_ids("ids", ids)
        unknown = self._forest.erase(values)
        if unknown >= 0:
            raise KeyError(f"ids must be ids of live keys, got {values[unknown]}")
        for at, part in reversed(list(enumerate(self._forest.parts))):
            if 2 * part.live < part.size:
                keys, live = self._forest.live_of(at)
                self._forest.replace(at, self._build(keys, live) if len(live) else None)

    def _queries(self, queries: Any) -> NDArray[np.float32]:
        if (
            type(queries) is np.ndarray
            and queries.dtype is FLOAT32
            and queries.ndim == 2
            and queries.shape[1] == self._head_dim
            and queries.flags.c_contiguous
        ):
            return queries  # the usual case; every check below would pass
        array = arguments.matrix("queries", queries, self._head_dim)
        return np.ascontiguousarray(array.to_float32())

    def report(self, queries: Any, thresholds: ArrayLike) -> Report:
        """Report the keys with <q, k> >= b for queries [m, head_dim]; b scalar or [m]."""
        values = self._queries(queries)
        return _report(self._forest.report(values, _limits(thresholds, len(values))))

    def count(self, queries: Any, thresholds: ArrayLike) -> NDArray[np.int64]:
        """Return the sizes of the rows ``report`` would have, int64 [m]."""
        values = self._queries(queries)
        return self._forest.count(values, _limits(thresholds, len(values)))

    def top_r(self, queries: Any, r: int) -> Report:
        """Report the r largest scores of each query; among equal scores lower ids first.

        All live keys if there are fewer than r.
        """
        values = self._queries(queries)
        return _report(self._forest.top(values, arguments.positive_integer("r", r)))


def _limits(thresholds: ArrayLike, m: int) -> NDArray[np.float64]:
    if (
        type(thresholds) is np.ndarray
        and thresholds.dtype is FLOAT64
        and thresholds.shape == (m,)
        and thresholds.flags.c_contiguous
    ):
        return thresholds  # the native code refuses NaN
    return arguments.thresholds(thresholds, m)


def _report(answer: tuple[Any, ...]) -> Report:
    indptr, indices, scores, nodes, scored = answer
    work = Work(full_scored=scored, nodes_visited=nodes, reported=len(indices))
    return Report(indptr, indices, scores, work)
