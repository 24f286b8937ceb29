"""The low-dimensional indexes against scikit-learn and scipy: builds and queries, same answers.

Those libraries know balls, not half-spaces. The lift x' = (x, sqrt(M^2 - |x|^2)), M the largest
norm, puts the keys on a sphere, where with q' = (q, 0)

    <q, x> >= b   if and only if   |x' - q'|^2 <= M^2 + |q|^2 - 2 b.

Thresholds lie halfway between two scores, so that rounding decides nothing, and every answer is
first compared with the scan. Their builds use one thread.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsr_attention.evaluation.environment import native_machine, native_threads
from hsr_attention.experiments.index_scaling import make_data, thread_clock
from hsr_attention.indexes.flat import FlatIndex
from hsr_attention.indexes.partition_tree import PartitionTreeIndex
from hsr_attention.indexes.shallow_cutting import ShallowCuttingIndex

OURS: dict[str, Callable[[Any], Any]] = {
    "partition_tree": PartitionTreeIndex,
    "shallow_cutting": ShallowCuttingIndex,
}
SLOW_SECONDS = 0.5  # of the queries of a repetition: a slow library answers fewer


@dataclass(frozen=True)
class Row:
    """One library on one data set; medians.

    ``build`` is seconds; ``batch`` and ``single`` are microseconds a query, of ``queries`` queries
    in one call and of one call each.
    """

    name: str
    data: str
    d: int
    n: int
    k: int
    build: float
    batch: float
    single: float
    queries: int


class _Ball:
    """A library's ball search as half-space reporting."""

    def __init__(self, tree: Any, lifted: NDArray[np.float64], find: str):
        self._find = getattr(tree, find)
        self._radius2 = float(np.max(np.einsum("ij,ij->i", lifted, lifted)))

    def indices(self, queries: NDArray[np.float32], limits: NDArray[np.float64]) -> list[Any]:
        wide = queries.astype(np.float64)
        square = self._radius2 + np.einsum("ij,ij->i", wide, wide) - 2 * limits
        lifted = np.column_stack([wide, np.zeros(len(wide))])
        return list(self._find(lifted, np.sqrt(np.maximum(square, 0))))


def lift(keys: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the keys on a sphere of R^(d + 1) around the origin, float64 [n, d + 1]."""
    wide = keys.astype(np.float64)
    square = np.einsum("ij,ij->i", wide, wide)
    return np.column_stack([wide, np.sqrt(np.max(square) - square)])


def _libraries() -> dict[str, Callable[[NDArray[np.float64]], _Ball]]:
    from scipy.spatial import cKDTree  # pyright: ignore[reportAttributeAccessIssue]  # native
    from sklearn.neighbors import BallTree, KDTree

    return {
        "scikit-learn BallTree": lambda x: _Ball(BallTree(x), x, "query_radius"),
        "scikit-learn KDTree": lambda x: _Ball(KDTree(x), x, "query_radius"),
        "scipy cKDTree": lambda x: _Ball(cKDTree(x), x, "query_ball_point"),
    }


def measure(
    n: int = 1_000_000,
    d: int = 3,
    k: int = 100,
    *,
    data: Sequence[str] = ("gaussian", "sphere"),
    queries: int = 100,
    repeats: int = 3,
    threads: int = 1,
    seed: int = 0,
    on_row: Callable[[str], None] = lambda what: None,
) -> list[Row]:
    """Build and ask every index ``repeats`` times, in turn; needs scikit-learn and scipy."""
    libraries = _libraries()
    with native_threads(threads):
        rows = []
        for name in data:
            keys, q = make_data(name, n, d, queries, np.random.default_rng(seed))
            kinds = {kind: OURS[kind] for kind in OURS if d in OURS[kind].dimensions}  # type: ignore[attr-defined]
            rows += _measure_one(name, keys, q, min(k, n - 1), kinds, libraries, repeats, on_row)
        return rows


def _measure_one(
    data: str,
    keys: NDArray[np.float32],
    q: NDArray[np.float32],
    k: int,
    kinds: dict[str, Callable[[Any], Any]],
    libraries: dict[str, Callable[[NDArray[np.float64]], _Ball]],
    repeats: int,
    on_row: Callable[[str], None],
) -> list[Row]:
    flat = FlatIndex(keys)
    limits = np.empty(len(q))
    for i, query in enumerate(q):
        scores = np.sort(flat.top_r(query[None], k + 1).scores.astype(np.float64))
        limits[i] = (scores[0] + scores[1]) / 2
    truth = flat.report(q, limits)
    lifted = lift(keys)
    build: dict[str, list[float]] = {}
    batch: dict[str, list[float]] = {}
    single: dict[str, list[float]] = {}
    asked: dict[str, int] = {}
    clock = thread_clock()
    for _ in range(repeats):
        for name, make in {**kinds, **libraries}.items():
            on_row(f"{data}: {name}")
            start = clock()
            index = make(keys if name in kinds else lifted)
            build.setdefault(name, []).append(clock() - start)
            ask = index.report if name in kinds else index.indices
            if name not in asked:
                start = clock()
                ask(q[:1], limits[:1])
                asked[name] = int(np.clip(SLOW_SECONDS / (clock() - start), 1, len(q)))
                _compare(name, ask(q[: asked[name]], limits[: asked[name]]), truth)
            m = asked[name]
            start = clock()
            ask(q[:m], limits[:m])
            batch.setdefault(name, []).append((clock() - start) / m)
            for i in range(m):
                start = clock()
                ask(q[i : i + 1], limits[i : i + 1])
                single.setdefault(name, []).append(clock() - start)
    return [
        Row(name, data, keys.shape[1], len(keys), k, statistics.median(build[name]),
            1e6 * statistics.median(batch[name]), 1e6 * statistics.median(single[name]), m)
        for name, m in asked.items()
    ]  # fmt: skip


def _compare(name: str, answer: Any, truth: Any) -> None:
    """Raise if an answer differs from the scan's."""
    if isinstance(answer, list):
        rows = [np.sort(np.asarray(row, np.int64)) for row in answer]
    else:
        rows = np.split(answer.indices, answer.indptr[1:-1])
    for i, row in enumerate(rows):
        if not np.array_equal(row, truth.indices[truth.indptr[i] : truth.indptr[i + 1]]):
            raise AssertionError(f"{name} and FlatIndex differ at query {i}")


def ratios(rows: list[Row]) -> list[dict[str, Any]]:
    """Return how many times slower each library is than each of our indexes."""
    return [
        {"index": ours.name, "library": theirs.name, "data": ours.data,
         "build": theirs.build / ours.build, "batch": theirs.batch / ours.batch,
         "single": theirs.single / ours.single}
        for ours in rows if ours.name in OURS
        for theirs in rows if theirs.name not in OURS and theirs.data == ours.data
    ]  # fmt: skip


def run(**options: Any) -> dict[str, Any]:
    """Measure; everything as plain values, with the machine."""
    rows = measure(**options)
    return {
        "machine": native_machine(options.get("threads", 1)),
        "rows": [asdict(row) for row in rows],
        "ratios": ratios(rows),
    }  # fmt: skip
