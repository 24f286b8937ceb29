"""Half-space reporting in the plane in O(log n + k): convex layers with fractional cascading."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsr_attention import _native
from hsr_attention.indexes.logarithmic import LogarithmicIndex


class ConvexLayersIndex(LogarithmicIndex):
    """Convex layers in a tree, for 2-dimensional keys.

    Build O(n log n), report O(log n + k), memory O(n); append O(log^2 n) amortised. All proved,
    for any keys (duplicates and collinear keys included). See ``docs/indexes.md``; after Chazelle,
    Guibas and Lee, "The power of geometric duality", 1985.

    Parameters
    ----------
    keys : [n, 2]
        float32, float16 or bfloat16; copied.
    """

    kind = "convex_layers"
    dimensions = range(2, 3)

    def __init__(self, keys: Any):  # of its own, so that a wrong call names this class
        super().__init__(keys)

    def _build(self, keys: NDArray[np.float32], ids: NDArray[np.int64]) -> Any:
        return _native.ConvexLayers(keys, ids)
