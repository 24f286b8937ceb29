"""``halfspace_index``: the index that a small model of the machine expects to be fastest."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from hsr_attention import arguments
from hsr_attention.indexes.base import HalfspaceIndex
from hsr_attention.indexes.convex_layers import ConvexLayersIndex
from hsr_attention.indexes.flat import FlatIndex
from hsr_attention.indexes.partition_tree import PartitionTreeIndex
from hsr_attention.indexes.shallow_cutting import ShallowCuttingIndex
from hsr_attention.indexes.sketch import SketchIndex

KINDS: dict[str, Callable[[Any], HalfspaceIndex]] = {
    "flat": FlatIndex,
    "sketch": SketchIndex,
    "convex_layers": ConvexLayersIndex,
    "partition_tree": PartitionTreeIndex,
    "shallow_cutting": ShallowCuttingIndex,
}

# Keys that a partition tree scores for a query, as share * n^exponent, measured on Gaussian keys
# with reports of 100 (d <= 3) or 1,000 keys at n = 1e5 and 1e6: `hsr bench index`, see
# docs/indexes.md. In leaves, which are read as codes here and there, a key of any dimension costs
# as much as LEAF_FLOATS floats of a scan.
TREE_SCORED = {
    1: (135.0, 0.0), 2: (119.0, 0.124), 3: (487.0, 0.090), 4: (1613.0, 0.180),
    5: (1677.0, 0.232), 6: (910.0, 0.323), 7: (373.0, 0.428), 8: (137.0, 0.534),
}  # fmt: skip
LEAF_FLOATS = 12.0
LARGEST_TREE_DIM = max(TREE_SCORED)
CALL = 6.5e-6  # seconds that a query costs before it looks at keys
DESCENT = 0.5e-6  # and one of a structure before it reaches leaves
SKETCH_FROM_DIM = 16  # below, the codes of a sketch are hardly shorter than the keys


@functools.cache
def scan_seconds_per_float() -> float:
    """Measure this machine once: seconds a float of a scan, beyond the second-level cache.

    The best of several runs, some of which other work on the machine may slow tenfold.
    """
    rows = np.ones((1 << 18, 4), np.float32)
    index = FlatIndex(rows)
    query = np.ones((1, 4), np.float32)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        index.count(query, np.inf)
        times.append(time.perf_counter() - start)
    return min(times) / rows.size


def expected_seconds(kind: str, n: int, head_dim: int) -> float:
    """Return what the model expects of a query that reports few keys."""
    scan = scan_seconds_per_float() * head_dim
    if kind == "flat":
        return CALL + scan * n
    if kind == "convex_layers":
        return CALL + DESCENT
    share, exponent = TREE_SCORED[min(head_dim, LARGEST_TREE_DIM)]
    leaves = LEAF_FLOATS * scan_seconds_per_float() * min(n, share * n**exponent)
    return CALL + DESCENT + leaves


def choose(n: int, head_dim: int) -> tuple[str, str]:
    """Return the kind for n keys of this dimension, and the reason in words."""
    if head_dim > LARGEST_TREE_DIM:
        if head_dim >= SKETCH_FROM_DIM:
            return (
                "sketch",
                f"head_dim {head_dim} >= {SKETCH_FROM_DIM}: codes are shorter than keys",
            )
        return "flat", f"head_dim {head_dim} > {LARGEST_TREE_DIM}: cells prune too little"
    structure = "convex_layers" if head_dim == 2 else "partition_tree"
    cost, scan = (1e6 * expected_seconds(kind, n, head_dim) for kind in (structure, "flat"))
    if cost < scan:
        return structure, f"expects {cost:.1f} us a query against {scan:.1f} us of a scan"
    return "flat", f"expects {scan:.1f} us a query against {cost:.1f} us of {structure}"


def halfspace_index(keys: Any, kind: str = "auto") -> HalfspaceIndex:
    """Build the index over keys [n, d] that answers shallow queries fastest, or the one asked for.

    ``kind="auto"`` compares a scan with the structure that serves the dimension: convex layers for
    d = 2, a partition tree for other d <= 8, a sketch from d = 16 on. ``shallow_cutting`` is never
    taken by itself: it wins on keys near a sphere only, and takes longer to build. The machine
    enters by one measured number, the speed of a scan. ``index.kind`` and ``index.reason`` say
    what was chosen and why.

    The choice is made once, for these keys: it does not change when keys are appended.
    """
    kind = arguments.one_of("kind", kind, ("auto", *KINDS))
    reason = "asked for"
    if kind == "auto":
        n, head_dim = arguments.matrix("keys", keys).shape
        kind, reason = choose(n, head_dim)
    index = KINDS[kind](keys)
    index.kind, index.reason = kind, reason  # type: ignore[attr-defined]
    return index
