"""The low-dimensional indexes where they lose most: every kind of keys, outputs from 1 to n.

A structure falls to a scan when its cells do not pay, so it may cost little more than a scan
whatever the keys and whatever the output. This looks for the worst ratio.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hsr_attention.evaluation.environment import native_machine, native_threads
from hsr_attention.experiments.index_scaling import DATA, KINDS, make_data, thread_clock
from hsr_attention.indexes.flat import FlatIndex


@dataclass(frozen=True)
class Row:
    """Microseconds a query of one call of all queries; medians of alternating calls."""

    kind: str
    data: str
    d: int
    n: int
    k: int
    index: float
    scan: float

    @property
    def slowdown(self) -> float:
        """Index time over scan time: above 1 the scan is faster."""
        return self.index / self.scan


def outputs(n: int) -> list[int]:
    """Return the sizes of reports: powers of ten, and shares of n up to all keys."""
    sizes = {10**e for e in range(12)} | {n // 32, n // 16, n // 4, n // 2, 3 * n // 4, n}
    return sorted(k for k in sizes if 1 <= k <= n)


def measure(
    dims: Sequence[int] = (4, 6, 8),
    n: int = 1_000_000,
    kinds: Sequence[str] = ("partition_tree",),
    *,
    data: Sequence[str] = DATA,
    queries: int = 12,
    repeats: int = 5,
    threads: int = 1,
    seed: int = 0,
    on_row: Callable[[str], None] = lambda what: None,
) -> list[Row]:
    """Measure each kind that serves d on each data set, for each size of report."""
    with native_threads(threads):
        rows = []
        for d in dims:
            for name in data:
                keys, q = make_data(name, n, d, queries, np.random.default_rng([seed, d]))
                scores = -np.sort(-(q.astype(np.float64) @ keys.T.astype(np.float64)), axis=1)
                flat = FlatIndex(keys)
                for kind in kinds:
                    if d not in KINDS[kind].dimensions:  # type: ignore[attr-defined]
                        continue
                    index = KINDS[kind](keys)
                    for k in outputs(n):
                        on_row(f"d = {d}, {name}, {kind}, k = {k:,}")
                        limits = np.ascontiguousarray(scores[:, k - 1])
                        times = _times({"index": index, "scan": flat}, q, limits, repeats)
                        rows.append(Row(kind, name, d, n, k, times["index"], times["scan"]))
        return rows


def _times(structures: dict[str, Any], q: Any, limits: Any, repeats: int) -> dict[str, float]:
    reports = [structure.report(q, limits) for structure in structures.values()]
    if not np.array_equal(reports[0].indices, reports[1].indices):
        raise AssertionError("the index and FlatIndex differ")
    del reports
    clock = thread_clock()
    seconds: dict[str, list[float]] = {name: [] for name in structures}
    for _ in range(repeats):
        for name, structure in structures.items():
            start = clock()
            structure.report(q, limits)
            seconds[name].append(clock() - start)
    return {name: 1e6 * statistics.median(found) / len(q) for name, found in seconds.items()}


def run(**options: Any) -> dict[str, Any]:
    """Measure; everything as plain values, with the worst row, the median and the machine."""
    rows = [{**asdict(row), "slowdown": row.slowdown} for row in measure(**options)]
    return {
        "machine": native_machine(options.get("threads", 1)),
        "rows": rows,
        "worst": max(rows, key=lambda row: row["slowdown"], default=None),
        "median_slowdown": statistics.median([r["slowdown"] for r in rows]) if rows else None,
    }  # fmt: skip
