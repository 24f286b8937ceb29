"""Half-space reporting in O(log n + k) expected for d = 2, 3, 4, by nested random samples."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsr_attention import _native, arguments
from hsr_attention.indexes.logarithmic import LogarithmicIndex

COARSEST = 64  # keys in the first sample, which is scanned
GROWTH = 4  # from one sample to the next
FINEST_SHARE = 16  # n over the size of the last sample: fewer reported keys cost no less
LEAF_SIZE = 64
FIRST_SAMPLE_LIMIT = 1024  # a degenerate sample is left out, up to this size


class ShallowCuttingIndex(LogarithmicIndex):
    """Random samples, their convex hulls and conflict lists, for keys of 2, 3 or 4 dimensions.

    The convex hull of a sample is the envelope of the sampled dual planes; its facets and their
    conflict lists are a shallow cutting. Report O(log n + k) expected over the samples, as long as
    the vertices of the hulls have few facets (6 on average for d = 3). Memory expected O(n log n)
    for d = 2, 3 and O(n^2) at worst for d = 4, in practice far less. A query that is not shallow
    (its half-space meets the coarsest sample) is answered by a partition tree. Answers never
    depend on the samples.

    Needs scipy (``pip install scipy``) to build.

    Parameters
    ----------
    keys : array [n, d], d in 2, 3, 4
        float32, float16 or bfloat16; copied.
    max_bytes : int
        Most memory for hulls and conflict lists. The need is estimated first; a construction that
        needs more raises ``MemoryError`` with the estimate. An ``append`` stops at a coarser
        sample instead.
    seed : int
        Of the random order of the keys. Changes the speed, never the answer.
    """

    kind = "shallow_cutting"
    dimensions = range(2, 5)

    def __init__(self, keys: Any, *, max_bytes: int = 4 << 30, seed: int = 0):
        self._max_bytes = arguments.positive_integer("max_bytes", max_bytes)
        self._generator = np.random.default_rng(seed)
        self._refuse = True
        super().__init__(keys)
        self._refuse = False

    @property
    def levels(self) -> int:
        """Samples of the largest part: 0 where the partition tree answers alone."""
        return max((part.levels for part in self._forest.parts), default=0)

    def _build(self, keys: NDArray[np.float32], ids: NDArray[np.int64]) -> Any:
        n, d = keys.shape
        order = self._generator.permutation(n).astype(np.int32)
        part = _native.ShallowCutting(keys, ids, LEAF_SIZE, order)
        previous = growth = None
        sample = COARSEST
        while sample * FINEST_SHARE <= n:
            if previous is not None:
                expected = previous * (growth or GROWTH ** (d // 2))
                if not self._affordable(part, expected, n, d, sample):
                    break
            hull = _hull(keys[order[:sample]])
            if hull is None and (previous is not None or sample >= FIRST_SAMPLE_LIMIT):
                break
            if hull is not None:
                facets = len(hull[0])
                if not self._affordable(part, facets, n, d, sample):
                    break
                growth = facets / previous if previous else None
                previous = facets
                part.add_level(sample, *hull)
            sample *= GROWTH
        return part

    def _affordable(self, part: Any, facets: float, n: int, d: int, sample: int) -> bool:
        """Compare the expected size of a level with ``max_bytes``.

        A facet of the hull of a random sample of r keys has about d n / r keys above it (Clarkson
        and Shor, 1989); its list holds their coordinates, positions and some heights, and again
        those about GROWTH * d of them that are in the next sample. Qhull takes about 1 KB a facet.
        """
        lists = facets * (d * n / sample + 8) * (4 * (d + 1) + 1)
        lists += facets * (GROWTH * d + 8) * 4 * (d + 1)
        needed = part.list_bytes + lists + 1024 * facets
        if needed <= self._max_bytes:
            return True
        if self._refuse:
            raise MemoryError(
                f"max_bytes must be at least {math.ceil(needed)} for a cutting of {n} keys with "
                f"head_dim {d}, got {self._max_bytes}; PartitionTreeIndex needs O(n) memory"
            )
        return False


def _hull(points: NDArray[np.float32]) -> tuple[NDArray[np.int32], NDArray[np.float32]] | None:
    """Return simplices and outward normals, both [facets, d]; None if points are degenerate."""
    try:
        from scipy.spatial import ConvexHull, QhullError
    except ImportError as error:
        raise ImportError("ShallowCuttingIndex needs scipy: pip install scipy") from error
    try:
        hull = ConvexHull(points.astype(np.float64))
    except QhullError:
        return None
    normals = np.ascontiguousarray(hull.equations[:, :-1], dtype=np.float32)
    usable = np.isfinite(normals).all(axis=1)
    simplices = np.ascontiguousarray(hull.simplices[usable], dtype=np.int32)
    return simplices, np.ascontiguousarray(normals[usable])
