"""What every half-space reporting index answers: one protocol, whatever the structure."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hsr_attention.report import Report


@runtime_checkable
class HalfspaceIndex(Protocol):
    """Exact half-space reporting over keys in R^head_dim (paper, Algorithm 1).

    For a query q and a threshold b, in score units, ``report`` returns *every* key with
    <q, k> >= b and no other. "Every" holds up to rounding of the keys' own precision: with
    tol = 2^-22 sqrt(d) |q| max|k|, a report holds each key whose float64 score is >= b + tol and
    none whose float64 score is < b - tol (see ``DESIGN.md``, Exactness).

    Ids are positions in the order of insertion and never change; ``delete`` leaves gaps.
    """

    @property
    def head_dim(self) -> int:
        """Dimension d of the keys."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes held by the index, keys included."""
        ...

    def __len__(self) -> int:
        """Return the number of live keys."""
        ...

    def append(self, keys: Any) -> NDArray[np.int64]:
        """Add keys [count, head_dim] and return their ids, int64 [count]."""
        ...

    def delete(self, ids: ArrayLike) -> None:
        """Remove keys by id; an unknown or already deleted id raises ``KeyError``."""
        ...

    def report(self, queries: Any, thresholds: ArrayLike) -> Report:
        """Report the keys with <q, k> >= b for queries [m, head_dim]; b scalar or [m]."""
        ...

    def count(self, queries: Any, thresholds: ArrayLike) -> NDArray[np.int64]:
        """Return the sizes of the rows ``report`` would have, int64 [m]."""
        ...

    def top_r(self, queries: Any, r: int) -> Report:
        """Report the r largest scores of each query (all live keys if there are fewer)."""
        ...
