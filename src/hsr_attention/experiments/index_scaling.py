"""Time and work of the low-dimensional indexes against n: exponents, crossovers, a plot.

Theory (paper, Corollary 3.1; docs/indexes.md): beside the output, nodes visited grow like
n^(1 - 1/d) in a partition tree, like n^(1 - 1/floor(d/2)) where the partition is shallow, and like
log n in convex layers and shallow cuttings. Every row is first compared with a scan.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsr_attention import _native
from hsr_attention.evaluation.environment import native_machine, native_threads
from hsr_attention.experiments import growth
from hsr_attention.indexes.convex_layers import ConvexLayersIndex
from hsr_attention.indexes.flat import FlatIndex
from hsr_attention.indexes.partition_tree import PartitionTreeIndex
from hsr_attention.indexes.shallow_cutting import ShallowCuttingIndex

KINDS: dict[str, Callable[[Any], Any]] = {
    "convex_layers": ConvexLayersIndex,
    "partition_tree": PartitionTreeIndex,
    "shallow_cutting": ShallowCuttingIndex,
}
DATA = ("gaussian", "uniform", "clusters", "sphere", "boundary")
REPEATS = 5


@dataclass(frozen=True)
class Row:
    """One measurement: an index of n keys, queries that report about k of them.

    Times are microseconds a query, medians (``build`` is seconds): ``batch`` when all queries are
    one call, ``single`` with a call each (Python included). ``flat_*`` are those of ``FlatIndex``
    on the same queries in the same run. With one thread it is the processor time of the thread,
    which other programs on the machine disturb less; with more it is wall-clock time.
    """

    kind: str
    data: str
    d: int
    n: int
    k: float
    batch: float
    single: float
    flat_batch: float
    flat_single: float
    nodes: float
    scored: float
    build: float
    bytes_per_key: float

    @property
    def speedup(self) -> float:
        """Flat time over index time, in batches."""
        return self.flat_batch / self.batch


@dataclass(frozen=True)
class Fit:
    """Growth ~ n^exponent between the sizes measured, with the 95 % confidence interval."""

    kind: str
    data: str
    d: int
    quantity: str
    exponent: float
    low: float
    high: float
    theory: str


def make_data(
    data: str, n: int, d: int, queries: int, generator: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return keys [n, d] and queries [m, d].

    ``boundary`` puts all keys near one hyperplane, and the hyperplanes of the queries near it.
    """
    q = generator.normal(size=(queries, d))
    if data == "uniform":
        keys = generator.uniform(-1, 1, size=(n, d))
    elif data == "clusters":
        centres = 3 * generator.normal(size=(100, d))
        member = generator.integers(0, 100, n)
        spread = generator.uniform(0.1, 1, 100)[member, None]
        keys = centres[member] + spread * generator.normal(size=(n, d))
    else:
        keys = generator.normal(size=(n, d))
    if data == "sphere":
        keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    if data == "boundary":
        normal = generator.normal(size=d)
        normal /= np.linalg.norm(normal)
        keys -= (1 - 1e-3) * np.outer(keys @ normal, normal)
        q = normal + 1e-3 * q
    return keys.astype(np.float32), q.astype(np.float32)


def measure(
    dims: Sequence[int],
    sizes: Sequence[int],
    kinds: Sequence[str] = tuple(KINDS),
    *,
    data: Sequence[str] = ("gaussian",),
    output: str = "fixed",
    queries: int = 50,
    seed: int = 0,
    threads: int = 1,
) -> list[Row]:
    """Measure every kind that serves d, for each d, n and data set, against ``FlatIndex``.

    ``output="fixed"``: queries report 100 keys (d <= 3) or 1,000; ``"power"``: n^(4/5).
    """
    with native_threads(threads):
        return [
            row
            for d in dims
            for name in data
            for n in sizes
            for row in _measure_one(kinds, name, d, n, output, queries, seed)
        ]


def _measure_one(
    kinds: Sequence[str], data: str, d: int, n: int, output: str, queries: int, seed: int
) -> list[Row]:
    keys, q = make_data(data, n, d, queries, np.random.default_rng(seed))
    fixed = 100 if d <= 3 else 1000
    k = max(1, min(n, round(n**0.8) if output == "power" else fixed))
    flat = FlatIndex(keys)
    limits = np.array([flat.top_r(query[None], k).scores.min() for query in q], np.float64)
    truth = flat.report(q, limits)
    flat_times = times(flat, q, limits)
    rows = []
    for kind in kinds:
        if d not in KINDS[kind].dimensions:  # type: ignore[attr-defined]
            continue
        clock = thread_clock()
        start = clock()
        index = KINDS[kind](keys)
        build = clock() - start
        report = index.report(q, limits)
        if not (
            np.array_equal(report.indices, truth.indices)
            and np.array_equal(report.indptr, truth.indptr)
        ):
            raise AssertionError(f"{kind} and FlatIndex differ at d={d}, n={n}, {data}")
        batch, single = times(index, q, limits)
        rows.append(
            Row(kind, data, d, n, len(report.indices) / queries, batch, single, *flat_times,
                report.work.nodes_visited / queries, report.work.full_scored / queries, build,
                index.nbytes / n)
        )  # fmt: skip
    return rows


def thread_clock() -> Callable[[], float]:
    """Return the clock of the measurements: of the thread if there is one, else of the wall."""
    return time.thread_time if _native.num_threads() == 1 else time.perf_counter


def times(
    index: Any, queries: NDArray[np.float32], limits: NDArray[np.float64]
) -> tuple[float, float]:
    """Return medians in microseconds a query: all in one call, and one call each."""
    clock = thread_clock()
    batch, single = [], []
    for _ in range(REPEATS):
        start = clock()
        index.report(queries, limits)
        batch.append((clock() - start) / len(queries))
        for i in range(len(queries)):
            start = clock()
            index.report(queries[i : i + 1], limits[i : i + 1])
            single.append(clock() - start)
    return 1e6 * float(np.median(batch)), 1e6 * float(np.median(single))


def theory(kind: str, d: int) -> str:
    """Return what is known of the growth of a query's work, the output aside."""
    if kind != "partition_tree":
        return "log n"
    shallow = f"n^{1 - 1 / max(1, d // 2):.2f} shallow"
    proved = {2: ", n^0.79 proved here", 3: ", n^0.94 proved here"}.get(d, "")
    return f"n^{1 - 1 / d:.2f} (best), {shallow}{proved}"


def exponents(rows: Sequence[Row]) -> list[Fit]:
    """Fit log quantity = a + e log n where a kind, data set and dimension has three sizes.

    Rows of a fixed output that report more than n / 32 keys are left out: they are scans.
    """
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        if _is_scanned(row.k, row.n):
            continue
        groups.setdefault((row.kind, row.data, row.d), []).append(row)
    fits = []
    for (kind, data, d), members in groups.items():
        for quantity in ("nodes", "scored", "batch"):
            values = [max(getattr(row, quantity), 1.0) for row in members]
            fit = growth.interval([row.n for row in members], values)
            if fit is not None:
                fits.append(Fit(kind, data, d, quantity, *fit, theory(kind, d)))
    return fits


def _is_scanned(k: float, n: int) -> bool:
    """Say whether a fixed output k is so large a part of n that most queries are scanned."""
    return k > 32 and k > n / 32 and k < 0.9 * n**0.8


def crossovers(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return, for each kind, data set and d, the n from which the index beats a scan in batches.

    Interpolated between sizes on logarithmic scales; None if it does not at the largest.
    """
    found = []
    for kind, data, d in sorted({(row.kind, row.data, row.d) for row in rows}):
        members = [row for row in rows if (row.kind, row.data, row.d) == (kind, data, d)]
        members.sort(key=lambda row: row.n)
        n = growth.crossing([row.n for row in members], [row.speedup for row in members])
        found.append({"kind": kind, "data": data, "d": d, "from_n": n,
                      "speedup_at_largest": members[-1].speedup})  # fmt: skip
    return found


def run(**options: Any) -> dict[str, Any]:
    """Measure, fit and find crossovers; everything as plain values, with the machine."""
    rows = measure(**options)
    return {
        "machine": native_machine(options.get("threads", 1)),
        "rows": [{**asdict(row), "speedup": row.speedup} for row in rows],
        "exponents": [asdict(fit) for fit in exponents(rows)],
        "crossovers": crossovers(rows),
    }  # fmt: skip


def plot(result: dict[str, Any], path: str | Path) -> None:
    """Draw time and nodes visited against n: a column a dimension, a row a set of keys.

    All panels of a quantity have the same axes. Needs matplotlib.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    from hsr_attention.experiments import figures

    measured = result["rows"]
    dims = sorted({row["d"] for row in measured})
    names = [name for name in DATA if any(row["data"] == name for row in measured)]
    blocks = [(q, name) for q in ("batch", "nodes") for name in names]
    width, height = 1.2 + 2.1 * max(2, len(dims)), 0.9 + 1.7 * len(blocks)
    made, grid = figures.panels(len(blocks), len(dims), width, height)
    shown = {}  # every line of the legend once
    for (quantity, name), panels in zip(blocks, grid, strict=True):
        for d, axes in zip(dims, panels, strict=True):
            rows = [row for row in measured if row["d"] == d and row["data"] == name]
            for label, colour, points in _lines(rows, quantity, figures.COLOURS):
                style = "--" if label == "scan" else "-o"
                (shown[label],) = axes.plot(*zip(*points, strict=True), style, color=colour)
            axes.sharey(grid[blocks.index((quantity, names[0]))][0])
            axes.yaxis.set_major_locator(LogLocator(10))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.label_outer()
        what = "microseconds a query" if quantity == "batch" else "nodes a query"
        panels[0].set_ylabel(f"{what}\nkeys: {name}")
    for d, top, bottom in zip(dims, grid[0], grid[-1], strict=True):
        top.set_title(f"d = {d}")
        bottom.set_xlabel("keys n")
    made.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, frameon=False)
    made.savefig(path, dpi=130, facecolor="white")


def _lines(
    rows: Sequence[dict[str, Any]], quantity: str, colours: Sequence[str]
) -> Iterator[tuple[str, str, list[tuple[int, float]]]]:
    """Yield label, colour and points (n, value) of each line of a panel."""
    for kind, colour in zip(KINDS, colours, strict=False):
        points = sorted(
            (row["n"], row[quantity])
            for row in rows
            if row["kind"] == kind
            # A query that is scanned visits no node.
            and (
                quantity != "nodes" or (row["nodes"] >= 1 and not _is_scanned(row["k"], row["n"]))
            )
        )
        if points:
            yield kind.replace("_", " "), colour, points
    if quantity == "batch":
        yield "scan", colours[-1], sorted({(row["n"], row["flat_batch"]) for row in rows})
