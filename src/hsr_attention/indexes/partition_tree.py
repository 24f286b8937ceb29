"""Half-space reporting in any low dimension by a partition tree."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsr_attention import _native, arguments
from hsr_attention.indexes.logarithmic import LogarithmicIndex


class PartitionTreeIndex(LogarithmicIndex):
    """A partition tree, for keys of few dimensions (meant for d <= 8; any d works).

    Build O(n log n), memory O(n). Nodes visited by a query, beside those inside the half-space:
    O(n^0.793) for d = 2 and O(n^0.936) for d = 3, by equipartitions (any line misses one of 4
    cells, any plane one of 8), where the keys have balanced ones. **For d > 3 there is no
    worst-case bound**: cells are halved across the direction of largest variance and bounded by a
    box and a ball. On usual data the measured exponents are lower, see ``docs/indexes.md``. A
    query that falls behind a scan by a quarter of its cost scans what it has not seen.

    Parameters
    ----------
    keys : [n, d]
        float32, float16 or bfloat16; copied.
    leaf_size : int, optional
        Keys in a leaf; by default 64 for d <= 3 and 128, which are read as codes, for more.
        Changes the speed, never the answer.
    """

    kind = "partition_tree"
    dimensions = range(1, arguments.MAX_HEAD_DIM + 1)

    def __init__(self, keys: Any, *, leaf_size: int | None = None):
        self._leaf_size = (
            None if leaf_size is None else arguments.positive_integer("leaf_size", leaf_size)
        )
        super().__init__(keys)

    def _build(self, keys: NDArray[np.float32], ids: NDArray[np.int64]) -> Any:
        return _native.PartitionTree(
            keys, ids, self._leaf_size or (64 if keys.shape[1] <= 3 else 128)
        )
