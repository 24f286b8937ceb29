"""The result of half-space reporting: sparse rows in CSR form, with the work it took."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Work:
    """Counters of what answering a call cost; they do not depend on the machine.

    Attributes
    ----------
    sketch_scored : int
        (query, key) pairs scored from the first, 4-bit plane of the codes.
    refined : int
        Pairs scored again from both planes (8 bits).
    full_scored : int
        Pairs scored from the full-precision keys.
    nodes_visited : int
        Nodes (trees), layers (convex layers) or conflict lists (cuttings) touched.
    reported : int
        Pairs in the answer.
    """

    sketch_scored: int = 0
    refined: int = 0
    full_scored: int = 0
    nodes_visited: int = 0
    reported: int = 0

    @property
    def keys_scored(self) -> int:
        """Pairs scored in any stage, counted once for each stage."""
        return self.sketch_scored + self.refined + self.full_scored


@dataclass(frozen=True)
class Report:
    """Keys reported for ``m`` queries, in compressed sparse row form.

    Row ``i`` is ``indices[indptr[i]:indptr[i + 1]]``, ascending, with the scores ``<q_i, k_j>``
    at the same places of ``scores``.

    Attributes
    ----------
    indptr : int64 [m + 1]
        Where each row begins, and the end of the last.
    indices : int64 [nnz]
        Ids of keys: their position in the order of insertion.
    scores : float32 [nnz]
        Computed in float64 and rounded once.
    work : Work
        What the report cost.
    """

    indptr: NDArray[np.int64]
    indices: NDArray[np.int64]
    scores: NDArray[np.float32]
    work: Work = field(default_factory=Work)

    def __len__(self) -> int:
        """Return the number of rows (queries)."""
        return len(self.indptr) - 1

    def __iter__(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Yield ``(indices, scores)`` of each row."""
        return (self.row(i) for i in range(len(self)))

    def row(self, i: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the ``(indices, scores)`` of row ``i``."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"row must lie in [0, {len(self)}), got {i}")
        i %= len(self)
        part = slice(self.indptr[i], self.indptr[i + 1])
        return self.indices[part], self.scores[part]

    @property
    def counts(self) -> NDArray[np.int64]:
        """Number of keys in each row, int64 [m]."""
        return np.diff(self.indptr)
